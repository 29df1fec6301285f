"""Dense and sparse side by side, from one seed, on one machine: the claim of this library, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from dit_sparse import Grid, Plan, Site, SparseAttnProcessor, attention, prepare
from dit_sparse.engine.report import Report

from ..bundled import BUNDLED
from ..eval.analysis.retained_mass import at_step
from ..eval.quality.fidelity import psnr, ssim
from ..generation.generate import Progress, generate, load, usual_call, usual_fps
from ..output.environment import conditions
from ..output.files import save_figure, save_json, writable_folder
from ..output.media import difference, save_video, side_by_side
from ..plotting.charts import plot_attention_time, plot_heat_map
from ..plotting.masks import plot_plan

Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Demo:
    """What the demo is to do; everything is checked before any long work.

    Attributes:
        prompt, seed: of both videos.
        processor: method, density and schedule of the sparse one.
        out: folder for the videos, the pictures and ``result.json``.
        call: arguments of the pipeline, beside the usual ones of the model.
        model: the bundled one, a local diffusers folder, or a name on the hub.

    Raises:
        ValueError: fewer than 2 steps or an unknown number of them, or an ``out`` that cannot be written.
    """

    prompt: str
    processor: SparseAttnProcessor
    out: Path
    seed: int = 0
    call: dict = field(default_factory=dict)
    model: str = BUNDLED

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", usual_call(self.model) | self.call)
        if self.steps < 2:
            raise ValueError(f"the demo needs at least 2 steps, not {self.steps}")
        writable_folder(self.out)

    @property
    def steps(self) -> int:
        return self.call.get("num_inference_steps", 0)

    def run(self, stage: Stage, pipe: Any = None) -> dict:
        """The videos, pictures and ``result.json``; returns the result. ``stage(name)`` begins a progress bar; ``pipe``
        is the model where it is loaded already."""
        pipe = prepare(pipe or load(self.model))
        _warm_up(self.processor)
        dense = self._made(pipe, SparseAttnProcessor("dense"), stage("dense"))
        seen = _Seen(step=self.steps // 2)
        sparse = self._made(pipe, self.processor, stage("sparse"), seen)
        result = self._result(dense, sparse)
        self._save(dense, sparse, seen, result)
        return result

    def _made(self, pipe: Any, processor: SparseAttnProcessor, progress: Progress, seen: _Seen | None = None) -> _Made:
        pipe.set_attn_processor(processor)
        run, spent = pipe.sparse_run, [0.0]
        if seen is not None:
            run.observe(seen)

        def step_ended(done: int, steps: int) -> None:
            spent.append(run.report().attention_seconds)
            progress(done, steps)

        try:
            clip = generate(pipe, self.prompt, self.seed, self.call, step_ended)
            by_step = [after - before for before, after in pairwise(spent)]
            return _Made(clip.frames, clip.seconds, run.report(), by_step)
        finally:
            pipe.set_attn_processor(None)

    def _result(self, dense: _Made, sparse: _Made) -> dict:
        report = sparse.report
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "method": report.method,
            "settings": report.settings,
            "density_asked": report.density_asked,
            "density_achieved": report.density_achieved,
            "density_run": report.density_run,
            "seconds_dense": dense.seconds,
            "seconds_sparse": sparse.seconds,
            "speedup": dense.seconds / sparse.seconds,
            "attention_seconds_dense": dense.report.attention_seconds,
            "attention_seconds_sparse": report.attention_seconds,
            "attention_speedup": dense.report.attention_seconds / report.attention_seconds,
            "attention_by_step_dense": dense.by_step,
            "attention_by_step_sparse": sparse.by_step,
            "psnr": psnr(sparse.frames, dense.frames),
            "ssim": ssim(sparse.frames, dense.frames),
            "executor": ", ".join(report.executors) or "dense",
            "dense_calls": report.dense_calls,
            "grid": ", ".join(report.grids),
            "steps": self.steps,
            "dense_steps": self.processor.settings.schedule.first_sparse_step(self.steps),
            **conditions(),
        }

    def _save(self, dense: _Made, sparse: _Made, seen: _Seen, result: dict) -> None:
        labels = (
            f"dense  {dense.seconds:.1f} s",
            f"{result['method']}  {sparse.seconds:.1f} s  ({result['speedup']:.2f}x, PSNR {result['psnr']:.1f} dB)",
        )
        videos = {
            "dense": dense.frames,
            "sparse": sparse.frames,
            "difference": difference(dense.frames, sparse.frames),
            "side-by-side": side_by_side(dense.frames, sparse.frames, labels),
        }
        for name, frames in videos.items():
            save_video(self.out / f"{name}.mp4", frames, usual_fps(self.model))
        figure = plot_attention_time(dense.by_step, sparse.by_step, result["method"])
        save_figure(self.out / "attention.png", figure)
        if seen.plan is not None:
            mass = torch.stack([seen.mass[layer] for layer in sorted(seen.mass)])
            title = f"Attention retained by {result['method']}, step {seen.step}: mean {mass.mean():.3f}"
            save_figure(self.out / "mask.png", plot_plan(seen.plan, seen.grid, result["method"]))
            save_figure(self.out / "retained.png", plot_heat_map(mass, title))
        save_json(self.out / "result.json", result)


@dataclass(frozen=True)
class _Made:
    """One of the two clips: frames ``[F, H, W, 3]`` uint8, what the run reported, seconds of attention by step."""

    frames: NDArray
    seconds: float
    report: Report
    by_step: list[float]


class _Seen:
    """Observes a run: the first plan, and the attention mass retained at one step."""

    def __init__(self, step: int) -> None:
        self.step, self.mass = step, {}
        self.plan: Plan | None = None
        self.grid: Grid | None = None
        self._note_mass = at_step(step, self.mass)

    def __call__(self, site: Site, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> None:
        if self.plan is None:
            self.plan, self.grid = plan.to("cpu"), site.grid
        self._note_mass(site, q, k, plan)


def _warm_up(processor: SparseAttnProcessor) -> None:
    """One small call, so that compiling an executor is not counted as attention."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 1, 3, 4 * 20 * 20, 64, device=device).unbind(0)
    attention(q, k, v, grid=Grid(4, 20, 20), method="random_blocks", executor=processor.settings.executor)
