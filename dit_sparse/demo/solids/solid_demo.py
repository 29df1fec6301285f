"""One solid generated densely and sparsely from the same seed: times, fidelity, meshes and pictures."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from dit_sparse import ClusterPlan, Plan, Site, SparseAttnProcessor
from dit_sparse.engine.report import Report

from ...bundled import SOLID_CALL, SOLID_PROMPT, solid_model_folder
from ...bundled.shapes_3d.judge import compare_shapes, judge
from ...bundled.shapes_3d.meshes.mesh import check_mesh_files, sample_colours
from ...bundled.shapes_3d.meshes.render import render, turntable
from ...bundled.shapes_3d.pipeline import Shape, Shapes3DPipeline
from ...bundled.shapes_3d.prompts import parse
from ...bundled.shapes_3d.solids import Cells, check_resolution
from ...generation.generate import Stage
from ...output.environment import conditions
from ...output.files import save_json, writable_folder
from ...output.media import save_image, save_video, side_by_side
from ..demo import compile_kernels, densities_and_times

FILES = ["dense.glb", "sparse.glb", "pictures.png", "mask.png", "turntable.mp4", "result.json"]
AZIMUTH = 30.0  # of the pictures
PICTURE_SIZE, VIDEO_SIZE, VIDEO_FRAMES, VIDEO_FPS = 448, 256, 24, 12
QUERY_COLOUR, KEPT_COLOUR, OTHER_COLOUR = (0.80, 0.10, 0.10), (0.95, 0.62, 0.20), (0.72, 0.74, 0.78)
QUERY_POINT = (0.5, 0.1, 0.8)  # the cell whose mask is drawn is the nearest to this point of the cube, which is in view


@dataclass(frozen=True)
class SolidDemo:
    """Settings of a demo in 3-D. All arguments are checked before any long work.

    Attributes:
        processor: the sparse attention of the sparse solid.
        out: folder for the meshes, the pictures and ``result.json``.
        prompt, seed: of both solids.
        call: arguments of the pipeline's call that replace the default ones.
        model: folder of the model; None: ``eval/models/shapes-3d`` of the checkout.

    Raises:
        ValueError: an argument is out of range, ``out`` is not writable, or trimesh is not installed.
    """

    processor: SparseAttnProcessor
    out: Path
    prompt: str = SOLID_PROMPT
    seed: int = 0
    call: dict = field(default_factory=dict)
    model: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "call", SOLID_CALL | self.call)
        if self.call["num_inference_steps"] < 2:
            raise ValueError(f"the demo needs at least 2 steps, got {self.call['num_inference_steps']}")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"the seed must be in [0, 2^63), got {self.seed}")
        parse(self.prompt)
        check_resolution(self.call["resolution"])
        check_mesh_files()
        object.__setattr__(self, "model", self.model or solid_model_folder())
        writable_folder(self.out, FILES)

    def run(self, stage: Stage) -> dict:
        """Generate both solids, write meshes, pictures, a video and ``result.json``, and return the result.

        Args:
            stage: ``stage(name)`` starts a progress bar.
        """
        pipeline = Shapes3DPipeline.from_pretrained(self.model)
        compile_kernels(self.processor)
        dense = self._generate(pipeline, SparseAttnProcessor("dense"), stage, "dense")
        observer = _MaskObserver(self.call["num_inference_steps"] // 2)
        sparse = self._generate(pipeline, self.processor, stage, "sparse", observer)
        result = self._result(dense, sparse)
        self._save(dense, sparse, observer, result)
        return result

    def _generate(
        self,
        pipeline: Shapes3DPipeline,
        processor: SparseAttnProcessor,
        stage: Stage,
        name: str,
        observer: _MaskObserver | None = None,
    ) -> _TimedShape:
        run = processor.attach(pipeline)
        try:
            if observer is not None:
                run.observe(observer)
            generator = torch.Generator().manual_seed(self.seed)
            start = time.perf_counter()
            shape = pipeline(self.prompt, generator=generator, callback=stage(name), **self.call)
            return _TimedShape(shape, time.perf_counter() - start, run.report())
        finally:
            run.disable()

    def _result(self, dense: _TimedShape, sparse: _TimedShape) -> dict:
        report, (verdict, measured) = sparse.report, judge(sparse.shape)
        return {
            "model": self.model.name,
            "prompt": self.prompt,
            "seed": self.seed,
            "call": self.call,
            "method": report.method,
            "settings": report.settings,
            "cells": len(dense.shape.cells.coordinates),
            **densities_and_times(dense, sparse),
            "planning_seconds": report.planning_seconds,
            **compare_shapes(sparse.shape, dense.shape),
            "judge": vars(verdict) | measured,
            "executor": ", ".join(report.executors) or "dense",
            "dense_calls": report.dense_calls,
            "grid": ", ".join(report.grids),
            **conditions(),
        }

    def _save(self, dense: _TimedShape, sparse: _TimedShape, observer: _MaskObserver, result: dict) -> None:
        meshes = {"dense": dense.shape.mesh, "sparse": sparse.shape.mesh}
        for name, mesh in meshes.items():
            mesh.save(self.out / f"{name}.glb")
        labels = (
            f"dense  {dense.seconds:.1f} s",
            f"{result['method']}  {sparse.seconds:.1f} s  (PSNR {result['colour_psnr']:.1f} dB)",
        )
        pair = lambda pictures: side_by_side(*pictures, labels)
        pictures = [render(mesh, AZIMUTH, PICTURE_SIZE)[None] for mesh in meshes.values()]
        save_image(self.out / "pictures.png", pair(pictures)[0])
        videos = [turntable(mesh, VIDEO_FRAMES, VIDEO_SIZE) for mesh in meshes.values()]
        save_video(self.out / "turntable.mp4", pair(videos), VIDEO_FPS)
        if observer.kept is not None:
            colours = mask_colours(dense.shape.cells, observer.query, observer.kept)
            own = sample_colours(dense.shape.cells, colours, meshes["dense"].vertices)
            save_image(self.out / "mask.png", render(meshes["dense"], AZIMUTH, PICTURE_SIZE, colours=own))
        save_json(self.out / "result.json", result)


@dataclass(frozen=True)
class _TimedShape:
    """A solid, its time in seconds, and the report of its run."""

    shape: Shape
    seconds: float
    report: Report


class _MaskObserver:
    """Observer of a run that keeps which cells one cell attends to, in the first head of the middle layer at one step.

    Attributes:
        query: coordinates of the cell, ``[3]``.
        kept: coordinates of the cells that it attends to, ``[K, 3]``; None if the run made no plan at the step.
    """

    def __init__(self, step: int) -> None:
        self.step = step
        self.query: NDArray | None = None
        self.kept: NDArray | None = None

    def __call__(self, site: Site, q: torch.Tensor, k: torch.Tensor, plan: Plan | ClusterPlan) -> None:
        if self.kept is not None or site.step < self.step or site.layer != site.layers // 2:
            return
        voxels = site.grid.voxels[:, -3:]
        target = torch.tensor(QUERY_POINT) * voxels.amax(0)
        query = (voxels - target).square().sum(1).argmin()
        mask = plan.to("cpu").token_mask(query[None])[0, 0, 0]
        self.query, self.kept = voxels[query].numpy(), voxels[mask.bool()].numpy()


def mask_colours(cells: Cells, query: NDArray, kept: NDArray) -> torch.Tensor:
    """Return colours of the sub-voxels of cells, ``[V, 8, 3]``: red for the query and the cells around it, orange for
    the cells that it attends to, grey for others.

    Args:
        query: coordinates of the query, ``[3]``.
        kept: coordinates of the cells that it attends to, ``[K, 3]``.
    """
    coordinates = cells.coordinates.numpy()
    code = lambda points: (points + cells.resolution) @ np.array([1, 1 << 10, 1 << 20])
    colours = torch.tensor(OTHER_COLOUR).repeat(len(coordinates), 1)
    colours[torch.from_numpy(np.isin(code(coordinates), code(kept)))] = torch.tensor(KEPT_COLOUR)
    colours[torch.from_numpy(np.abs(coordinates - query).max(1) <= 1)] = torch.tensor(QUERY_COLOUR)
    return colours[:, None].expand(-1, 8, -1)
