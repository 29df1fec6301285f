"""Write the model card of an exported model: `python -m dit_sparse.bundled.shapes_wan.card FOLDER`.

All numbers come from FOLDER/reports/{training,concentration,accuracy}.json and the sizes of the files in FOLDER.
"""

import argparse
import json
import math
from pathlib import Path

from safetensors import safe_open

from .scenes import COLOURS, SHAPES

HEADER = """\
---
library_name: diffusers
pipeline_tag: text-to-video
tags: [sparse-attention, toy-model]
---

# shapes-wan

A small text-to-video model with the architecture of Wan, for comparing sparse-attention methods on any machine. It
draws textured circles, squares and triangles that move over a textured background. It is {megabytes:.1f} MB in size and
runs on a CPU. Its attention is concentrated: every texture is random, so the model has to match it between frames.

```python
from diffusers import WanPipeline

pipe = WanPipeline.from_pretrained("path/to/shapes-wan")
video = pipe(
    "a red circle moves right while a blue square moves up",
    height=80,
    width=80,
    num_frames=20,
    num_inference_steps={steps},
    guidance_scale={guidance},
).frames[0]  # 21 frames
```

It needs no code but diffusers. **The pipeline generates one frame more than `num_frames`**: it rounds to a multiple of
the autoencoder's temporal compression plus one, and this autoencoder does not compress time. Height and width must be
multiples of 16. One token is 4x4 pixels of one frame. The model was trained on clips of up to {full} tokens.

## Components

{parts}

The autoencoder has analytic weights: it rearranges 4x4 pixels into 48 channels and back, without loss. Only the decoder
is used for generation; the encoder of diffusers takes 4k + 1 frames. The text encoder was pretrained to classify shape
and direction of the object that each colour word refers to, then the transformer was trained. Example prompts:

- a red circle moves right
- a green triangle slides upwards and a yellow square is moving to the left
- a purple square travels down while a blue circle glides left over a background drifting right

Colours: {colours}. Shapes: {shapes}. Directions: left, right, up, down. The phrase about the background is optional.
"""

TRAINING = """
## Training

{steps} steps in {minutes} minutes on {device}: rectified flow, Muon and AdamW, averaged weights (EMA), clips generated
on the fly. {earlier}To repeat it, run `python -m dit_sparse.bundled.shapes_wan.train`.
"""

CONCENTRATION = """
## Attention

Attention mass on the best {kept:.0%} of the {block}-token key blocks, by layer and head, for held-out clips of {tokens}
tokens. Uniform attention has {kept}. The mean is {mean}; {above:.0%} of the heads are above 0.9. {elsewhere:.0%} of the
attention mass is on other frames than the query's.

{table}

Mean squared error of the velocity by noise level: {losses}.
"""

ACCURACY = """
## Prompt following

{prompts} prompts with one or two objects; the pairs never occurred in training. {tokens} tokens, {steps} steps,
guidance {guidance}, checked by a program (`python -m dit_sparse.bundled.shapes_wan.judge`). Clips of up to 6 frames
have fast motion. Clips that are both long and large were used only in the last tenth of the training and are not part
of this test; in them, objects sometimes appear twice. Fraction of objects with the correct attribute:

{table}
"""

FOOTER = """
## Limitations

The model draws only these shapes, with the accuracy above, and knows no other words. Its quality says nothing about
large models, and speedups at a few thousand tokens say nothing about hundreds of thousands. What transfers is whether a
method keeps the important attention: compare methods on this model, then test them on a large one.
"""


def write_card(folder):
    """Write FOLDER/README.md from the reports in FOLDER/reports."""
    reports = {name: _read(folder / "reports" / f"{name}.json") for name in ("training", "concentration", "accuracy")}
    accuracy, training = reports["accuracy"], reports["training"]
    header = HEADER.format(
        megabytes=sum(f.stat().st_size for f in folder.rglob("*") if f.is_file()) / 1e6,
        steps=accuracy["steps"],
        guidance=accuracy["guidance"],
        full=_times(training["largest_tokens"]),
        parts=_parts_table(folder),
        colours=", ".join(COLOURS),
        shapes=", ".join(SHAPES),
    )
    sections = (
        header,
        _training(training),
        _concentration(reports["concentration"]),
        _accuracy(accuracy),
    )
    (folder / "README.md").write_text("".join(sections) + FOOTER)


def _read(path):
    return json.loads(path.read_text())


def _times(numbers):
    return "x".join(map(str, numbers))


def _parts_table(folder):
    rows = []
    for part in ("transformer", "text_encoder", "vae"):
        (weights,) = (folder / part).glob("*.safetensors")
        with safe_open(weights, "pt") as file:
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, not a mapping
            count, kinds = sum(math.prod(s.get_shape()) for s in slices), {s.get_dtype() for s in slices}
        rows.append((part, f"{count:,}", "/".join(sorted(kinds)), f"{weights.stat().st_size / 1e6:.1f} MB"))
    return _table(("part", "parameters", "stored as", "size"), rows)


def _training(report):
    earlier = f"{report['earlier']}. " if "earlier" in report else ""
    return TRAINING.format(**{**report, "earlier": earlier})


def _concentration(report):
    times = list(report["shares"])
    rows = [
        (layer, *(" ".join(f"{share:.2f}" for share in report["shares"][time][layer]) for time in times))
        for layer in range(len(report["shares"][times[0]]))
    ]
    return CONCENTRATION.format(
        kept=report["kept"],
        block=report["block"],
        tokens=_times(report["tokens"]),
        mean=report["mean"],
        above=report["heads_above_0.9"],
        elsewhere=report["other_frames"],
        table=_table(("layer", *(f"noise {time}" for time in times)), rows),
        losses=", ".join(f"{loss} at {time}" for time, loss in report["losses"].items()),
    )


def _accuracy(report):
    names = list(report["all"])
    rows = [
        (kind.replace("_", " "), *(f"{report[kind][name]:.0%}" for name in names))
        for kind in ("one_object", "two_objects", "all")
    ]
    return ACCURACY.format(**{**report, "tokens": _times(report["tokens"]), "table": _table(("", *names), rows)})


def _table(header, rows):
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
