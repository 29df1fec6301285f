"""Representative launches of every Triton kernel, with arguments on the CPU. They are compiled but not run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import torch

from dit_sparse import ClusterPlan, Clusters, Plan
from dit_sparse.kernels import permute
from dit_sparse.kernels.executors import block_ragged, block_sparse
from dit_sparse.kernels.gpu.architectures import Architecture
from dit_sparse.kernels.planning import block_mass, cluster, pooling_error, selection

DIMS = (64, 80, 96, 128, 256)
BLOCKS = (64, 128)
MOST_REGISTERS = (128, 128, "order, lengths")  # the block_sparse launch that needs the most registers
TAIL = "pooled tail"
# Block, head_dim and features of the launches that need the most registers or shared memory, and of small blocks.
DEMANDING = {
    "block_sparse": {(16, 128, ""), (64, 64, ""), (64, 256, ""), (128, 80, ""), (128, 256, ""), MOST_REGISTERS}
    | {(64, 128, TAIL)},
    "block_ragged": {(64, 256, ""), (128, 128, ""), (64, 128, TAIL)},
    "block_mass": {(64, 64, ""), (128, 256, ""), (128, 128, "16 queries a block"), (128, 128, "kept blocks")},
    "mass_and_spread": {(128, 80, ""), (128, 128, "")},
    "pooling_error": {(128, 128, "")},
    "nearest_centroid": {(cluster.TOKENS_PER_PROGRAM, 128, "")},
    "cluster_mean": {(0, 128, "no products")},
    "select_top": {(selection.MAX_COLUMNS, 0, "no products")},
}
TOKENS = 1000  # not a multiple of any block, so the last block is ragged


@dataclass(frozen=True)
class KernelLaunch:
    """One launch of a Triton kernel.

    Attributes:
        kernel: its name in reports.
        block, head_dim: sizes of the problem; 0 where a kernel has none.
        features: what distinguishes the launch from others of the same sizes.
        program: the Triton program.
        arguments: its keyword arguments.
    """

    kernel: str
    block: int
    head_dim: int
    features: str
    program: Any
    arguments: dict


def demanding_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    """Yield the launches of ``DEMANDING``, and those of kernels that it does not list."""
    for launch in kernel_launches(architecture):
        size = (launch.block, launch.head_dim, launch.features)
        if size in DEMANDING.get(launch.kernel, {size}):
            yield launch


def kernel_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    """Yield every launch that compiles to a different program on an architecture."""
    yield from _block_sparse_launches(architecture)
    yield from _block_ragged_launches(architecture)
    yield from _block_mass_launches(architecture)
    yield from _pooling_error_launches(architecture)
    yield from _kmeans_launches()
    yield from _permute_launches()
    yield from _selection_launches()


def _empty(dim: int) -> torch.Tensor:
    return torch.empty(1, 2, TOKENS, dim, dtype=torch.bfloat16)


def _block_sparse_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.block_sparse import block_sparse_kernel

    sizes = (*product(BLOCKS, DIMS, ("",)), (16, 128, ""), (32, 128, ""), MOST_REGISTERS)
    for block, dim, features in (*sizes, *product(BLOCKS, (64, 128), (TAIL,))):
        q, plan = _empty(dim), Plan.dense(TOKENS, block)
        if features == TAIL:
            plan = plan.with_tail(16)
        elif features:
            plan = replace(plan, order=torch.arange(TOKENS), lengths=torch.tensor([TOKENS], dtype=torch.int32))
        arguments, *_ = block_sparse.launch_arguments(q, q, q, plan, None, architecture)
        yield KernelLaunch("block_sparse", block, dim, features, block_sparse_kernel, arguments)


def _block_ragged_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.block_ragged import block_ragged_kernel

    sizes = (*product((3,), DIMS[:-1], ("",)), *product((15,), DIMS, ("",)))  # large clusters and small ones
    for count, dim, features in (*sizes, *product((3, 15), (64, 128), (TAIL,))):
        q = _empty(dim)
        clusters = Clusters.from_labels(torch.arange(TOKENS).mul(count).div(TOKENS).long()[None, None], count)
        plan = ClusterPlan.from_mask(torch.ones(1, 1, count, count, dtype=torch.bool), clusters, clusters)
        plan = plan.with_tail(16 if features else None)
        arguments, *_ = block_ragged.launch_arguments(q, q, q, plan, None, architecture)
        yield KernelLaunch("block_ragged", arguments["ROWS"], dim, features, block_ragged_kernel, arguments)


def _block_mass_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.block_mass import block_mass_kernel

    plain = [(block, dim, None, False) for block, dim in (*product(BLOCKS, (64, 128)), (128, 80), (128, 256))]
    for block, dim, queries, kept_only in (*plain, (128, 128, 16, False), (128, 128, None, True)):
        q, plan = _empty(dim), Plan.dense(TOKENS, block)
        layout = (queries or block, None, None, None, plan if kept_only else None)
        arguments, _ = block_mass.launch_arguments(q, q, torch.empty(1, 2, TOKENS), block, *layout, architecture)
        features = f"{queries} queries a block" if queries else "kept blocks" if kept_only else ""
        yield KernelLaunch("block_mass", block, dim, features, block_mass_kernel, arguments)


def _pooling_error_launches(architecture: Architecture) -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.pooling_error import mass_and_spread_kernel, pooling_error_kernel

    for block, dim in product(BLOCKS, (64, 80, 128)):
        q = _empty(dim)
        arguments, _ = pooling_error.spread_arguments(q, q, block, 16, True, architecture)
        yield KernelLaunch("mass_and_spread", block, dim, "", mass_and_spread_kernel, arguments)
        arguments, _ = pooling_error.error_arguments(q, q, block, 16, torch.arange(0, block, 8))
        yield KernelLaunch("pooling_error", block, dim, "", pooling_error_kernel, arguments)


def _kmeans_launches() -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.cluster import cluster_mean_kernel, nearest_centroid_kernel

    for dim in (80, 128):
        x, centroids = _empty(dim), torch.empty(1, 2, 100, dim)
        arguments, labels = cluster.nearest_centroid_arguments(x, centroids.to(x.dtype), centroids[..., 0].contiguous())
        yield KernelLaunch("nearest_centroid", cluster.TOKENS_PER_PROGRAM, dim, "", nearest_centroid_kernel, arguments)
        clusters = Clusters.from_labels(torch.zeros_like(labels), 100)
        arguments, _ = cluster.cluster_mean_arguments(x, clusters, centroids)
        yield KernelLaunch("cluster_mean", 0, dim, "no products", cluster_mean_kernel, arguments)


def _permute_launches() -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.permute import permute_rows_kernel

    x = _empty(128)  # head dims with the same next power of two share one program
    arguments, _ = permute.launch_arguments(torch.arange(TOKENS), (x, x))
    yield KernelLaunch("permute_rows", arguments["ROWS"], x.shape[-1], "no products", permute_rows_kernel, arguments)


def _selection_launches() -> Iterator[KernelLaunch]:
    from dit_sparse.kernels.gpu.selection import select_top_kernel

    for columns, weighted, to_nearest in (
        (1800, False, False),
        (1800, True, False),
        (selection.MAX_COLUMNS, True, True),
    ):
        scores = torch.empty(1, 2, 3, columns)
        arguments, _ = selection.launch_arguments(scores, 0.9, scores if weighted else None, to_nearest)
        yield KernelLaunch("select_top", columns, 0, "no products", select_top_kernel, arguments)
