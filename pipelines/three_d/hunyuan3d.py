"""Hunyuan3D 2.0: tokens of the condition before those of the latents, in blocks of two streams and of one."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines.module_adapter import Arguments, ModuleAdapter


def _grid(arguments: Arguments) -> Grid:
    return Grid(1, 1, arguments["x"].shape[1], before=arguments["contexts"]["main"].shape[1])


ADAPTER = ModuleAdapter(
    name="hunyuan3d",
    transformers=("Hunyuan3DDiT",),
    sites=r"(double|single)_blocks\.\d+",
    grid=_grid,
    step=lambda arguments: arguments["t"],
    steps=50,
)
