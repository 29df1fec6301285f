"""The form of the Gradio page: prompt and preset first, all other settings under Advanced."""

from __future__ import annotations

from dataclasses import dataclass, fields

import gradio as gr
import torch

from dit_sparse import METHODS

from ..bundled import BUNDLED, BUNDLED_CALL, BUNDLED_PROMPT
from ..kernels.executors import EXECUTORS, ON_GPU
from ..notation.parser import parse
from ..notation.presets import DEFAULT_PRESET, PRESETS
from ..schedule import Schedule
from . import settings_form
from .request import MAX_CHARACTERS, MAX_SEED, MAX_STEPS, Limits

CUSTOM = "custom"
LIMITS = (
    f"At most {MAX_STEPS} steps, {MAX_CHARACTERS} characters, {{0.frames}} frames of {{0.side}} x {{0.side}} pixels "
    f"with {BUNDLED}, {{1.frames}} of {{1.side}} x {{1.side}} with other models, one request per device."
).format(Limits.for_model(BUNDLED), Limits.for_model("another"))
AT_ONCE = {"queue": False, "show_progress": "hidden"}


@dataclass(frozen=True)
class Form:
    """The fields of the form, in the order of the arguments of `Page._request`."""

    model: gr.Dropdown
    prompt: gr.Textbox
    preset: gr.Radio
    seed: gr.Number
    steps: gr.Slider
    frames: gr.Number
    height: gr.Number
    width: gr.Number
    executor: gr.Dropdown
    method: gr.Dropdown
    density: gr.Slider
    own_density: gr.Checkbox
    dense_steps: gr.Slider
    settings: gr.State

    @property
    def inputs(self) -> list[gr.components.Component]:
        return [getattr(self, field.name) for field in fields(self)]

    @property
    def of_example(self) -> list[gr.components.Component]:
        """The fields that an example sets."""
        return self.inputs[:-1]

    @property
    def of_preset(self) -> list[gr.components.Component]:
        """The fields that a preset sets."""
        return [self.method, self.density, self.own_density, self.dense_steps, self.settings]


def build_form(blocks: gr.Blocks, models: list[str], any_model: bool) -> Form:
    """Add the fields to the current container of a page.

    A preset sets the fields of the method, and a change of one of these selects `CUSTOM`.

    Args:
        blocks: the page.
        models: models to offer.
        any_model: whether another model may be named.
    """
    info = "Also a local folder or a name on the Hugging Face hub." if any_model else None
    model = gr.Dropdown(models, label="Model", info=info, allow_custom_value=any_model)
    known = f"{BUNDLED} moves one or two coloured circles, squares and triangles left, right, up or down."
    prompt = gr.Textbox(BUNDLED_PROMPT, label="Prompt", info=known, lines=2, max_length=MAX_CHARACTERS)
    choices = [(f"{name}: {preset.summary}", name) for name, preset in PRESETS.items()]
    choices.append((f"{CUSTOM}: the method and the density under Advanced", CUSTOM))
    preset = gr.Radio(choices, value=DEFAULT_PRESET, label="Preset", elem_id="preset")
    with gr.Accordion("Advanced", open=False, elem_id="advanced"):
        form = Form(model, prompt, preset, *_clip_fields(), *_method_fields())
        with gr.Group(elem_id="options"):
            triggers = [blocks.load, form.method.change, preset.input]
            gr.render(form.method, triggers, queue=False)(lambda text: _render_settings(text, form))
        gr.Markdown(LIMITS, elem_classes="note")
    preset.input(preset_values, preset, form.of_preset, **AT_ONCE)
    form.method.change(dict, None, form.settings, queue=False)
    for field in form.of_preset[:-1]:
        field.input(lambda: CUSTOM, None, preset, **AT_ONCE)
    return form


def _clip_fields() -> list[gr.components.Component]:
    with gr.Row():
        seed = gr.Number(0, label="Seed", precision=0, minimum=0, maximum=MAX_SEED, min_width=130)
        sizes = [gr.Number(0, label=name, precision=0, min_width=130) for name in ("Frames", "Height", "Width")]
    gr.Markdown("Frames, height and width of 0 are the default of the model.", elem_classes="note")
    steps = gr.Slider(2, MAX_STEPS, BUNDLED_CALL["num_inference_steps"], step=1, label="Denoising steps")
    choices = ["auto", *(name for name in EXECUTORS if torch.cuda.is_available() or name not in ON_GPU)]
    info = "auto: the fastest one, as measured on this machine."
    return [seed, steps, *sizes, gr.Dropdown(choices, value="auto", label="Executor", info=info)]


def _method_fields() -> list[gr.components.Component]:
    name, density, own_density, dense_steps, settings = preset_values(DEFAULT_PRESET)
    info = "Also with settings, composed, or a profile: radial(sink=true), radial|sink, pooled(svg), profile:NAME."
    names = [each for each in METHODS if each != "dense"]
    method = gr.Dropdown(names, value=name, label="Method", info=info, allow_custom_value=True)
    label = "Density: fraction of the query-key pairs to compute"
    density_field = gr.Slider(0.02, 1.0, density, step=0.01, label=label)
    own_field = gr.Checkbox(own_density, label="Let the settings of the method determine the density")
    label, info = "Dense steps: fraction of the first steps", "Presets use those of a paper where it gives some."
    dense_field = gr.Slider(0.0, 1.0, dense_steps, step=0.05, label=label, info=info)
    return [method, density_field, own_field, dense_field, gr.State(settings)]


def preset_values(preset: str) -> list:
    """Return the values of `Form.of_preset`; with `CUSTOM` only the settings are reset, as their fields are."""
    if preset not in PRESETS:
        return [*(gr.skip() for _ in range(4)), {}]
    call = parse(preset)
    return [call.name, dict(call.settings)["density"], False, Schedule().dense_steps, {}]


def _render_settings(method: str, form: Form) -> None:
    settings = settings_form.method_settings(method)
    text = "Settings of the method. Those that determine the density apply only if the box above is checked."
    gr.Markdown(text if settings else "This method has no settings besides the density.", elem_classes="note")
    for setting in settings:
        field = _setting_field(setting)
        store = lambda value, values, name=setting.name: (values | {name: value}, CUSTOM)
        field.input(store, [field, form.settings], [form.settings, form.preset], **AT_ONCE)


def _setting_field(setting: settings_form.MethodSetting) -> gr.components.Component:
    shared = {"label": setting.name, "interactive": True}
    if setting.type == "bool":
        return gr.Checkbox(setting.default, **shared)
    if setting.type == "int":
        return gr.Number(setting.default, precision=0, **shared)
    if setting.type == "float":
        return gr.Number(setting.default, step=0.01, **shared)
    return gr.Textbox(setting.default_text, info=setting.type, **shared)
