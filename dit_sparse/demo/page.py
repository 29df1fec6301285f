"""Gradio page of the demo: ``dit-sparse app``, ``make app`` or ``python app.py``."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import gradio as gr

from dit_sparse import DEFAULT_METHOD, METHODS

from ..bundled import BUNDLED, BUNDLED_CALL, BUNDLED_PROMPT
from ..generation.model_config import check_model
from . import settings_form
from .device_pool import Cancelled, DevicePool
from .request import MAX_CHARACTERS, MAX_SEED, MAX_STEPS, GenerationRequest, Limits, check_lengths
from .request_filter import LOCAL_HOSTS, launch_filtered
from .result_page import PLOTS, VIDEOS, read_example, read_result, result_files, result_table, result_title
from .sessions import Sessions
from .start_checks import check_address
from .styles import CSS, SYNCHRONIZED_PLAYBACK

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"  # in a checkout; a wheel has none
OUTPUTS = 1 + len(VIDEOS) + len(PLOTS) + 1  # table, videos, plots, downloads
CLICK = "(_, ...fields) => [window.clicks = (window.clicks || 0) + 1, ...fields]"

LIMITS = (
    f"Limits: {MAX_STEPS} steps, {MAX_CHARACTERS} characters, {{0.frames}} frames of {{0.side}} x {{0.side}} pixels "
    f"with {BUNDLED}, {{1.frames}} of {{1.side}} x {{1.side}} with other models, one request per device."
).format(Limits.for_model(BUNDLED), Limits.for_model("another"))


class Page:
    """The page. Clicks on Generate, Cancel and the examples are numbered: a newer one cancels the request of an older
    one. Only requests are queued, for a device; all other events are answered at once.

    Args:
        models: models to offer.
        local: whether the page is bound to localhost; if so, requests may use any model and any profile file.
    """

    def __init__(self, models: list[str], local: bool) -> None:
        self.models, self.local = models, local
        self.pool, self.sessions = DevicePool(), Sessions()
        self.examples = [(folder, result) for folder in sorted(EXAMPLES.glob("*/")) if (result := read_example(folder))]

    def build(self) -> gr.Blocks:
        with gr.Blocks(title="dit-sparse", delete_cache=(3600, 6 * 3600)) as blocks:
            gr.Markdown(
                "# dit-sparse\nOne video, generated with dense and with sparse attention from the same prompt and seed."
            )
            click = gr.Number(0, visible=False, precision=0)
            with gr.Row():
                with gr.Column(min_width=300):
                    inputs = self._inputs()
                    with gr.Row():
                        start = gr.Button("Generate", variant="primary", elem_id="start")
                        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel")
                    status = gr.HTML("", elem_id="status")
                    gr.Markdown(LIMITS)
                with gr.Column(scale=2, min_width=300):
                    outputs, snippet = self._outputs()
            at_once = {"queue": False, "show_progress": "hidden"}
            clicked = {"js": CLICK, "trigger_mode": "multiple"}
            if self.examples:
                titles = [[result_title(result)] for _, result in self.examples]
                examples = gr.Dataset(
                    label="Examples",
                    elem_id="examples",
                    components=[gr.Textbox(visible=False)],
                    samples=titles,
                    type="index",
                )
                filled = [status, *outputs, *inputs[1:6], inputs[7]]
                examples.click(self._load_example, [click, examples], filled, **clicked, **at_once)
                blocks.load(self._load, None, outputs, **at_once)
            changes = [blocks.load, *(each.change for each in inputs)]
            gr.on(changes, self._snippet, inputs, snippet, trigger_mode="always_last", **at_once)
            start.click(
                self._run,
                [click, *inputs],
                [status, *outputs],
                concurrency_limit=None,
                show_progress_on=outputs[0],
                **clicked,
            )
            cancel.click(self._cancel, click, status, **clicked, **at_once)
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
        method = gr.Dropdown(names, value=DEFAULT_METHOD, label="Method", info=info, allow_custom_value=True)
        density = gr.Slider(0.02, 1.0, 0.25, step=0.01, label="Density: fraction of the query-key pairs to compute")
        own_density = gr.Checkbox(False, label="Let the settings of the method determine the density")
        dense_steps = gr.Slider(0.0, 1.0, 0.25, step=0.05, label="Dense steps: fraction of the first steps")
        settings = gr.State({})
        with gr.Accordion("Method settings", open=False, elem_id="options"):
            gr.Markdown("Settings that determine the density apply only if the box above is checked.")
            gr.render(inputs=method, queue=False)(lambda text: _render_settings(text, settings))
        with gr.Accordion("Size", open=False):
            info = "0: the default of the model"
            size = [gr.Number(0, label=name, info=info, precision=0) for name in ("Frames", "Height", "Width")]
        method.change(dict, None, settings, queue=False)
        return [model, prompt, seed, steps, method, density, own_density, dense_steps, *size, settings]

    def _outputs(self) -> tuple[list[gr.components.Component], gr.Code]:
        numbers = gr.HTML("No results yet.", elem_id="numbers", min_height=80)
        with gr.Row(elem_id="clips"):
            clips = [gr.Video(label=label, autoplay=True, loop=True, min_width=140) for label in VIDEOS.values()]
        plot = lambda: gr.Image(show_label=False, min_width=260, buttons=["fullscreen"])
        mask = plot()
        with gr.Row():
            plots = [mask, plot(), plot()]
        files = gr.File(label="Downloads", file_count="multiple", interactive=False)
        with gr.Accordion("Python script", open=False):
            snippet = gr.Code(
                language="python", label="Python script of the current settings", wrap_lines=True, buttons=["copy"]
            )
        return [numbers, *clips, *plots, files], snippet

    def _request(
        self, model, prompt, seed, steps, method, density, own_density, dense_steps, frames, height, width, form
    ) -> GenerationRequest:
        """Return the request of the form fields. Raises ValueError if a field is invalid."""
        check_lengths(model, prompt, method, *form.values())
        if not self.local and model not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        if not self.local:
            settings_form.check_names(method, form)
        settings = settings_form.changed_settings(method, form)
        if own_density:  # a method with a setting gets no default density
            settings = {one.name: one.default for one in settings_form.method_settings(method)} | settings
        frames, height, width = (value or None for value in (frames, height, width))
        density = None if own_density or settings_form.sets_density(method) else density
        return GenerationRequest(
            model, prompt, seed, steps, method, density, dense_steps, frames, height, width, settings
        )

    def _snippet(self, *fields) -> str:
        try:
            return self._request(*fields).snippet()
        except ValueError as error:
            return f"# {error}"

    def _load(self, session: gr.Request) -> list:
        """Return the outputs of the first example, unless the visitor has already clicked."""
        return _outputs(*self.examples[0]) if self.sessions.is_new(session.session_hash) else _unchanged(OUTPUTS)

    def _load_example(self, session: gr.Request, click: int, index: int) -> list:
        latest, _ = self.sessions.supersede(session.session_hash, click)
        if not latest:
            return _unchanged(1 + OUTPUTS + 6)
        folder, result = self.examples[index]
        inputs = [result[name] for name in ("prompt", "seed", "steps", "method", "density_asked")]
        return ["", *_outputs(folder, result), *inputs, result["dense_steps"] / result["steps"]]

    def _cancel(self, session: gr.Request, click: int):
        latest, cancelled = self.sessions.supersede(session.session_hash, click)
        if not latest:
            return gr.skip()
        return "Cancelled. The device stops after the current step." if cancelled else "No request is running."

    def _end_session(self, session: gr.Request) -> None:
        self.sessions.close(session.session_hash)

    def _run(self, session: gr.Request, progress=gr.Progress(), click: int = 0, *fields) -> list:
        """Return the status and the outputs of a request; unchanged if there was a newer click."""

        def stage(name: str):
            start = monotonic()

            def on_step(done: int, steps: int) -> None:
                seconds_left = (monotonic() - start) / done * (steps - done)
                progress((done, steps), desc=f"{name}, {seconds_left:.0f} s left", unit="steps")

            progress((0, None), desc=name, unit="steps")
            return on_step

        name = session.session_hash
        try:
            active = self.sessions.start(name, click, session.client.host)
        except ValueError as error:
            raise gr.Error(escape(str(error))) from None
        if active is None:
            return _unchanged(1 + OUTPUTS)
        try:
            request = self._request(*fields)
            progress((0, None), desc="waiting for a free device", unit="steps")
            folder = TemporaryDirectory(prefix="dit-sparse-")
            active.wait(self.pool.submit(request, Path(folder.name), stage, active.cancel))
            outputs = _outputs(Path(folder.name), read_result(Path(folder.name)))
        except Cancelled:
            return _unchanged(1 + OUTPUTS)
        except Exception as error:
            if not self.sessions.finish(name, active):
                return _unchanged(1 + OUTPUTS)
            if not isinstance(error, ValueError):
                logging.exception("request failed")
            raise gr.Error(escape(_sentence(error))) from None
        latest = self.sessions.finish(name, active, folder)
        return ["", *outputs] if latest else _unchanged(1 + OUTPUTS)


def _render_settings(method: str, form: gr.State) -> None:
    settings = settings_form.method_settings(method)
    if not settings:
        gr.Markdown("This method has no settings besides the density.")
    for setting in settings:
        field = _form_field(setting)
        store = lambda value, values, name=setting.name: values | {name: value}
        field.change(store, [field, form], form, queue=False, show_progress="hidden")


def _form_field(setting: settings_form.MethodSetting) -> gr.components.Component:
    shared = {"label": setting.name, "interactive": True}
    if setting.type == "bool":
        return gr.Checkbox(setting.default, **shared)
    if setting.type == "int":
        return gr.Number(setting.default, precision=0, **shared)
    if setting.type == "float":
        return gr.Number(setting.default, step=0.01, **shared)
    return gr.Textbox(setting.default_text, info=setting.type, **shared)


def _outputs(folder: Path, result: dict) -> list:
    return [result_table(result), *result_files(folder)]


def _unchanged(count: int) -> list:
    return [gr.skip() for _ in range(count)]


def _sentence(error: Exception) -> str:
    """Return the first line of an error, with its type if the error is unexpected."""
    line = next(iter(str(error).strip().splitlines()), "")[:MAX_CHARACTERS]
    return line if isinstance(error, ValueError) and line else f"the request failed: {type(error).__name__}: {line}"


def serve(models: list[str], host: str, port: int, allowed_hosts: list[str], quiet: bool = False) -> None:
    """Start the page, and return when it is stopped.

    Args:
        models: models to offer besides the bundled one.
        host: address to listen on. Except on localhost, only offered models run.
        port: port to listen on.
        allowed_hosts: other names of this machine in URLs.
        quiet: print no address.

    Raises:
        ValueError: a model cannot be loaded, or the page cannot listen on the address.
    """
    for model in models:
        check_model(model)
    check_address(host, port)
    local, host = host in LOCAL_HOSTS, f"[{host}]" if ":" in host else host
    page = Page([BUNDLED, *models], local).build()
    launch(page, local, tuple(allowed_hosts), server_name=host, server_port=port, quiet=quiet)


def launch(blocks: gr.Blocks, local: bool = True, hosts: tuple = (), **where) -> None:
    launch_filtered(blocks, CSS, SYNCHRONIZED_PLAYBACK, EXAMPLES, local, hosts, footer_links=["gradio"], **where)
