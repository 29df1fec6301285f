"""Validated requests of the Gradio page, and their Python script."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dit_sparse import SparseAttnProcessor

from ..bundled import BUNDLED, is_image_model
from ..generation.checks import check_clip
from ..generation.generate import default_call, default_fps
from ..notation.presets import DEFAULT_PRESET

MAX_SEED = 2**31 - 1
MAX_CHARACTERS = 500
MAX_STEPS = 50


@dataclass(frozen=True)
class Limits:
    """The largest clip of a request.

    Attributes:
        frames: number of frames.
        side: height and width, in pixels.
    """

    frames: int
    side: int

    @classmethod
    def for_model(cls, model: str) -> Limits:
        return cls(frames=32, side=128) if model == BUNDLED else cls(frames=129, side=1280)


@dataclass(frozen=True)
class GenerationRequest:
    """A dense and a sparse video to generate and compare. Values come from a browser and are validated.

    Attributes:
        model: the bundled model, a local diffusers folder, or a name on the hub.
        prompt, seed: prompt, and seed of the noise.
        steps: denoising steps.
        method: a preset, or text of a method, such as ``radial(sink=true)``, ``pooled(svg)`` or ``profile:NAME``.
        density: None: the preset or the settings of the method decide.
        dense_steps: fraction of the steps that stay dense; None: the preset or the profile decides, otherwise 0.25.
        executor: name of an executor, or ``"auto"``.
        frames, height, width: size of the clip; None: the default of the model.
        settings: further settings of the method.

    Raises:
        ValueError: a value is unknown or out of range.
    """

    model: str = BUNDLED
    prompt: str = ""
    seed: int = 0
    steps: int = 16
    method: str = DEFAULT_PRESET
    density: float | None = None
    dense_steps: float | None = None
    executor: str = "auto"
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_lengths(self.model, self.method, *self.settings.values())
        limits = Limits.for_model(self.model)
        if not self.prompt.strip() or len(self.prompt) > MAX_CHARACTERS:
            raise ValueError(f"the prompt must have 1 to {MAX_CHARACTERS} characters, got {len(self.prompt.strip())}")
        _check_integer("seed", self.seed, 0, MAX_SEED)
        _check_integer("the number of steps", self.steps, 2, MAX_STEPS)
        for name, maximum in (("frames", limits.frames), ("height", limits.side), ("width", limits.side)):
            if getattr(self, name) is not None:
                _check_integer(name, getattr(self, name), 1, maximum)
        is_number = isinstance(self.dense_steps, int | float) and not isinstance(self.dense_steps, bool)
        if not (self.dense_steps is None or is_number):
            raise ValueError(f"dense_steps must be a number in [0, 1], got {repr(self.dense_steps)[:40]}")
        check_clip(self.prompt, self.seed, self.call, min_steps=2, model=self.model)
        _ = self.processor

    @property
    def processor(self) -> SparseAttnProcessor:
        return SparseAttnProcessor(self.method, **self._arguments())

    @property
    def call(self) -> dict:
        """All arguments of the pipeline call except the prompt and the generator."""
        size = {"num_frames": self.frames, "height": self.height, "width": self.width}
        size = {name: value for name, value in size.items() if value is not None}
        return default_call(self.model) | {"num_inference_steps": self.steps} | size

    def _arguments(self) -> dict:
        """Return the arguments of `SparseAttnProcessor` that differ from their defaults."""
        dense_steps = None if self.dense_steps is None else float(self.dense_steps)
        arguments = {"density": self.density, "dense_steps": dense_steps}
        arguments["executor"] = None if self.executor == "auto" else self.executor
        return {name: value for name, value in arguments.items() if value is not None} | self.settings

    def snippet(self) -> str:
        """Return a Python script that generates the sparse video."""
        arguments = "".join(f", {name}={value!r}" for name, value in self._arguments().items())
        call = "".join(f"\n    {name}={value!r}," for name, value in self.call.items())
        bundled = self.model == BUNDLED
        source = "model_source(BUNDLED)" if bundled else repr(self.model)
        needs_image = is_image_model(self.model)
        names = ["BUNDLED"] * bundled + ["first_frame"] * needs_image + ["model_source"] * bundled
        sizes = {name: self.call[name] for name in ("num_frames", "height", "width") if needs_image}
        image = f"\n    image=first_frame({self.prompt!r}, {self.seed}, {sizes})," if needs_image else ""
        precision = "" if bundled else ", dtype=torch.bfloat16"
        return (
            "import torch\nfrom diffusers import DiffusionPipeline\nfrom diffusers.utils import export_to_video\n\n"
            "import dit_sparse as ds\n"
            + (f"from dit_sparse.bundled import {', '.join(names)}\n" if names else "")
            + f"\npipe = DiffusionPipeline.from_pretrained({source}{precision})\n"
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
            f"run = ds.enable(pipe, {self.method!r}{arguments})\n"
            f"frames = pipe(\n    prompt={self.prompt!r},{image}{call}\n"
            f"    generator=torch.Generator().manual_seed({self.seed}),\n).frames[0]\n"
            f'export_to_video(frames, "video.mp4", fps={default_fps(self.model)})\n'
            "print(run.report())\n"
        )


def check_lengths(*values: Any) -> None:
    """Raise ValueError if a text has more than `MAX_CHARACTERS` characters. Checked before a text is parsed."""
    for value in values:
        if isinstance(value, str) and len(value) > MAX_CHARACTERS:
            raise ValueError(f"a text must have at most {MAX_CHARACTERS} characters, got {len(value)}")


def _check_integer(name: str, value: Any, minimum: int, maximum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
        raise ValueError(f"{name} must be a whole number in [{minimum}, {maximum}], got {repr(value)[:40]}")
