"""The search for a head profile: generate clips, measure candidates, choose, and write the profile and its heat map."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any

import torch

from dit_sparse import Schedule, prepare
from dit_sparse.pipelines.family import family_of

from ..generation.checks import check_clip
from ..generation.generate import Progress, default_call, generate, load_pipeline
from ..notation.reading import shorten_path
from ..output.environment import conditions
from ..output.files import atomic_write, save_figure, writable_file
from ..plotting.plots import plot_heat_map
from .candidates import SPREAD, Candidate, have_one_density, parse_candidates
from .choice import assign_letters, choose, choose_least_error, select
from .head_profile import Profile
from .probe import STEPS_MEASURED, Measurements, measure_candidates, measured_steps

ONE_DENSITY = (1.0,)  # the spread with which all heads have the target density
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class ProfileSearch:
    """A search for a head profile. All arguments are checked before any long work.

    Attributes:
        model: the bundled model, a local diffusers folder, or a name on the Hugging Face hub.
        prompts: a clip is generated from each, with seeds 0, 1, ...
        candidates: names of methods, separated by commas.
        out: the JSON file to write. The heat map is written next to it as PNG.
        target_density: limit of the mean density; exclusive with ``max_error``.
        max_error: limit of the root mean squared relative error; exclusive with ``target_density``.
        spread: densities to try, as multiples of the target. Default: the target alone, so that all heads have it; with
            ``max_error``, ``SPREAD`` times 0.25.
        schedule: steps and layers that stay dense.
        block: tokens in a block.
        call: arguments of the pipeline call.
        lengths: numbers of frames to measure at, so that a profile of `MoA` spans serves other lengths; the density is
            limited at each of them. Empty: the frames of ``call``.

    Raises:
        ValueError: an argument is unknown or out of range.
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
    lengths: Sequence[int] = ()

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("a profile search needs at least one prompt")
        if (self.target_density is None) == (self.max_error is None):
            raise ValueError("give either a target density or a maximum error")
        if self.target_density is not None and not 0 < self.target_density < 1:
            raise ValueError(f"the target density must be in (0, 1), got {self.target_density}")
        if self.max_error is not None and not 0 < self.max_error < float("inf"):
            raise ValueError(f"the maximum error must be positive and finite, got {self.max_error}")
        if self.out.suffix != ".json":
            raise ValueError(f"--out must end in .json, got {shorten_path(self.out)}")
        default_spread = SPREAD if self.target_density is None else ONE_DENSITY
        object.__setattr__(self, "spread", tuple(self.spread or default_spread))
        self._parse_candidates()
        if self.target_density is not None and min(self.spread) > 1:
            raise ValueError(f"the spread {list(self.spread)} cannot meet the target: start it at 1 or below")
        object.__setattr__(self, "call", default_call(self.model) | self.call)
        for prompt, (_, call) in product(self.prompts, self._calls()):
            check_clip(prompt, 0, call, model=self.model)
        _check_steps(self.schedule, self.call)
        for file in (self.out, self.out.with_suffix(".png")):
            writable_file(file)

    def run(self, stage: Stage) -> Profile:
        """Measure the candidates, choose one for every head, and write the profile and its heat map.

        Args:
            stage: returns a progress callback for a named stage.
        """
        pipe, candidates = prepare(load_pipeline(self.model)), self._parse_candidates()
        by_length = [self._measure(pipe, candidates, call, stage(name)) for name, call in self._calls()]
        measurements = Measurements.mean(by_length)
        choice = self._choose(candidates, measurements.error, torch.stack([one.density for one in by_length]))
        by_letter, layers = assign_letters(candidates, choice)
        names = ("dense_steps", "dense_layers", "replan_interval", "density_ramp")
        schedule = {name: value for name in names if (value := getattr(self.schedule, name)) is not None}
        profile = Profile(
            model=Path(self.model).name,
            transformer=_transformer_class(pipe),
            source="measured",
            schedule=schedule,
            methods={letter: {"method": c.name, "settings": c.settings} for letter, c in by_letter.items()},
            layers=layers,
            measured=self._results(candidates, measurements, choice, by_length) | conditions(),
        )
        with atomic_write(self.out) as file:
            file.write_text(profile.dumps())
        self._plot(profile, by_letter, select(measurements.error, choice).sqrt())
        return profile

    def _parse_candidates(self) -> list[Candidate]:
        return parse_candidates(self.candidates, self.target_density or 0.25, self.spread)

    def _calls(self) -> list[tuple[str, dict]]:
        """Return a name of the stage and the arguments of the pipeline for every length."""
        calls = [(f"measuring {frames} frames", self.call | {"num_frames": frames}) for frames in self.lengths]
        return calls or [("measuring", self.call)]

    def _measure(self, pipe: Any, candidates: Sequence[Candidate], call: dict, progress: Progress) -> Measurements:
        generate_clips = lambda: _generate_clips(pipe, self.prompts, call, progress)
        return measure_candidates(pipe, generate_clips, candidates, self.schedule, self.block)

    def _choose(self, candidates: Sequence[Candidate], error: torch.Tensor, density: torch.Tensor) -> torch.Tensor:
        """Return the candidate of every head, from the densities ``[lengths, candidates, L, H]``."""
        if self.target_density is not None and have_one_density(candidates):
            return choose_least_error(error)
        return choose(error, density, self.target_density, self.max_error)

    def _results(
        self,
        candidates: Sequence[Candidate],
        measurements: Measurements,
        choice: torch.Tensor,
        by_length: Sequence[Measurements],
    ) -> dict:
        """Return results and arguments of the search for the profile."""
        error, density, seconds = measurements.error, measurements.density, measurements.seconds
        return {
            "density": _round(select(density, choice).mean()),
            "densities": [_round(select(one.density, choice).mean()) for one in by_length],
            "error": _round(select(error, choice).mean().sqrt()),
            "seconds_of_dense": _round(select(seconds, choice).sum() / seconds[0].sum()),
            "grids": sorted(measurements.grids),
            "steps": sorted(measurements.steps),
            "prompts": list(self.prompts),
            "call": self.call,
            "lengths": list(self.lengths),
            "block": self.block,
            "search": {name: getattr(self, name) for name in ("target_density", "max_error", "spread")},
            "errors": [[_round(value) for value in layer] for layer in select(error, choice).sqrt()],
            "candidates": [
                {
                    "method": candidate.name,
                    "density": _round(density[i].mean()),
                    "error": _round(error[i].mean().sqrt()),
                    "milliseconds": _round(1000 * seconds[i].mean()),
                }
                for i, candidate in enumerate(candidates)
            ],
        }

    def _plot(self, profile: Profile, by_letter: dict[str, Candidate], error: torch.Tensor) -> None:
        """Write the heat map of the relative errors ``[L, H]`` next to the profile."""
        density = profile.measured["density"]
        title = f"{profile.model}: relative error of every head at mean density {density:.3f}"
        suffix = lambda method: f", density {method.density:.3g}" if method.density else ""
        legend = [f"{letter}  {c.name}{suffix(c.method)}" for letter, c in by_letter.items()]
        figure = plot_heat_map(error.clamp(max=1), title, profile.layers, legend)
        save_figure(self.out.with_suffix(".png"), figure)


