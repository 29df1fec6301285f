"""Methods side by side: the same prompts and seeds, dense and with each method, at one density."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any

from torch import Tensor

from dit_sparse import METHODS, Schedule, Site, SparseAttnProcessor, prepare, search
from dit_sparse.composition import inside
from dit_sparse.methods.dense import Dense
from dit_sparse.methods.rettention import Rettention
from dit_sparse.report import Report

from .environment import conditions
from .files import save_json, writable_folder
from .generate import BUNDLED, BUNDLED_CALL, Clip, Progress, generate, load
from .metrics import psnr, ssim
from .retained import retained_mass

ALWAYS = ("dense", "random_blocks")  # the ceiling and the floor of every comparison
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Comparison:
    """What is compared; everything is checked before any long work.

    Attributes:
        methods: names of ``dit-sparse methods``, compositions such as ``radial|sink``, or ``profile:NAME``.
        prompts: one clip each and method, seeds 0, 1, ...
        density, schedule, executor, block: the same for all. A profile has a density of its own.
        out: folder for ``compare.json``.
        model, call: the pipeline, and the arguments of its call.
    """

    methods: Sequence[str]
    prompts: Sequence[str]
    density: float
    out: Path
    schedule: Schedule = Schedule()  # noqa: RUF009
    executor: str = "auto"
    block: int | None = None
    model: str = BUNDLED
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to compare methods on")
        names = [name for given in self.methods for name in (METHODS if given == "all" else (given,))]
        object.__setattr__(self, "methods", list(dict.fromkeys([*ALWAYS, *names])))
        object.__setattr__(self, "call", (BUNDLED_CALL if self.model == BUNDLED else {}) | self.call)
        for name in self.methods:
            self.processor(name)
        writable_folder(self.out)

    def processor(self, name: str) -> SparseAttnProcessor:
        """Nothing stays dense for its length: methods are compared, not whether they pay."""
        given = {"schedule": self.schedule, "executor": self.executor, "block": self.block, "min_tokens": 0}
        if name.startswith("profile:"):
            return SparseAttnProcessor.from_profile(name.removeprefix("profile:"), **given)
        return SparseAttnProcessor(name, density=self.density, **given)

    def run(self, stage: Stage) -> dict:
        """One row a method, written to ``compare.json`` after each of them; returns what was written."""
        pipe = prepare(load(self.model))
        errors = self._errors(pipe, stage("errors"))
        truth, rows = [], []
        result = {"model": self.model, "prompts": list(self.prompts), "density": self.density, "rows": rows}
        result |= {"grids": [], "schedule": asdict(self.schedule), "call": self.call} | conditions()
        for name in self.methods:
            clips, report, seen = self._clips(pipe, name, stage(name))
            truth = truth or clips
            result["grids"] = report.grids or result["grids"]
            rows.append(_row(name, errors.get(name), clips, truth, report, seen))
            save_json(self.out / "compare.json", result)
        return result

    def _errors(self, pipe: Any, progress: Progress) -> dict[str, float]:
        """Relative error of the attention output, by the calls of a dense clip: what no later step can blur. A method
        that lives on what it saw of dense steps is not judged so."""
        judged = {name: self.processor(name).settings.method for name in self.methods}
        lives_on_steps = lambda one: any(isinstance(part, Dense | Rettention) for part in inside(one))
        judged = {name: one for name, one in judged.items() if not lives_on_steps(one)}
        tried = [search.Candidate(name, one) for name, one in judged.items()]
        clip = lambda: generate(pipe, self.prompts[0], 0, self.call, progress)
        seen = search.measure(pipe, clip, tried, self.schedule, self.block)
        return dict(zip(judged, seen.error.mean((1, 2)).sqrt().tolist(), strict=True))

    def _clips(self, pipe: Any, name: str, progress: Progress) -> tuple[list[Clip], Report, _Seen]:
        pipe.set_attn_processor(self.processor(name))
        seen, clips = _Seen(), []
        pipe.sparse_run.observe(seen)
        try:
            for number, prompt in enumerate(self.prompts):
                told = lambda done, steps, n=number: progress(n * steps + done, len(self.prompts) * steps)
                clips.append(generate(pipe, prompt, number, self.call, told))
            return clips, pipe.sparse_run.report(), seen
        finally:
            pipe.set_attn_processor(None)


class _Seen:
    """Observes a run: the attention retained, at one call in eight of every layer."""

    def __init__(self) -> None:
        self.calls, self.mass = {}, []

    def __call__(self, site: Site, q: Tensor, k: Tensor, plan: Any) -> None:
        number = self.calls[site.layer] = self.calls.get(site.layer, -1) + 1
        if number % 8 == 0:
            self.mass.append(float(retained_mass(q, k, plan, rows=64).mean()))


def _row(name: str, error: float | None, clips: list[Clip], truth: list[Clip], report: Report, seen: _Seen) -> dict:
    pairs = list(zip(clips, truth, strict=True))
    each = [psnr(clip.frames, dense.frames) for clip, dense in pairs] if clips is not truth else []
    return {
        "method": name,
        "settings": report.settings,
        "density_achieved": report.density_achieved,
        "density_run": report.density_run,
        "error": error,
        "retained": fmean(seen.mass) if seen.mass else None,
        "psnr": fmean(each) if each else None,
        "psnr_each": each,
        "ssim": fmean(ssim(clip.frames, dense.frames) for clip, dense in pairs),
        "seconds": sum(clip.seconds for clip in clips),
        "attention_seconds": report.attention_seconds,
        "planning_share": report.planning_seconds / max(report.attention_seconds, 1e-9),
        "executors": report.executors,
    }
