"""TRELLIS.2, TRELLIS, SAM 3D Objects and Hi3DGen: flow models of structured latents, whose tokens are packed voxels.

Their class has the same name. Those of the first TRELLIS attend between cells of ``patch_size`` cubed voxels. The model
of the structure, on a dense grid of 16 cubed, is a class of its own and stays dense: its attention takes at most a
quarter of the time.
"""

from __future__ import annotations

from dit_sparse.pipelines.module_adapter import Arguments, ModuleAdapter
from dit_sparse.voxels.grid import VoxelGrid


def _grid(arguments: Arguments) -> VoxelGrid:
    coordinates, patch = arguments["x"].coords, getattr(arguments["self"], "patch_size", 1)
    if patch > 1:  # the model merges the voxels of a cell and sorts the cells by batch item and coordinates
        cells = coordinates.div(coordinates.new_tensor([1, patch, patch, patch]), rounding_mode="floor")
        coordinates = cells.unique(dim=0)
    return VoxelGrid(coordinates)


ADAPTER = ModuleAdapter(
    name="trellis",
    transformers=("SLatFlowModel",),
    sites=r"blocks\.\d+\.self_attn",
    call="sparse_scaled_dot_product_attention",
    grid=_grid,
    step=lambda arguments: arguments["t"],
    steps=12,
)
