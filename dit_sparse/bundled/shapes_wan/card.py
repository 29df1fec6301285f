"""Write the model card of a finished folder: `python -m dit_sparse.bundled.shapes_wan.card FOLDER`.

All numbers come from the folder: from FOLDER/reports/{training,concentration,accuracy}.json and the files' sizes.
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

A very small text-to-video model with the architecture of Wan: textured circles, squares and triangles cross a
textured, drifting background. It exists to compare sparse-attention methods where there is no large model at hand:
it is {megabytes:.1f} MB in size, runs on a CPU, and its attention is concentrated, because every texture is random
and has to be matched from frame to frame.

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

It needs no code but diffusers. **It makes one frame more than `num_frames`**, because the pipeline rounds to
4k + 1 for its usual autoencoder, and to k + 1 for this one, which does not compress time. Height and width are
multiples of 16; one token is 4x4 pixels of one frame. The model was trained up to {full} tokens.

## Parts

{parts}

The autoencoder was computed, not trained: it folds 4x4 pixels into 48 channels and back, without loss. Only its
decoder is of use here; the encoder of diffusers takes 4k + 1 frames. The text encoder was first taught which shape and
direction belong to which colour word, then the transformer learnt to draw. The prompts it knows look like these:

- a red circle moves right
- a green triangle slides upwards and a yellow square is moving to the left
- a purple square travels down while a blue circle glides left over a background drifting right

Colours: {colours}. Shapes: {shapes}. Directions: left, right, up, down. The part about the background is optional.
"""

TRAINING = """
## Training

{steps} steps in {minutes} minutes on {device}, rectified flow, Muon and AdamW, averaged weights, clips drawn on the
fly. {earlier}Repeat it with `python -m dit_sparse.bundled.shapes_wan.train`.
"""

CONCENTRATION = """
## Attention

Share of the attention that falls on the best {kept:.0%} of the {block}-token key blocks (flat attention: {kept}),
for unseen clips of {tokens} tokens, by layer and head. Mean {mean}; {above:.0%} of the heads are above 0.9.
{elsewhere:.0%} of all attention goes to other frames than the query's own.

{table}

The loss at these noise levels is {losses}.
"""

ACCURACY = """
## Does it follow the prompt?

{prompts} prompts whose pairs of objects never occurred in training, {tokens} tokens, {steps} steps, guidance
{guidance}, judged by a program (`python -m dit_sparse.bundled.shapes_wan.judge`). Clips of up to 6 frames have fast
motion; clips that are both long and wide had a tenth of the last training and were not judged: there objects still
double at times. Share of objects with the right ...

{table}
"""

FOOTER = """
## What it is not

It draws nothing but these shapes, as well or as badly as the table above says, and knows no other words. Its quality
says nothing about large models, nor does the speed-up of a method at some thousand tokens say anything about hundreds
of thousands. What carries over is whether a method keeps the attention that matters: compare methods with each other
on it, then go to a large model.
"""


def write_card(folder):
    """Fill the card from the reports and write FOLDER/README.md."""
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
            slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no mapping
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
