"""The demo as a page: ``make app``, or ``python app.py`` after ``pip install -e '.[demo]'``. Bound to localhost."""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event

import gradio as gr

from dit_sparse import METHODS
from dit_sparse.bundled import BUNDLED, BUNDLED_CALL, BUNDLED_PROMPT
from dit_sparse.demo.device_pool import (
    MAX_CHARACTERS,
    MAX_SEED,
    MAX_STEPS,
    Cancelled,
    DevicePool,
    GenerationRequest,
    Limits,
    Option,
    options_from,
    options_of,
)

EXAMPLES = Path(__file__).parent / "docs" / "examples"
VIDEOS = {"dense": "dense", "sparse": "sparse", "difference": "difference, 4 times"}
PICTURES = ("mask", "retained", "attention")

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#numbers table {width: 100%; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 6px 8px; word-break: normal; overflow-wrap: normal}
#numbers td:not(:first-child), #numbers th:not(:first-child) {text-align: right; white-space: nowrap}
"""

# The clips are equally long; whatever is done to one of them is done to all.
TOGETHER = """<script>
const others = (video) => [...document.querySelectorAll("#clips video")].filter((each) => each !== video);
const ours = (event) => event.target.matches && event.target.matches("#clips video");
const follow = (video) => others(video).forEach((each) => {
  if (Math.abs(each.currentTime - video.currentTime) > 0.07) each.currentTime = video.currentTime;
});
document.addEventListener("play", (event) => ours(event) && (follow(event.target),
  others(event.target).forEach((each) => each.paused && each.play().catch(() => {}))), true);
document.addEventListener("pause", (event) => ours(event) && !event.target.ended &&
  others(event.target).forEach((each) => each.paused || each.pause()), true);
document.addEventListener("seeking", (event) => ours(event) && event.target.paused && follow(event.target), true);
document.addEventListener("timeupdate", (event) => ours(event) &&
  event.target === document.querySelector("#clips video") && follow(event.target), true);
