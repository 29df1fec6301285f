"""Gradio page of the demo: ``make app``, or ``pip install -e '.[demo]'`` and ``python app.py``. Bound to localhost."""

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
from dit_sparse.demo.device_pool import Cancelled, DevicePool
from dit_sparse.demo.request import MAX_CHARACTERS, MAX_SEED, MAX_STEPS, GenerationRequest, Limits
from dit_sparse.demo.settings_form import MethodSetting, changed_settings, check_profiles, method_settings, sets_density

EXAMPLES = Path(__file__).parent / "docs" / "examples"
VIDEOS = {"dense": "dense", "sparse": "sparse", "difference": "difference x 4"}
PLOTS = ("mask", "retained", "attention")

CSS = """
.gradio-container {max-width: 1200px !important; margin: auto}
#numbers table {width: 100%; font-variant-numeric: tabular-nums}
#numbers th, #numbers td {padding: 6px 8px; word-break: normal; overflow-wrap: normal}
#numbers td:not(:first-child), #numbers th:not(:first-child) {text-align: right; white-space: nowrap}
"""

# The clips have the same length: playing, pausing and seeking one of them applies to all.
SYNCHRONIZED_PLAYBACK = """<script>
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
    f"Limits: {MAX_STEPS} steps, {MAX_CHARACTERS} characters, {{0.frames}} frames of {{0.side}} x {{0.side}} pixels "
    f"with {BUNDLED}, {{1.frames}} of {{1.side}} x {{1.side}} with other models, one request per device."
).format(Limits.for_model(BUNDLED), Limits.for_model("another"))


class Page:
    """The page, and the state of each session: a folder with the latest result, and an event that cancels its request.

    Args:
        models: models to offer.
        local: whether only this machine reaches the page; then any model and any profile file may be named.
    """

    def __init__(self, models: list[str], local: bool) -> None:
        self.models, self.local = models, local
        self.pool = DevicePool()
        self._folders: dict[str, TemporaryDirectory] = {}
        self._cancel_events: dict[str, Event] = {}  # of the sessions with a request

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="dit-sparse", delete_cache=(3600, 6 * 3600)) as blocks:
            gr.Markdown(
                "# dit-sparse\nOne video, generated with dense and with sparse attention from the same prompt and seed."
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    inputs = self._inputs()
                    with gr.Row():
                        start = gr.Button("Generate", variant="primary", elem_id="start")
                        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
                    gr.Markdown(LIMITS)
                with gr.Column(scale=2, min_width=300):
                    outputs, snippet = self._outputs()
            if examples := {_title(folder): folder for folder in sorted(EXAMPLES.glob("*/"))}:
                load_example = lambda title: _result_outputs(examples[title]) + _example_inputs(examples[title])
                filled = [*outputs, *inputs[1:6], inputs[7]]
                gr.Examples(
                    [[title] for title in examples],
                    [gr.Textbox(visible=False)],
                    filled,
                    load_example,
                    run_on_click=True,
                )
                first = next(iter(examples.values()))
                blocks.load(lambda: _result_outputs(first), None, outputs, show_progress="hidden")
            gr.on(
                [blocks.load, *(each.change for each in inputs)], self._snippet, inputs, snippet, show_progress="hidden"
            )
            status = outputs[0]
            devices = len(self.pool.devices)
            start.click(self._enqueue, None, status, queue=False, show_progress="hidden").then(
                self._run, inputs, outputs, concurrency_limit=devices, show_progress_on=status, trigger_mode="multiple"
            )
            cancel.click(self._cancel, concurrency_limit=None, show_progress="hidden")
            blocks.unload(self._end_session)
        return blocks

    def _inputs(self) -> list[gr.components.Component]:
        """Return the form fields in the order of the arguments of `_request`."""
        info = "Also a local folder or a name on the Hugging Face hub." if self.local else None
        model = gr.Dropdown(self.models, label="Model", info=info, allow_custom_value=self.local)
        prompt = gr.Textbox(BUNDLED_PROMPT, label="Prompt", lines=2, max_length=MAX_CHARACTERS)
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED)
        steps = gr.Slider(2, MAX_STEPS, BUNDLED_CALL["num_inference_steps"], step=1, label="Denoising steps")
        info = "Also with settings, composed, or a profile: radial(sink=true), radial|sink, pooled(svg), profile:NAME."
        names = [name for name in METHODS if name != "dense"]
        method = gr.Dropdown(names, value="radial", label="Method", info=info, allow_custom_value=True)
        density = gr.Slider(0.02, 1.0, 0.25, step=0.01, label="Density: fraction of the query-key pairs to compute")
        own_density = gr.Checkbox(False, label="Let the settings of the method determine the density")
        dense_steps = gr.Slider(0.0, 1.0, 0.25, step=0.05, label="Dense steps: fraction of the first steps")
        settings = gr.State({})
        with gr.Accordion("Method settings", open=False, elem_id="options"):
            gr.Markdown("Settings that determine the density apply only if the box above is checked.")
            gr.render(inputs=method)(lambda text: _render_settings(text, settings))
        with gr.Accordion("Size", open=False):
            size = [gr.Number(None, label=name, precision=0) for name in ("Frames", "Height", "Width")]
        method.change(dict, None, settings)
        return [model, prompt, seed, steps, method, density, own_density, dense_steps, *size, settings]

    def _outputs(self) -> tuple[list[gr.components.Component], gr.Code]:
        numbers = gr.Markdown("No results yet.", elem_id="numbers", min_height=80)
        with gr.Row(elem_id="clips"):
            clips = [gr.Video(label=label, autoplay=True, loop=True, min_width=140) for label in VIDEOS.values()]
        plot = lambda: gr.Image(show_label=False, min_width=260, buttons=["fullscreen"])
        mask = plot()
        with gr.Row():
            plots = [mask, plot(), plot()]
        files = gr.File(label="Downloads", file_count="multiple", interactive=False)
        with gr.Accordion("Python script", open=False):
            snippet = gr.Code(language="python", label="Python script of the current settings", buttons=["copy"])
        return [numbers, *clips, *plots, files], snippet

    def _request(
        self, model, prompt, seed, steps, method, density, own_density, dense_steps, frames, height, width, form
    ) -> GenerationRequest:
        """Return the request of the form fields. Raises ValueError if a field is invalid."""
        if not self.local and model not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        if not self.local:
            check_profiles(method)
        settings = changed_settings(method, form)
        if own_density:  # a method with a setting gets no default density
            settings = {one.name: one.default for one in method_settings(method)} | settings
        density = None if own_density or sets_density(method) else density
        return GenerationRequest(
            model, prompt, seed, steps, method, density, dense_steps, frames, height, width, settings
        )

    def _snippet(self, *fields) -> str:
        try:
            return self._request(*fields).snippet()
        except ValueError as error:
            return f"# {error}"

    def _enqueue(self, session: gr.Request) -> str:
        self._stop(session)  # a new request replaces the previous one
        self._cancel_events[session.session_hash] = Event()
        return "Waiting for a free device."

    def _cancel(self, session: gr.Request) -> None:
        gr.Info("Stopping after the current step." if self._stop(session) else "No request is running.")

    def _end_session(self, session: gr.Request) -> None:
        self._stop(session)
        self._cancel_events.pop(session.session_hash, None)
        self._folders.pop(session.session_hash, None)

    def _stop(self, session: gr.Request) -> bool:
        """Cancel the request of a session. Returns whether there is one."""
        if event := self._cancel_events.get(session.session_hash):
            event.set()
        return event is not None

    def _run(self, session: gr.Request, progress=gr.Progress(), *fields):
        """Run a request and return the outputs. An invalid field becomes a message on the page."""

        def stage(name: str):
            start = time.monotonic()

            def on_step(done: int, steps: int) -> None:
                seconds_left = (time.monotonic() - start) / done * (steps - done)
                progress((done, steps), desc=f"{name}, {seconds_left:.0f} s left", unit="steps")

            progress((0, None), desc=name, unit="steps")
            return on_step

        cancel = self._cancel_events.setdefault(session.session_hash, Event())
        try:
            request = self._request(*fields)
            folder = TemporaryDirectory(prefix="dit-sparse-")
            self.pool.run(request, Path(folder.name), stage, cancel)
        except Cancelled:
            return ["Cancelled.", *[None] * (len(VIDEOS) + len(PLOTS) + 1)]
        except ValueError as error:
            raise gr.Error(str(error)) from None
        finally:
            if self._cancel_events.get(session.session_hash) is cancel:
                del self._cancel_events[session.session_hash]
        self._folders[session.session_hash] = folder
        return _result_outputs(Path(folder.name))


def _render_settings(method: str, form: gr.State) -> None:
    settings = method_settings(method)
    if not settings:
        gr.Markdown("This method has no settings besides the density.")
    for setting in settings:
        field = _form_field(setting)
        store = lambda value, values, name=setting.name: values | {name: value}
        field.change(store, [field, form], form, show_progress="hidden")


def _form_field(setting: MethodSetting) -> gr.components.Component:
    shared = {"label": setting.name, "interactive": True}
    if setting.type == "bool":
        return gr.Checkbox(setting.default, **shared)
    if setting.type == "int":
        return gr.Number(setting.default, precision=0, **shared)
    if setting.type == "float":
        return gr.Number(setting.default, step=0.01, **shared)
    return gr.Textbox(setting.default_text, info=setting.type, **shared)


def _title(folder: Path) -> str:
    result = _read_result(folder)
    density = result["density_asked"]
    return f"{result['method']}{'' if density is None else f' at {density:g}'}: {result['prompt']}"


def _read_result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def _example_inputs(folder: Path) -> list:
    """Return prompt, seed, steps, method, density and fraction of dense steps of an example."""
    result = _read_result(folder)
    values = [result[name] for name in ("prompt", "seed", "steps", "method", "density_asked")]
    return [*values, result["dense_steps"] / result["steps"]]


def _result_outputs(folder: Path) -> list:
    """Return the values of the outputs for the folder of a result."""
    path = lambda name: str(folder / name) if (folder / name).exists() else None
    return [
        _table(_read_result(folder)),
        *(path(f"{name}.mp4") for name in VIDEOS),
        *(path(f"{name}.png") for name in PLOTS),
        [*map(str, sorted(folder.glob("*.mp4"))), str(folder / "result.json")],
    ]


def _table(result: dict) -> str:
    achieved = result["density_achieved"]
    density = "-" if achieved is None else f"{achieved:.3f}"
    method = result["method"].replace("|", "\\|")
    return f"""| | dense | {method} | speedup |