def compare_with_stored_error(
    profile: Profile, model: str, prompts: Sequence[str], call: dict, stage: Stage
) -> tuple[float, float]:
    """Return the relative error stored in a profile, and its error on other prompts or sizes.

    Args:
        profile: a measured profile.
        model, prompts, call: as for :class:`ProfileSearch`.
        stage: returns a progress callback for a named stage.

    Raises:
        ValueError: the profile was not measured, or is for another model.
    """
    stored_error = (profile.measured or {}).get("error")
    if not isinstance(stored_error, float):
        raise ValueError(f"the profile {profile.model} was not measured, so there is no error to compare with")
    if not prompts:
        raise ValueError("checking a profile needs at least one prompt")
    call = default_call(model) | call
    _check_steps(profile.to_schedule(), call)
    pipe = prepare(load_pipeline(model))
    if _transformer_class(pipe) != profile.transformer:
        raise ValueError(f"the profile is for a {profile.transformer}, but {model} has a {_transformer_class(pipe)}")
    progress = stage("checking")
    generate_clips = lambda: _generate_clips(pipe, prompts, call, progress)
    candidates = [Candidate("profile", profile.to_method())]
    block = profile.measured.get("block")
    measurements = measure_candidates(pipe, generate_clips, candidates, profile.to_schedule(), block)
    return stored_error, float(measurements.error[0].mean().sqrt())


def _generate_clips(pipe: Any, prompts: Sequence[str], call: dict, progress: Progress) -> None:
    """Generate a clip from each prompt and report the steps of all of them."""
    for seed, prompt in enumerate(prompts):
        on_step = lambda step, steps, seed=seed: progress(seed * steps + step, len(prompts) * steps)
        generate(pipe, prompt, seed, call, on_step)


def _check_steps(schedule: Schedule, call: dict) -> None:
    """Raise ValueError if a schedule keeps all steps of a call dense."""
    if steps := call.get("num_inference_steps"):
        measured_steps(schedule, steps, STEPS_MEASURED)


def _transformer_class(pipe: Any) -> str:
    """Return the class name of the first transformer of a pipeline."""
    components = pipe.components.items()
    return next(type(part).__name__ for name, part in components if name.startswith("transformer") and family_of(part))


def _round(value: torch.Tensor) -> float:
    return round(float(value), 4)
