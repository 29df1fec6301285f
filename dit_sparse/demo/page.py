"""Gradio page of the demo: ``dit-sparse app``, ``make app`` or ``python app.py``."""

from __future__ import annotations

import logging
from html import escape
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic

import gradio as gr

from ..bundled import BUNDLED
from ..generation.model_config import check_model
from ..notation.presets import PRESETS
from . import settings_form
from .device_pool import Cancelled, DevicePool
from .form import AT_ONCE, CUSTOM, build_form
from .request import MAX_CHARACTERS, GenerationRequest, check_lengths
from .request_filter import LOCAL_HOSTS, check_address, launch_filtered
from .result_page import (
    PLOTS,
    VIDEOS,
    estimate_text,
    example_values,
    read_example,
    read_result,
    result_files,
    result_table,
    result_title,
)
from .sessions import Sessions
from .styles import CSS, SYNCHRONIZED_PLAYBACK

EXAMPLES = Path(__file__).parents[2] / "docs" / "examples"  # in a checkout; a wheel has none
OUTPUTS = 1 + len(VIDEOS) + len(PLOTS) + 1  # table, videos, plots, downloads
CLICK = "(_, ...fields) => [window.clicks = (window.clicks || 0) + 1, ...fields]"


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
            with gr.Row(elem_id="layout"):
                with gr.Column(elem_id="result"):
                    table, clips, examples = self._result()
                with gr.Column(elem_id="form"):
                    form = build_form(blocks, self.models, self.local)
                    with gr.Row():
                        start = gr.Button("Generate", variant="primary", elem_id="start", min_width=120)
                        cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=120, visible=False)
                    estimate, status = gr.HTML("", elem_id="estimate"), gr.HTML("", elem_id="status")
                with gr.Column(elem_id="details"):
                    details, snippet = self._details()
            outputs = [table, *clips, *details]
            clicked = {"js": CLICK, "trigger_mode": "multiple"}
            if examples is not None:
                filled = [status, *outputs, *form.of_example]
                examples.click(self._load_example, [click, examples], filled, **clicked, **AT_ONCE)
                blocks.load(self._load, None, outputs, **AT_ONCE)
            changes = [blocks.load, *(each.change for each in form.inputs)]
            gr.on(changes, self._preview, form.inputs, [estimate, snippet], trigger_mode="always_last", **AT_ONCE)
            start.click(lambda: gr.update(visible=True), None, cancel, trigger_mode="multiple", **AT_ONCE)
            running = start.click(
                self._run,
                [click, *form.inputs],
                [status, *outputs],
                concurrency_limit=None,
                show_progress_on=table,
                **clicked,
            )
            ended = [
                running.then(self._preview, form.inputs, [estimate, snippet], **AT_ONCE),
                cancel.click(self._cancel, click, status, **clicked, **AT_ONCE),
            ]
            for event in ended:
                event.then(self._cancel_button, None, cancel, **AT_ONCE)
            blocks.unload(self._end_session)
        return blocks

    def _result(self) -> tuple[gr.HTML, list[gr.Video], gr.Dataset | None]:
        """Build the table, the clips and the examples."""
        with gr.Row(elem_id="clips"):
            clips = [
                gr.Video(label=label, autoplay=True, loop=True, min_width=100, buttons=[]) for label in VIDEOS.values()
            ]
        table = gr.HTML("No results yet.", elem_id="numbers", min_height=80)
        if not self.examples:
            return table, clips, None
        titles = [[escape(result_title(result))] for _, result in self.examples]
        examples = gr.Dataset(
            label="Examples, generated earlier; a click also fills in their settings",
            elem_id="examples",
            components=[gr.HTML(visible=False)],  # the titles of a Textbox would be cut
            samples=titles,
            type="index",
        )
        return table, clips, examples

    def _details(self) -> tuple[list[gr.components.Component], gr.Code]:
        """Build the plots, the downloads and the script."""
        plot = lambda: gr.Image(show_label=False, min_width=260, buttons=["fullscreen"], elem_classes="plot")
        mask = plot()
        with gr.Row():
            plots = [mask, plot(), plot()]
        files = gr.File(label="Downloads", file_count="multiple", interactive=False, elem_id="files")
        with gr.Accordion("Python script", open=False):
            snippet = gr.Code(
                language="python", label="Python script of the current settings", wrap_lines=True, buttons=["copy"]
            )
        return [*plots, files], snippet

    def _request(self, model, prompt, preset, seed, steps, frames, height, width, executor, *attention):
        """Return the `GenerationRequest` of the form fields. Raises ValueError if a field is invalid."""
        check_lengths(model, prompt)
        if not self.local and model not in self.models:
            raise ValueError(f"the model must be one of {', '.join(self.models)}")
        if preset not in (*PRESETS, CUSTOM):
            raise ValueError(f"the preset must be one of {', '.join(PRESETS)} and {CUSTOM}")
        settings = {"method": preset} if preset in PRESETS else self._attention(*attention)
        clip = {
            "seed": seed,
            "steps": steps,
            "frames": frames or None,
            "height": height or None,
            "width": width or None,
        }
        return GenerationRequest(model, prompt, executor=executor, **clip, **settings)

    def _attention(self, method, density, own_density, dense_steps, form) -> dict:
        """Return the fields of a request that a preset would determine."""
        check_lengths(method, *form.values())
        if not self.local:
            settings_form.check_names(method, form)
        settings = settings_form.changed_settings(method, form)
        if own_density:  # a method with a setting gets no default density
            settings = {one.name: one.default for one in settings_form.method_settings(method)} | settings
        density = None if own_density or settings_form.sets_density(method) else density
        return {"method": method, "density": density, "dense_steps": dense_steps, "settings": settings}

    def _preview(self, *fields) -> list[str]:
        """Return the estimate and the script of the form, or in place of both why it is invalid."""
        try:
            request = self._request(*fields)
            return [escape(estimate_text(self.pool.estimate(request))), request.snippet()]
        except ValueError as error:
            return [escape(_sentence(error)), f"# {error}"]

    def _load(self, session: gr.Request) -> list:
        """Return the outputs of the first example, unless the visitor has already clicked."""
        if not self.sessions.is_new(session.session_hash):
            return _unchanged(OUTPUTS)
        return _outputs(*self.examples[0], is_example=True)

    def _load_example(self, session: gr.Request, click: int, index: int) -> list:
        latest, _ = self.sessions.supersede(session.session_hash, click)
        folder, result = self.examples[index]
        values = example_values(result)
        return (
            ["", *_outputs(folder, result, is_example=True), *values]
            if latest
            else _unchanged(1 + OUTPUTS + len(values))
        )

    def _cancel(self, session: gr.Request, click: int):
        latest, cancelled = self.sessions.supersede(session.session_hash, click)
        if not latest:
            return gr.skip()
        return "Cancelled. The device stops after the current step." if cancelled else "No request is running."

    def _cancel_button(self, session: gr.Request):
        """Return the button to cancel, visible while a request of the session waits or runs."""
        return gr.update(visible=self.sessions.is_active(session.session_hash))

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


def _outputs(folder: Path, result: dict, is_example: bool = False) -> list:
    return [result_table(result, "Example" if is_example else "Result"), *result_files(folder)]


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
