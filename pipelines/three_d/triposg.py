"""TripoSG: a time token, then the tokens of the latents. The number of steps is that of the pipeline's scheduler."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines.module_adapter import ModuleAdapter

ADAPTER = ModuleAdapter(
    name="triposg",
    transformers=("TripoSGDiTModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=lambda arguments: Grid(1, 1, arguments["hidden_states"].shape[1], before=1),
    step=lambda arguments: arguments["timestep"],
    steps=50,
)
