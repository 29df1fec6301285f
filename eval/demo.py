"""Dense and sparse side by side, from one seed, on one machine: the claim of this library, measured."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from dit_sparse import Grid, Plan, Site, SparseAttnProcessor, attention, prepare
from dit_sparse.report import Report

from .environment import conditions
from .files import save_json, save_picture, save_video, writable_folder
from .generate import BUNDLED, BUNDLED_CALL, BUNDLED_FPS, Clip, Progress, generate, load
from .metrics import psnr, ssim
from .pictures import heat_map, mask_picture, side_by_side
from .retained import at_step

Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Demo:
    """What the demo is to do; everything is checked before any long work.

    Attributes:
        prompt, seed: of both videos.
        processor: method, density and schedule of the sparse one.
        out: folder for the videos, the pictures and ``result.json``.
        call: arguments of the pipeline, to be added to ``BUNDLED_CALL``.
    """

    prompt: str
    processor: SparseAttnProcessor
    out: Path
    seed: int = 0
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", BUNDLED_CALL | self.call)
        if self.steps < 2:
            raise ValueError(f"the demo needs at least 2 steps, not {self.steps}")
        writable_folder(self.out)

    @property
    def steps(self) -> int:
        return self.call["num_inference_steps"]

    def run(self, stage: Stage) -> dict:
        """The videos, pictures and ``result.json``; returns the result. ``stage(name)`` begins a progress bar."""
        pipe = prepare(load(BUNDLED))
        _warm_up(self.processor)
        dense, dense_report = self._clip(pipe, SparseAttnProcessor("dense"), stage("dense"))
        seen = _Seen(step=self.steps // 2)
        sparse, report = self._clip(pipe, self.processor, stage("sparse"), seen)
        result = self._result(dense, dense_report, sparse, report)
        self._save(dense, sparse, seen, result)
        return result

    def _clip(
        self, pipe: Any, processor: SparseAttnProcessor, progress: Progress, seen: _Seen | None = None
    ) -> tuple[Clip, Report]:
        pipe.set_attn_processor(processor)
        run = pipe.sparse_run
        if seen is not None:
            run.observe(seen)
        try:
            clip = generate(pipe, self.prompt, self.seed, self.call, progress)
            return clip, run.report()
        finally:
            pipe.set_attn_processor(None)

    def _result(self, dense: Clip, dense_report: Report, sparse: Clip, report: Report) -> dict:
        return {
            "model": BUNDLED,
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
            "attention_seconds_dense": dense_report.attention_seconds,
            "attention_seconds_sparse": report.attention_seconds,
            "attention_speedup": dense_report.attention_seconds / report.attention_seconds,
            "psnr": psnr(sparse.frames, dense.frames),
            "ssim": ssim(sparse.frames, dense.frames),
            "executor": ", ".join(report.executors) or "dense",
            "grid": ", ".join(report.grids),
            "steps": self.steps,
            "dense_steps": self.processor.settings.schedule.first_sparse_step(self.steps),
            **conditions(),
        }

    def _save(self, dense: Clip, sparse: Clip, seen: _Seen, result: dict) -> None:
        labels = (
            f"dense  {dense.seconds:.1f} s",
            f"{result['method']}  {sparse.seconds:.1f} s  ({result['speedup']:.2f}x, PSNR {result['psnr']:.1f} dB)",
        )
        save_video(self.out / "dense.mp4", dense.frames, BUNDLED_FPS)
        save_video(self.out / "sparse.mp4", sparse.frames, BUNDLED_FPS)
        save_video(self.out / "side-by-side.mp4", side_by_side(dense.frames, sparse.frames, labels), BUNDLED_FPS)
        if seen.plan is not None:
            mass = torch.stack([seen.mass[layer] for layer in sorted(seen.mass)])
            title = f"attention retained by {result['method']}, step {seen.step}: mean {mass.mean():.3f}"
            save_picture(self.out / "mask.png", mask_picture(seen.plan, seen.grid, result["method"]))
            save_picture(self.out / "retained.png", heat_map(mass, title))
        save_json(self.out / "result.json", result)


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
