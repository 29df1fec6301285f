"""What a page may ask for: one comparison, checked on the side of the server, and the devices that make it."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, fields
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch

from dit_sparse import METHODS, SparseAttnProcessor

from ..bundled import BUNDLED
from ..generation.generate import Progress, load, usual_call, usual_fps
from .demo import Demo, Stage

MAX_SEED = 2**31 - 1
MAX_CHARACTERS = 500
MAX_STEPS = 50


@dataclass(frozen=True)
class Limits:
    """The largest clip that a page may ask for: frames, and pixels along either side."""

    frames: int
    side: int

    @classmethod
    def for_model(cls, model: str) -> Limits:
        return cls(frames=32, side=128) if model == BUNDLED else cls(frames=129, side=1280)


class Cancelled(Exception):
    """Somebody asked to stop, and the current step has ended."""


@dataclass(frozen=True)
class GenerationRequest:
    """One comparison of dense and sparse attention, as plain values that come from outside.

    Attributes:
        model, prompt, seed, steps: what to draw, with what.
        method: a name that `dit_sparse.methods.method` knows; ``options`` are settings of its own.
        density: None: the options decide.
        dense_steps: fraction of the steps that stay dense.
        frames, height, width: None: what the model usually makes.

    Raises:
        ValueError: anything unknown or out of range, in one sentence.
    """

    model: str = BUNDLED
    prompt: str = ""
    seed: int = 0
    steps: int = 16
    method: str = "radial"
    density: float | None = 0.25
    dense_steps: float = 0.25
    frames: int | None = None
    height: int | None = None
    width: int | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        limits = Limits.for_model(self.model)
        if not self.prompt.strip() or len(self.prompt) > MAX_CHARACTERS:
            raise ValueError(f"a prompt has 1 to {MAX_CHARACTERS} characters")
        _whole("seed", self.seed, 0, MAX_SEED)
        _whole("the number of steps", self.steps, 2, MAX_STEPS)
        for name, most in (("frames", limits.frames), ("height", limits.side), ("width", limits.side)):
            if getattr(self, name) is not None:
                _whole(name, getattr(self, name), 1, most)
        try:
            _ = self.processor
        except TypeError as error:
            raise ValueError(f"{self.method} cannot have these settings: {error}") from None

    @property
    def processor(self) -> SparseAttnProcessor:
        return SparseAttnProcessor(
            self.method, density=self.density, dense_steps=float(self.dense_steps), **self.options
        )

    @property
    def call(self) -> dict:
        """All arguments of the pipeline but the prompt and the generator."""
        asked = {"num_inference_steps": self.steps, "num_frames": self.frames}
        asked |= {"height": self.height, "width": self.width}
        return usual_call(self.model) | {name: value for name, value in asked.items() if value is not None}

    def snippet(self) -> str:
        """A Python script that makes the sparse video."""
        settings = {"density": self.density, "dense_steps": float(self.dense_steps)} | self.options
        told = "".join(f", {name}={value!r}" for name, value in settings.items() if value is not None)
        call = "".join(f"\n    {name}={value!r}," for name, value in self.call.items())
        bundled = self.model == BUNDLED
        source = 'str(files("dit_sparse") / "assets" / "shapes-wan")' if bundled else repr(self.model)
        precision = "" if bundled else ", dtype=torch.bfloat16"
        return (
            ("from importlib.resources import files\n\n" if bundled else "")
            + "import torch\nfrom diffusers import DiffusionPipeline\nfrom diffusers.utils import export_to_video\n\n"
            "import dit_sparse as ds\n\n"
            f"pipe = DiffusionPipeline.from_pretrained({source}{precision})\n"
            'pipe.to("cuda" if torch.cuda.is_available() else "cpu")\n'
            f"run = ds.enable(pipe, {self.method!r}{told})\n"
            f"frames = pipe(\n    {self.prompt!r},{call}\n"
            f"    generator=torch.Generator().manual_seed({self.seed}),\n).frames[0]\n"
            f'export_to_video(frames, "video.mp4", fps={usual_fps(self.model)})\n'
            "print(run.report())\n"
        )


@dataclass(frozen=True)
class Option:
    """A setting of a method: its name, the type as it is written down, and the usual value."""

    name: str
    type: str
    value: Any

    def read(self, given: Any) -> Any:
        """The value that a form gave; text is read as one of Python's plain values.

        Raises:
            ValueError: it is none.
        """
        if self.type == "bool":
            return bool(given)
        if given is None or (isinstance(given, str) and not given.strip()):
            return None
        try:
            value = ast.literal_eval(given) if isinstance(given, str) else given
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            raise ValueError(f"{self.name} is {self.type}, such as {self.value!r}, not {str(given)[:60]!r}") from None
        return int(value) if self.type == "int" and isinstance(value, float) and value.is_integer() else value


def options_of(name: str) -> list[Option]:
    """What can be set of a method, in its own order; of ``a|b`` and ``outer(inner)`` those of the first. Densities and
    budgets are set by the page's density, a method inside another one by its name."""
    cls = METHODS.get(re.split(r"[(|]", name)[0].strip())
    written = ((f.name, str(f.type), f.default) for f in fields(cls)) if cls else ()
    return [Option(*one) for one in written if one[0] != "density" and not re.search("Budget|Method", one[1])]


def options_from(name: str, given: dict[str, Any]) -> dict[str, Any]:
    """The settings that a form changed; those left as they were are left out."""
    read = {
        option.name: (option, option.read(given[option.name])) for option in options_of(name) if option.name in given
    }
    return {key: value for key, (option, value) in read.items() if value != option.value}


class DevicePool:
    """Devices with a model each; whoever asks gets the next that is free."""

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        self.devices = list(devices or cuda or ["cpu"])
        self._free: SimpleQueue[str] = SimpleQueue()
        self._loaded: dict[str, tuple[str, Any]] = {}
        for device in self.devices:
            self._free.put(device)

    def run(self, wish: GenerationRequest, out: Path, stage: Stage, cancel: Event) -> dict:
        """Videos, pictures and ``result.json`` in ``out``; returns the result.

        Raises:
            ValueError: the model cannot be loaded or made sparse, or there is too little memory.
            Cancelled: after ``cancel`` was set, at the end of a step.
        """
        demo = Demo(wish.prompt, wish.processor, out, wish.seed, wish.call, wish.model)
        with self._device() as device:
            if cancel.is_set():
                raise Cancelled
            try:
                return demo.run(lambda name: _watched(stage(name), cancel), self._pipe(wish.model, device))
            except torch.OutOfMemoryError:
                raise ValueError("out of memory: fewer frames or a smaller size may fit") from None

    @contextmanager
    def _device(self) -> Iterator[str]:
        device = self._free.get()
        try:
            with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
                yield device
        finally:
            self._free.put(device)

    def _pipe(self, model: str, device: str) -> Any:
        name, pipe = self._loaded.get(device, ("", None))
        if name != model:
            self._loaded.pop(device, None)
            pipe = None  # the old model goes before the new one comes
            pipe = load(model, device)
            self._loaded[device] = (model, pipe)
        return pipe


def _watched(progress: Progress, cancel: Event) -> Progress:
    def step_ended(done: int, steps: int) -> None:
        progress(done, steps)
        if cancel.is_set():
            raise Cancelled

    return step_ended


def _whole(name: str, value: Any, least: int, most: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise ValueError(f"{name} is a whole number from {least} to {most}, not {value!r}")