</script>"""

LIMITS = (
    f"At most {MAX_STEPS} steps and {MAX_CHARACTERS} characters; {{0.frames}} frames of {{0.side}} x {{0.side}} "
    f"pixels with {BUNDLED}, {{1.frames}} of {{1.side}} x {{1.side}} with other models. One clip a device at a time; "
    "others wait."
).format(Limits.for_model(BUNDLED), Limits.for_model("another"))


class Page:
    """The page and what it remembers of every visitor: a folder with the last result, and whether to go on."""

    def __init__(self, models: list[str], any_model: bool) -> None:
        self.models, self.any_model = models, any_model
        self.playground = DevicePool()
        self._folders: dict[str, TemporaryDirectory] = {}
        self._cancels: dict[str, Event] = {}  # of those who wait or watch

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="dit-sparse", delete_cache=(3600, 6 * 3600)) as blocks:
            gr.Markdown(
                "# dit-sparse\nOne prompt, one seed, drawn twice: with all attention, and with most of it left out."
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    inputs = self._inputs()
                    with gr.Row():
                        start = gr.Button("Draw both", variant="primary", elem_id="start")
                        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
                    gr.Markdown(LIMITS)
                with gr.Column(scale=2, min_width=300):
                    outputs, snippet = self._outputs()
            if examples := {_title(folder): folder for folder in sorted(EXAMPLES.glob("*/"))}:
                stored = lambda title: _shown(examples[title]) + _settings(examples[title])
                filled = [*outputs, *inputs[1:6], inputs[7]]
                gr.Examples(
                    [[title] for title in examples], [gr.Textbox(visible=False)], filled, stored, run_on_click=True
                )
                blocks.load(lambda: _shown(next(iter(examples.values()))), None, outputs, show_progress="hidden")
            gr.on(
                [blocks.load, *(each.change for each in inputs)], self._snippet, inputs, snippet, show_progress="hidden"
            )
            status = outputs[0]
            devices = len(self.playground.devices)
            start.click(self._wanted, None, status, queue=False, show_progress="hidden").then(
                self._run, inputs, outputs, concurrency_limit=devices, show_progress_on=status, trigger_mode="multiple"
            )
            cancel.click(self._cancel, concurrency_limit=None, show_progress="hidden")
            blocks.unload(self._left)
        return blocks

    def _inputs(self) -> list[gr.components.Component]:
        """In the order of the fields of `GenerationRequest`; what is set of the method comes last."""
        told = "A folder or a name on the hub will do as well." if self.any_model else None
        model = gr.Dropdown(self.models, label="Model", info=told, allow_custom_value=self.any_model)
        prompt = gr.Textbox(BUNDLED_PROMPT, label="Prompt", lines=2, max_length=MAX_CHARACTERS)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        steps = gr.Slider(2, MAX_STEPS, BUNDLED_CALL["num_inference_steps"], step=1, label="Denoising steps")
        told = "Also radial|sink, or pooled(subblock): a method around another one."
        names = [name for name in METHODS if name != "dense"]
        method = gr.Dropdown(names, value="radial", label="Method", info=told, allow_custom_value=True)
        density = gr.Slider(0.02, 1.0, 0.25, step=0.01, label="Density: fraction of the pairs computed")
        own = gr.Checkbox(False, label="Leave the density to the settings of the method")
        dense_steps = gr.Slider(0.0, 1.0, 0.25, step=0.05, label="First steps that stay dense, as a fraction")
        changed = gr.State({})
        with gr.Accordion("Settings of the method", open=False, elem_id="options"):
            gr.Markdown("What would set the density counts only where the density is left to it.")
            gr.render(inputs=method)(lambda name: _options(name, changed))
        with gr.Accordion("Size", open=False):
            size = [gr.Number(None, label=name, precision=0) for name in ("Frames", "Height", "Width")]
        method.change(dict, None, changed)
        return [model, prompt, seed, steps, method, density, own, dense_steps, *size, changed]

    def _outputs(self) -> tuple[list[gr.components.Component], gr.Code]:
        numbers = gr.Markdown("Nothing has been drawn yet.", elem_id="numbers", min_height=80)
        with gr.Row(elem_id="clips"):
            clips = [gr.Video(label=label, autoplay=True, loop=True, min_width=140) for label in VIDEOS.values()]
        picture = lambda: gr.Image(show_label=False, min_width=260, buttons=["fullscreen"])
        mask = picture()
        with gr.Row():
            pictures = [mask, picture(), picture()]
        files = gr.File(label="Downloads", file_count="multiple", interactive=False)
        with gr.Accordion("As a Python script", open=False):
            snippet = gr.Code(language="python", label="The current settings", buttons=["copy"])
        return [numbers, *clips, *pictures, files], snippet

    def _wish(
        self, model, prompt, seed, steps, method, density, own, dense_steps, frames, height, width, changed
    ) -> GenerationRequest:
        if not self.any_model and model not in self.models:
            raise ValueError(f"this page draws with {', '.join(self.models)}")
        options = options_from(method, changed)
        if own:  # at least one setting has to be there, else the usual density is taken
            options = {option.name: option.value for option in options_of(method)} | options
        density = None if own else density
        return GenerationRequest(
            model, prompt, seed, steps, method, density, dense_steps, frames, height, width, options
        )

    def _snippet(self, *given) -> str:
        try:
            return self._wish(*given).snippet()
        except ValueError as error:
            return f"# {error}"

    def _wanted(self, request: gr.Request) -> str:
        self._stop(request)  # a new wish takes the place of the one before
        self._cancels[request.session_hash] = Event()
        return "Waiting for a free device."

    def _cancel(self, request: gr.Request) -> None:
        gr.Info("It ends with the current step." if self._stop(request) else "Nothing is being drawn.")

    def _left(self, request: gr.Request) -> None:
        self._stop(request)
        self._cancels.pop(request.session_hash, None)
        self._folders.pop(request.session_hash, None)

    def _stop(self, request: gr.Request) -> bool:
        """End what the visitor waits for, if anything."""
        if cancel := self._cancels.get(request.session_hash):
            cancel.set()
        return cancel is not None

    def _run(self, request: gr.Request, progress=gr.Progress(), *given):
        """Wrong input becomes a message on the page."""

        def stage(name: str):
            began = time.monotonic()

            def step_ended(done: int, steps: int) -> None:
                left = (time.monotonic() - began) / done * (steps - done)
                progress((done, steps), desc=f"{name}, {left:.0f} s left", unit="steps")

            progress((0, None), desc=name, unit="steps")
            return step_ended

        cancel = self._cancels.setdefault(request.session_hash, Event())
        try:
            wish = self._wish(*given)
            folder = TemporaryDirectory(prefix="dit-sparse-")
            self.playground.run(wish, Path(folder.name), stage, cancel)
        except Cancelled:
            return ["Cancelled.", *[None] * (len(VIDEOS) + len(PICTURES) + 1)]
        except ValueError as error:
            raise gr.Error(str(error)) from None
        finally:
            if self._cancels.get(request.session_hash) is cancel:
                del self._cancels[request.session_hash]
        self._folders[request.session_hash] = folder
        return _shown(Path(folder.name))


def _options(name: str, changed: gr.State) -> None:
    options = options_of(name)
    if not options:
        gr.Markdown("None beside the density.")
    for option in options:
        control = _control(option)
        noted = lambda value, so_far, key=option.name: so_far | {key: value}
        control.change(noted, [control, changed], changed, show_progress="hidden")


def _control(option: Option) -> gr.components.Component:
    shown = {"label": option.name, "interactive": True}
    if option.type == "bool":
        return gr.Checkbox(option.value, **shown)
    if option.type == "int":
        return gr.Number(option.value, precision=0, **shown)
    if option.type == "float":
        return gr.Number(option.value, step=0.01, **shown)
    return gr.Textbox(str(option.value), info=option.type, **shown)


def _title(folder: Path) -> str:
    result = json.loads((folder / "result.json").read_text())
    return f"{result['method']} at {result['density_asked']:g}: {result['prompt']}"


def _settings(folder: Path) -> list:
    """Prompt, seed, steps, method, density and share of dense steps of what a demo wrote."""
    result = json.loads((folder / "result.json").read_text())
    told = [result[name] for name in ("prompt", "seed", "steps", "method", "density_asked")]
    return [*told, result["dense_steps"] / result["steps"]]


def _shown(folder: Path) -> list:
    """The outputs of the page for what a demo wrote."""
    found = lambda name: str(folder / name) if (folder / name).exists() else None
    files = [str(path) for path in sorted(folder.glob("*.mp4"))] + [str(folder / "result.json")]
    return [
        _table(json.loads((folder / "result.json").read_text())),
        *(found(f"{name}.mp4") for name in VIDEOS),
        *(found(f"{name}.png") for name in PICTURES),
        files,
    ]


def _table(result: dict) -> str:
    achieved = result["density_achieved"]
    density = "-" if achieved is None else f"{achieved:.3f}"
    return f"""| | dense | {result["method"]} | ratio |
