"""Attention between clusters of any size in Triton, without padding, for NVIDIA GPUs from Ampere on.

Keys and values are sorted by cluster once. Kept clusters that are adjacent form one run of keys; each run is split into
full tiles, which need no mask, and one tail. The kernel reads queries and writes outputs through the order of the query
clusters.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.kernels.tail import tail_arguments
from dit_sparse.plan import Plan, num_blocks

LSE = True
CLUSTERS = True

LARGE_CLUSTER = 256  # mean queries of a cluster from which tiles of 128 queries waste little


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    if reason := launching.why_not(q, k):
        return reason
    return "requires clusters, got equal blocks; use block_sparse" if isinstance(plan, Plan) else None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`. ``out`` has q's memory layout."""
    from dit_sparse.kernels.gpu.block_ragged import block_ragged_kernel

    arguments, out, lse = launch_arguments(q, k, v, plan, scale, launching.device_architecture(q.device))
    with torch.cuda.device_of(q):
        block_ragged_kernel[(len(arguments["schedule"]),)](**arguments)
    return out, lse


def launch_arguments(
    q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float | None, architecture: Architecture
) -> tuple[dict, Tensor, Tensor]:
    """Return the arguments of the kernel, and its outputs ``out`` and ``lse``."""
    batch, heads, tokens, dim = q.shape
    rows = 128 if dim <= 128 and tokens >= LARGE_CLUSTER * plan.queries.sizes.shape[-1] else 64
    q, k, v = launching.with_contiguous_rows(q, *permute_tokens(plan.keys.order, k, v))
    tiling = architecture.tiling(rows, dim)
    arguments, out, lse = launching.attention_arguments(q, k, v, scale, tiling, rows)

    run_starts, run_ends = key_runs(plan)
    tile_starts, tile_counts, tail_starts = key_tiles(run_starts, run_ends, tiling.keys, tokens)
    query_clusters, query_starts = query_tiles(plan.queries.edges, rows, tokens)
    fields = {"tile_starts": tile_starts, "tile_counts": tile_counts, "tail_starts": tail_starts, "run_ends": run_ends}
    fields |= {"query_clusters": query_clusters, "query_starts": query_starts}
    fields |= {"order": plan.queries.order, "edges": plan.queries.edges, "num_keys": (run_ends - run_starts).sum(-1)}
    fields = {name: x.expand(batch, heads, *x.shape[2:]) for name, x in fields.items()}
    work = fields.pop("num_keys").gather(-1, fields["query_clusters"].long()) * (fields["query_starts"] < tokens)
    arguments |= fields | {f"{name}_strides": x.stride()[:-1] for name, x in fields.items()}
    arguments |= tail_arguments(plan, q, k, v) | dict(
        schedule=launching.schedule_longest_first(work, launching.heads_in_l2_cache(k, architecture.l2_cache)),
        tiles=query_clusters.shape[-1],
        runs=run_ends.shape[-1],
        ROWS=rows,
    )
    return arguments, out, lse


def key_runs(plan: ClusterPlan) -> tuple[Tensor, Tensor]:
    """Return start and end of the runs of keys of every query cluster, int32 ``[B|1, H|1, Cq, K]`` each.

    Adjacent clusters form one run, and padding is cut off. Unused entries of K are empty runs.
    """
    edges = plan.keys.edges[:, :, None]
    cluster_edges = [torch.take_along_dim(edges, plan.index.long() + side, -1) for side in (0, 1)]
    start, end = (torch.where(plan.valid, x, 0) for x in cluster_edges)
    if plan.lengths is not None:
        start, end = (x.minimum(plan.lengths[:, None, None, None]) for x in (start, end))
    not_empty = start < end
    last_end = torch.where(not_empty, end, -1).cummax(-1).values
    continues_run = not_empty & (start == F.pad(last_end[..., :-1], (1, 0), value=-1))
    run = ((not_empty & ~continues_run).cumsum(-1) - 1).clamp(min=0)
    starts = torch.full_like(start, plan.tokens).scatter_reduce(-1, run, start.where(not_empty, plan.tokens), "amin")
    ends = torch.zeros_like(end).scatter_reduce(-1, run, end.where(not_empty, 0), "amax")
    return starts.minimum(ends), ends


def key_tiles(run_starts: Tensor, run_ends: Tensor, keys: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """Split runs ``[B|1, H|1, Cq, K]`` into full tiles of ``keys`` keys, and tails.

    Returns:
        The start of every full tile, ``[B|1, H|1, Cq, tokens // keys]``; their number, ``[B|1, H|1, Cq, 1]``; and the
        start of the tail of each run, ``[B|1, H|1, Cq, K]``. All int32.
    """
    tiles = (run_ends - run_starts) // keys
    tiles_so_far = tiles.cumsum(-1)
    number = torch.arange(max(1, tokens // keys), device=run_ends.device).expand(*run_ends.shape[:-1], -1)
    run = torch.searchsorted(tiles_so_far, number.contiguous(), right=True).clamp(max=run_ends.shape[-1] - 1)
    number_in_run = number - (tiles_so_far - tiles).gather(-1, run)
    tile_starts = run_starts.gather(-1, run) + number_in_run * keys
    return tile_starts.int(), tiles_so_far[..., -1:].int(), (run_starts + tiles * keys).int()


def query_tiles(edges: Tensor, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Split query clusters into tiles of up to ``rows`` queries.

    Returns:
        Cluster and first position of every tile, int32 ``[B|1, H|1, T]`` each. T is the maximal number of tiles, which
        is known without synchronizing with the GPU; unused tiles start at position ``tokens``.
    """
    tiles = (edges.diff(dim=-1) + rows - 1) // rows
    tiles_so_far = tiles.cumsum(-1)
    number = torch.arange(num_blocks(tokens, rows) + tiles.shape[-1], device=edges.device)
    number = number.expand(*edges.shape[:-1], -1).contiguous()
    cluster = torch.searchsorted(tiles_so_far, number, right=True)
    is_unused, cluster = cluster == tiles.shape[-1], cluster.clamp(max=tiles.shape[-1] - 1)
    number_in_cluster = number - (tiles_so_far - tiles).gather(-1, cluster)
    position = edges.gather(-1, cluster) + number_in_cluster * rows
    return cluster.int(), position.masked_fill(is_unused, tokens).int()
