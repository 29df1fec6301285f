"""Hunyuan3D 2.1: a time token, then the tokens of the latents."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines.module_adapter import ModuleAdapter

ADAPTER = ModuleAdapter(
    name="hunyuan3d21",
    transformers=("HunYuanDiTPlain",),
    sites=r"blocks\.\d+\.attn1",
    grid=lambda arguments: Grid(1, 1, arguments["x"].shape[1], before=1),
    step=lambda arguments: arguments["t"],
    steps=50,
)