|---|---|---|---|
| denoising time (s) | {result["seconds_dense"]:.1f} | {result["seconds_sparse"]:.1f} | **{result["speedup"]:.2f}x** |
| attention time (s) | {result["attention_seconds_dense"]:.1f} | {result["attention_seconds_sparse"]:.1f} | \
**{result["attention_speedup"]:.2f}x** |
| density: sparse calls / whole run | 1 | {density} / {result["density_run"]:.3f} | |
| PSNR (dB) / SSIM | | {result["psnr"]:.1f} / {result["ssim"]:.3f} | |

“{result["prompt"]}”, seed {result["seed"]}, {result["grid"]} tokens, {result["steps"]} steps, \
{result["dense_steps"]} of them dense, executor {result["executor"]}, {result["device"]}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", action="append", default=[], help="another model to offer; may be repeated")
    parser.add_argument("--host", default="127.0.0.1", help="address; except on localhost, only offered models run")
    parser.add_argument("--port", type=int, default=7860)
    options = parser.parse_args()
    page = Page([BUNDLED, *options.model], local=options.host in ("127.0.0.1", "localhost", "::1"))
    launch(page.build(), server_name=options.host, server_port=options.port)


def launch(blocks: gr.Blocks, **where) -> None:
    blocks.queue(max_size=20, api_open=False).launch(
        css=CSS,
        head=SYNCHRONIZED_PLAYBACK,
        allowed_paths=[str(EXAMPLES)],
        show_error=True,
        footer_links=["gradio"],
        **where,
    )


if __name__ == "__main__":
    main()
