"""UltraShape: a time token, then one token for each voxel of ``voxel_cond [B, N, 3]``, in an order that is shuffled on
purpose."""

from __future__ import annotations

from dit_sparse.pipelines.module_adapter import Arguments, ModuleAdapter
from dit_sparse.voxels.grid import VoxelGrid


def _grids(arguments: Arguments) -> list[VoxelGrid]:
    voxels = arguments["voxel_cond"]
    grids = [VoxelGrid(item, before=1) for item in voxels]
    return grids * (len(arguments["x"]) // len(grids))  # both branches of guidance may share the voxels


ADAPTER = ModuleAdapter(
    name="ultrashape",
    transformers=("RefineDiT",),
    sites=r"blocks\.\d+\.attn1",
    grid=_grids,
    step=lambda arguments: arguments["t"],
    steps=50,
)
