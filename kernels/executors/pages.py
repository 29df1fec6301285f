"""A plan as paged attention, the form in which serving engines read their caches (W. Kwon et al., arXiv:2309.06180):
every block of keys is a page, and every block of queries is a sequence whose page table is its row of the plan.

Kernels that read pages then compute block-sparse attention at their own speed. Heads become sequences of one head
each, so every head may have its own lists. Rows of a plan ascend, so that what they lack, the end of a ragged last
block or padding, is the end of their last page, which the number of used keys cuts off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.plan import Plan

FLASH_2_PAGE = 256  # tokens; the pages of FlashAttention-2 are multiples of this


@dataclass(frozen=True)
class Paged:
    """One call of a kernel for paged attention, S = B * H * Q sequences of one head.

    Attributes:
        queries: ``[B * H * N, 1, D]``, sequence after sequence.
        keys, values: the pool, ``[B * Hkv * Q, page, 1, D]``.
        table: int32 ``[S, K]``, the pages of each sequence, in order.
        used: int32 ``[S]``, keys of each sequence.
        starts: int32 ``[S + 1]``, where each sequence's queries start.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    table: Tensor
    used: Tensor
    starts: Tensor

    def back(self, out: Tensor, lse: Tensor, q: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """The kernel's ``out [B * H * N, 1, D]`` and ``lse [B * H * N]`` in the shape of ``q [B, H, N, D]`` and in the
        order of its tokens. Kernels differ in what they leave in a sequence without keys: 0 and -inf here."""
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
        if plan.lengths is not None:
            empty = (self.used == 0).view(*q.shape[:2], -1).repeat_interleave(plan.query_sizes[0, 0], 2)
            out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
        return plan.restore(out), plan.restore(lse)


def paged(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> Paged:
    """The call that computes ``plan`` for ``q [B, H, N, D]`` and ``k, v [B, Hkv, N, D]``. Copies keys and
    values, and what an order moves."""
    batch, heads = q.shape[:2]
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    index = plan.index.expand(batch, heads, -1, -1)
    key_heads = k.shape[1]
    pool = torch.arange(batch * key_heads, device=q.device).view(batch, key_heads)
    table = pool.repeat_interleave(heads // key_heads, 1)[..., None, None] * plan.blocks + index
    starts = torch.arange(batch * heads, device=q.device)[:, None] * plan.tokens
    starts = (starts + torch.arange(plan.blocks, device=q.device) * plan.block).flatten()
    return Paged(
        queries=q.reshape(-1, 1, q.shape[-1]),
        keys=_pool(k, plan),
        values=_pool(v, plan),
        table=table.flatten(0, 2).int(),
        used=_used(plan, batch, heads).flatten(),
        starts=F.pad(starts, (0, 1), value=batch * heads * plan.tokens).int(),
    )


def _pool(x: Tensor, plan: Plan) -> Tensor:
    return F.pad(x, (0, 0, 0, -plan.tokens % plan.block)).reshape(-1, plan.block, 1, x.shape[-1])


def _used(plan: Plan, batch: int, heads: int) -> Tensor:
    """Real keys in the live blocks of every row, int32 ``[B, H, Q]``."""
    lengths = torch.full((1,), plan.tokens, device=plan.index.device) if plan.lengths is None else plan.lengths
    starts = torch.arange(plan.blocks, device=plan.index.device) * plan.block
    sizes = (lengths[:, None] - starts).clamp(0, plan.block)[:, None, None]
    kept = torch.take_along_dim(sizes, plan.index.long(), -1) * plan.valid
    return kept.sum(-1).expand(batch, heads, -1).int()
