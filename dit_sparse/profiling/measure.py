"""Making a profile: a few clips, every candidate on every head, a choice, a JSON file and a picture of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_sparse import Profile, Schedule, prepare
from dit_sparse.pipelines.family import family_of
from dit_sparse.profiling import search

from ..generation.generate import Progress, generate, load, usual_call
from ..output.environment import conditions
from ..output.files import atomic_write, save_picture, writable_folder
from ..plotting.masks import heat_map

ONE_FOR_ALL = (1.0,)  # the target is the density of every head
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Profiling:
    """What is searched for; everything is checked before any long work.

    Attributes:
        model: the bundled one, a local diffusers folder, or a name on the hub.
        prompts: one clip each, seeds 0, 1, ...
        candidates: names of methods, separated by commas.
        out: the JSON file; a picture of the same name stands beside it.
        target_density, max_error: one of the two, see ``search.choose``.
        spread: densities to try, as multiples of the target. None: the target alone, so that all heads have it; with
            ``max_error``, ``search.SPREAD`` around .25.
        schedule: which steps and layers stay dense.
        call: arguments of the pipeline.
    """

    model: str
    prompts: Sequence[str]
    candidates: str
    out: Path
    target_density: float | None = None
    max_error: float | None = None
    spread: Sequence[float] | None = None
    schedule: Schedule = Schedule()  # noqa: RUF009
    block: int | None = None
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to measure candidates on")
        if (self.target_density is None) == (self.max_error is None):
            raise ValueError("give a target density or a maximal error, one of the two")
        if self.target_density is not None and not 0 < self.target_density < 1:
            raise ValueError(f"the target density lies between 0 and 1, not at {self.target_density}")
        if self.max_error is not None and not self.max_error > 0:
            raise ValueError(f"the maximal error is a positive relative error, not {self.max_error}")
        if self.out.suffix != ".json":
            raise ValueError(f"--out names the profile and ends in .json, not {self.out}")
        usual = search.SPREAD if self.target_density is None else ONE_FOR_ALL
        object.__setattr__(self, "spread", tuple(self.spread or usual))
        self.tried()
        if self.target_density is not None and min(self.spread) > 1:
            raise ValueError(f"a spread of {list(self.spread)} cannot meet the target: begin with 1 or less")
        writable_folder(self.out.parent)
        object.__setattr__(self, "call", usual_call(self.model) | self.call)
        _check_steps(self.schedule, self.call)

    def tried(self) -> list[search.Candidate]:
        return search.candidates(self.candidates, self.target_density or 0.25, self.spread)

    def run(self, stage: Stage) -> Profile:
        """Measure, choose, write the JSON and the picture."""
        pipe, tried = prepare(load(self.model)), self.tried()
        seen = search.measure(pipe, lambda: self._generate(pipe, stage), tried, self.schedule, self.block)
        choice = self._choice(seen)
        used, layers = search.letters(tried, choice)
        taken = lambda table: table.gather(0, choice[None])[0]
        error = taken(seen.error).sqrt()
        profile = Profile(
            model=Path(self.model).name,
            transformer=_transformer(pipe),
            source="measured",
            schedule={name: getattr(self.schedule, name) for name in ("dense_steps", "dense_layers", "replan_interval")},
            methods={letter: {"method": one.name, "settings": _given(one)} for letter, one in used.items()},
            layers=layers,
            measured={
                "density": _short(taken(seen.density).mean()),
                "error": _short(taken(seen.error).mean().sqrt()),
                "seconds_of_dense": _short(taken(seen.seconds).sum() / seen.seconds[0].sum()),
                "grids": sorted(seen.grids),
                "steps": sorted(seen.steps),
                "prompts": list(self.prompts),
                "call": self.call,
                "block": self.block,
                "asked": {name: getattr(self, name) for name in ("target_density", "max_error", "spread")},
                "errors": [[_short(x) for x in row] for row in error],
                "candidates": [_told(*row) for row in zip(tried, seen.error, seen.density, seen.seconds, strict=True)],
                **conditions(),
            },
        )
        with atomic_write(self.out) as draft:
            draft.write_text(profile.dumps())
        density = float(taken(seen.density).mean())
        title = f"{profile.model}: relative error of every head at mean density {density:.3f}"
        legend = [f"{letter}  {one.name}, density {one.method.density or 1:.3g}" for letter, one in used.items()]
        save_picture(self.out.with_suffix(".png"), heat_map(error.clamp(max=1), title, layers, legend))
        return profile

    def _choice(self, seen: search.Measured) -> torch.Tensor:
        if self.target_density is not None and self.spread == ONE_FOR_ALL:
            return search.best(seen.error)
        return search.choose(seen.error, seen.density, self.target_density, self.max_error)

    def _generate(self, pipe: Any, stage: Stage) -> None:
        progress = stage("measuring")
        for number, prompt in enumerate(self.prompts):
            told = lambda done, steps, n=number: progress(n * steps + done, len(self.prompts) * steps)
            generate(pipe, prompt, number, self.call, told)


def drifted(profile: Profile, model: str, prompts: Sequence[str], call: dict, stage: Stage) -> tuple[float, float]:
    """The relative error that a measured profile had when it was made, and the one it has on these prompts and sizes.

    Raises:
        ValueError: the profile was not measured, or is made for another model.
    """
    before = (profile.measured or {}).get("error")
    if not isinstance(before, float):
        raise ValueError(f"the profile {profile.model} was not measured, so there is nothing to compare with")
    if not prompts:
        raise ValueError("there are no prompts to check the profile on")
    call = usual_call(model) | call
    _check_steps(profile.when(), call)
    pipe = prepare(load(model))
    if _transformer(pipe) != profile.transformer:
        raise ValueError(f"the profile is made for a {profile.transformer}, and {model} has a {_transformer(pipe)}")

    def clips() -> None:
        progress = stage("checking")
        for number, prompt in enumerate(prompts):
            told = lambda done, steps, n=number: progress(n * steps + done, len(prompts) * steps)
            generate(pipe, prompt, number, call, told)

    tried = [search.Candidate("profile", profile.mixture())]
    seen = search.measure(pipe, clips, tried, profile.when(), profile.measured.get("block"))
    return before, float(seen.error[0].mean().sqrt())


def _check_steps(schedule: Schedule, call: dict) -> None:
    if steps := call.get("num_inference_steps"):
        search.measured_steps(schedule, steps, search.STEPS_MEASURED)


def _transformer(pipe: Any) -> str:
    parts = [part for name, part in pipe.components.items() if name.startswith("transformer") and family_of(part)]
    return type(parts[0]).__name__


def _given(one: search.Candidate) -> dict:
    return {} if one.method.density is None else {"density": one.method.density}


def _told(one: search.Candidate, error: torch.Tensor, density: torch.Tensor, seconds: torch.Tensor) -> dict:
    """Mean density, root mean squared error, and milliseconds a head's call costs on this device."""
    milliseconds = _short(1000 * seconds.mean())
    error, density = _short(error.mean().sqrt()), _short(density.mean())
    return {"method": one.name, "density": density, "error": error, "milliseconds": milliseconds}


def _short(value: torch.Tensor) -> float:
    return round(float(value), 4)
