"""One video generated densely and sparsely from the same seed: times, fidelity, videos and plots."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray

from dit_sparse import Grid, Plan, Schedule, Site, SparseAttnProcessor, attention, prepare
from dit_sparse.engine.report import Report

from ..bundled import BUNDLED
from ..eval.analysis.retained_mass import at_step
from ..eval.quality.fidelity import psnr, ssim
from ..generation.checks import check_clip
from ..generation.generate import Progress, Stage, default_call, default_fps, generate, load_pipeline
from ..output.environment import conditions
from ..output.files import save_figure, save_json, writable_folder
from ..output.media import difference, save_video, side_by_side
from ..plotting.masks import plot_plan
from ..plotting.plots import plot_attention_time, plot_heat_map

FILES = [f"{name}.mp4" for name in ("dense", "sparse", "difference", "side-by-side")]
FILES += ["attention.png", "mask.png", "retained.png", "result.json"]


@dataclass(frozen=True)
class Demo:
    """Settings of a demo. All arguments are checked before any long work.

    Attributes:
        prompt, seed: of both videos.
        processor: the sparse attention of the sparse video.
        out: folder for the videos, the plots and ``result.json``.
        call: arguments of the pipeline call that replace the default ones of the model.
        model: the bundled model, a local diffusers folder, or a name on the hub.

    Raises:
        ValueError: the number of steps is unknown or below 2, or ``out`` is not writable.
    """

    prompt: str
    processor: SparseAttnProcessor
    out: Path
    seed: int = 0
    call: dict = field(default_factory=dict)
    model: str = BUNDLED

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", default_call(self.model) | self.call)
        if self.steps < 2:
            raise ValueError(f"the demo needs at least 2 steps, got {self.steps}")
        check_clip(self.prompt, self.seed, self.call, model=self.model)
        writable_folder(self.out, FILES)

    @property
    def steps(self) -> int:
        return self.call.get("num_inference_steps", 0)

    def run(self, stage: Stage, pipe: Any = None) -> dict:
        """Generate both videos, write videos, plots and ``result.json``, and return the result.

        Args:
            stage: ``stage(name)`` starts a progress bar.
            pipe: the loaded model; None: load it.
        """
        pipe = prepare(pipe or load_pipeline(self.model))
        compile_kernels(self.processor)
        dense = self._generate(pipe, SparseAttnProcessor("dense"), stage("dense"))
        observer = _PlanObserver(step=self.steps // 2)
        sparse = self._generate(pipe, self.processor, stage("sparse"), observer)
        result = self._result(dense, sparse)
        self._save(dense, sparse, observer, result)
        return result

    def _generate(
        self, pipe: Any, processor: SparseAttnProcessor, progress: Progress, observer: _PlanObserver | None = None
    ) -> _TimedClip:
        pipe.set_attn_processor(processor)
        run, attention_seconds = pipe.sparse_run, [0.0]
        if observer is not None:
            run.observe(observer)

        def on_step(done: int, steps: int) -> None:
            attention_seconds.append(run.report().attention_seconds)
            progress(done, steps)

        try:
            clip = generate(pipe, self.prompt, self.seed, self.call, on_step)
            by_step = [after - before for before, after in pairwise(attention_seconds)]
            return _TimedClip(clip.frames, clip.seconds, run.report(), by_step)
        finally:
            pipe.set_attn_processor(None)

    def _result(self, dense: _TimedClip, sparse: _TimedClip) -> dict:
        report = sparse.report
        return {
            "model": self.model,
            "prompt": self.prompt,
            "seed": self.seed,
            "preset": report.preset,
            "method": report.method,
            "settings": report.settings,
            **densities_and_times(dense, sparse),
            "attention_by_step_dense": dense.by_step,
            "attention_by_step_sparse": sparse.by_step,
            "psnr": psnr(sparse.frames, dense.frames),
            "ssim": ssim(sparse.frames, dense.frames),
            "executor": ", ".join(report.executors) or "dense",
            "dense_calls": report.dense_calls,
            "grid": ", ".join(report.grids),
            "steps": self.steps,
            "dense_steps": Schedule(**report.schedule).first_sparse_step(self.steps),
            **conditions(),
        }

    def _save(self, dense: _TimedClip, sparse: _TimedClip, observer: _PlanObserver, result: dict) -> None:
        method = result["method"]
        labels = (
            f"dense  {dense.seconds:.1f} s",
            f"{method}  {sparse.seconds:.1f} s  ({result['speedup']:.2f}x, PSNR {result['psnr']:.1f} dB)",
        )
        videos = {
            "dense": dense.frames,
            "sparse": sparse.frames,
            "difference": difference(dense.frames, sparse.frames),
            "side-by-side": side_by_side(dense.frames, sparse.frames, labels),
        }
        for name, frames in videos.items():
            save_video(self.out / f"{name}.mp4", frames, default_fps(self.model))
        save_figure(self.out / "attention.png", plot_attention_time(dense.by_step, sparse.by_step, method))
        if observer.plan is not None:
            mass = torch.stack([observer.mass[layer] for layer in sorted(observer.mass)])
            title = f"Attention mass retained by {method}, step {observer.step}: mean {mass.mean():.3f}"
            save_figure(self.out / "mask.png", plot_plan(observer.plan, observer.grid, method))
            save_figure(self.out / "retained.png", plot_heat_map(mass, title))
        save_json(self.out / "result.json", result)


def densities_and_times(dense: Any, sparse: Any) -> dict:
    """Return the densities of a sparse run, and the times of both runs with their ratios.

    Args:
        dense, sparse: have ``seconds`` and ``report``.
    """
    report = sparse.report
    return {
        "density_asked": report.density_asked,
        "density_achieved": report.density_achieved,
        "density_run": report.density_run,
        "seconds_dense": dense.seconds,
        "seconds_sparse": sparse.seconds,
        "speedup": ratio(dense.seconds, sparse.seconds),
        "attention_seconds_dense": dense.report.attention_seconds,
        "attention_seconds_sparse": report.attention_seconds,
        "attention_speedup": ratio(dense.report.attention_seconds, report.attention_seconds),
    }


def ratio(dense: float, sparse: float) -> float:
    """Return dense / sparse, or NaN if ``sparse`` is 0."""
    return dense / sparse if sparse else math.nan


@dataclass(frozen=True)
class _TimedClip:
    """A clip and its attention time.

    Attributes:
        frames: ``[F, H, W, 3]``, uint8.
        seconds: denoising time.
        report: report of the run.
        by_step: attention time of every step, in seconds.
    """

    frames: NDArray
    seconds: float
    report: Report
    by_step: list[float]


class _PlanObserver:
    """Observer of a run that keeps the first plan, and the attention mass retained at one step."""

    def __init__(self, step: int) -> None:
        self.step, self.mass = step, {}
        self.plan: Plan | None = None
        self.grid: Grid | None = None
        self._observe_mass = at_step(step, self.mass)

    def __call__(self, site: Site, q: torch.Tensor, k: torch.Tensor, plan: Plan) -> None:
        if self.plan is None:
            self.plan, self.grid = plan.to("cpu"), site.grid
        self._observe_mass(site, q, k, plan)


def compile_kernels(processor: SparseAttnProcessor) -> None:
    """Run small calls of the method and of a dense step, so that compiling their kernels and measuring their cost are
    not counted as attention time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    q, k, v = torch.randn(3, 1, 3, 4 * 20 * 20, 64, device=device).unbind(0)
    for method in ("random_blocks", processor.settings.method):
        attention(q, k, v, grid=Grid(4, 20, 20), method=method, executor=processor.settings.executor)
