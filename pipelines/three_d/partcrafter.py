"""PartCrafter: latents ``[B * parts, tokens, D]``; each part begins with a time token. Some layers attend between the
tokens of all parts. The others attend within each part and stay dense: their sequences do not fit the grid."""

from __future__ import annotations

from dit_sparse.grid import Grid
from dit_sparse.pipelines.module_adapter import Arguments, ModuleAdapter


def _grid(arguments: Arguments) -> Grid:
    parts = (arguments.get("attention_kwargs") or {}).get("num_parts", 1)
    return Grid(int(parts), 1, arguments["hidden_states"].shape[1] + 1)


ADAPTER = ModuleAdapter(
    name="partcrafter",
    transformers=("PartCrafterDiTModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=_grid,
    step=lambda arguments: arguments["timestep"],
    steps=50,
)