|---|---|---|---|
| denoising, s | {result["seconds_dense"]:.1f} | {result["seconds_sparse"]:.1f} | **{result["speedup"]:.2f}x** |
| attention, s | {result["attention_seconds_dense"]:.1f} | {result["attention_seconds_sparse"]:.1f} | \
**{result["attention_speedup"]:.2f}x** |
| density: sparse calls / all | 1 | {density} / {result["density_run"]:.3f} | |
| PSNR, dB / SSIM | | {result["psnr"]:.1f} / {result["ssim"]:.3f} | |

“{result["prompt"]}”, seed {result["seed"]}, {result["grid"]} tokens, {result["steps"]} steps, the first \
{result["dense_steps"]} dense, {result["executor"]} executor, {result["device"]}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="another model to offer; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="where to listen; off localhost, only offered models run")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    page = Page([BUNDLED, *options.model], any_model=options.host in ("127.0.0.1", "localhost", "::1"))
    launch(page.build(), server_name=options.host, server_port=options.port)


def launch(blocks: gr.Blocks, **where) -> None:
    blocks.queue(max_size=20, api_open=False).launch(
        css=CSS, head=TOGETHER, allowed_paths=[str(EXAMPLES)], show_error=True, footer_links=["gradio"], **where
    )


if __name__ == "__main__":
    main()
