"""Attention between clusters of any size in Triton, for NVIDIA GPUs from Ampere on: nothing is padded.

Keys and values are sorted by cluster once. Kept clusters that lie side by side then are one run of keys; each run is
cut into whole tiles, which need no mask, and one tail. Queries are read, and the output is written, where they are.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from dit_sparse.clusters import ClusterPlan
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import Architecture
from dit_sparse.kernels.permute import permuted
from dit_sparse.plan import Plan, num_blocks

LSE = True
CLUSTERS = True

LARGE = 256  # mean tokens of a query cluster from which 128 queries at a time waste little


def why_not(q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> str | None:
    if reason := launching.why_not(q, k):
        return reason
    return "it computes clusters of any size; take block_sparse for equal blocks" if isinstance(plan, Plan) else None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept clusters of ``k, v [B, Hkv, N, D]`` (Hkv divides H).

    Returns:
        out ``[B, H, N, D]`` with q's dtype and memory layout, and the natural-log-sum-exp of the kept scores,
        float32 ``[B, H, N]``. A row without any valid key gives 0 and -inf.
    """
    from dit_sparse.kernels.gpu.block_ragged import forward

    arguments, out, lse = launch(q, k, v, plan, scale, launching.machine(q.device))
    with torch.cuda.device_of(q):
        forward[(len(arguments["schedule"]),)](**arguments)
    return out, lse


def launch(
    q: Tensor, k: Tensor, v: Tensor, plan: ClusterPlan, scale: float | None, machine: Architecture
) -> tuple[dict, Tensor, Tensor]:
    """The arguments of the kernel, and the two tensors that it will fill."""
    batch, heads, tokens, dim = q.shape
    rows = 128 if dim <= 128 and tokens >= LARGE * plan.queries.sizes.shape[-1] else 64
    tiling = machine.tiling(rows, dim)
    columns = tiling.columns(rows, dim)
    q, k, v = launching.in_rows(q, *permuted(plan.keys.order, k, v))
    out = torch.empty_like(q)
    lse = torch.empty(batch, heads, tokens, dtype=torch.float32, device=q.device)

    begins, ends = key_runs(plan)
    starts, whole, tails = key_tiles(begins, ends, tiling.keys, tokens)
    clusters, places = query_tiles(plan.queries.edges, rows, tokens)
    per_head = lambda x: x.expand(batch, heads, *x.shape[2:])
    work = per_head((ends - begins).sum(-1)).gather(-1, per_head(clusters).long())
    lists = {"starts": starts, "whole": whole, "tails": tails, "ends": ends, "clusters": clusters, "places": places}
    lists |= {"order": plan.queries.order, "edges": plan.queries.edges}
    lists = {name: per_head(x) for name, x in lists.items()}
    strides = {f"{name}_strides": x.stride()[:-1] for name, x in lists.items()}
    arguments = dict(
        launching.fetched({"k": k, "v": v}, tiling.keys, columns, tiling.tma),
        q=q,
        out=out,
        lse=lse,
        **lists,
        schedule=launching.longest_first(work * (per_head(places) < tokens), launching.company(k, machine.cache)),
        q_strides=q.stride()[:3],
        k_strides=k.stride()[:3],
        v_strides=v.stride()[:3],
        out_strides=out.stride()[:3],
        **strides,
        heads=heads,
        group=heads // k.shape[1],
        tokens=tokens,
        tiles=clusters.shape[-1],
        runs=ends.shape[-1],
        scale=(dim**-0.5 if scale is None else scale) * math.log2(math.e),
        ROWS=rows,
        KEYS=tiling.keys,
        WIDTHS=columns,
        TMA=tiling.tma,
        num_warps=tiling.warps,
        num_stages=tiling.stages,
    )
    return arguments, out, lse


def key_runs(plan: ClusterPlan) -> tuple[Tensor, Tensor]:
    """Where the runs of keys of every query cluster begin and end, int32 ``[B|1, H|1, Cq, K]`` each. Clusters side by
    side are one run, padding is cut off, and what is left over of K are runs of nothing."""
    edges = plan.keys.edges[:, :, None]
    ends_of = [torch.take_along_dim(edges, plan.index.long() + side, -1) for side in (0, 1)]
    begin, end = (torch.where(plan.valid, x, 0) for x in ends_of)
    if plan.lengths is not None:
        begin, end = (x.minimum(plan.lengths[:, None, None, None]) for x in (begin, end))
    live = begin < end
    reached = torch.where(live, end, -1).cummax(-1).values
    continues = live & (begin == torch.nn.functional.pad(reached[..., :-1], (1, 0), value=-1))
    run = ((live & ~continues).cumsum(-1) - 1).clamp(min=0)
    begins = torch.full_like(begin, plan.tokens).scatter_reduce(-1, run, begin.where(live, plan.tokens), "amin")
    ends = torch.zeros_like(end).scatter_reduce(-1, run, end.where(live, 0), "amax")
    return begins.minimum(ends), ends


def key_tiles(begins: Tensor, ends: Tensor, keys: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """The tiles of ``keys`` keys in the runs ``[B|1, H|1, Cq, K]``.

    Returns:
        Where whole tiles start, ``[B|1, H|1, Cq, tokens // keys]``; how many there are, ``[B|1, H|1, Cq, 1]``; and
        where the tail of each run begins, ``[B|1, H|1, Cq, K]``. All int32.
    """
    tiles = (ends - begins) // keys
    until = tiles.cumsum(-1)
    slots = torch.arange(max(1, tokens // keys), device=ends.device).expand(*ends.shape[:-1], -1)
    run = torch.searchsorted(until, slots.contiguous(), right=True).clamp(max=ends.shape[-1] - 1)
    starts = begins.gather(-1, run) + (slots - (until - tiles).gather(-1, run)) * keys
    return starts.int(), until[..., -1:].int(), (begins + tiles * keys).int()


def query_tiles(edges: Tensor, rows: int, tokens: int) -> tuple[Tensor, Tensor]:
    """Cluster and first place of every tile of up to ``rows`` queries, int32 ``[B|1, H|1, T]`` each. T is as many as
    there could be, so that nobody waits to count them; spare tiles have the place ``tokens``."""
    tiles = (edges.diff(dim=-1) + rows - 1) // rows
    until = tiles.cumsum(-1)
    slots = torch.arange(num_blocks(tokens, rows) + tiles.shape[-1], device=edges.device)
    slots = slots.expand(*edges.shape[:-1], -1).contiguous()
    cluster = torch.searchsorted(until, slots, right=True)
    spare, cluster = cluster == tiles.shape[-1], cluster.clamp(max=tiles.shape[-1] - 1)
    place = edges.gather(-1, cluster) + (slots - (until - tiles).gather(-1, cluster)) * rows
    return cluster.int(), place.masked_fill(spare, tokens).int()
