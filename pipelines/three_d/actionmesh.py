"""ActionMesh: latents ``[B, frames, tokens, D]``; each frame begins with a time token, and the tokens of all frames
attend to each other."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines.module_adapter import Arguments, ModuleAdapter


def _grid(arguments: Arguments) -> Grid:
    frames, tokens = arguments["hidden_states"].shape[1:3]
    return Grid(frames, 1, tokens + 1)


ADAPTER = ModuleAdapter(
    name="actionmesh",
    transformers=("ActionMeshDenoiser",),
    sites=r"blocks\.\d+\.s_attn",
    grid=_grid,
    step=lambda arguments: arguments["diffusion_time"],
    steps=30,
)
