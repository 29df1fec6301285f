"""Convert a plan to the inputs of paged attention (W. Kwon et al., arXiv:2309.06180).

Each block of keys is a page, and each block of queries is a sequence whose page table is its row of the plan, so a
paged attention kernel computes block-sparse attention. Every head is a separate sequence with one head and may have its
own lists. Rows of a plan ascend, so a ragged last block or padding is at the end of a sequence's last page, where the
number of keys per sequence cuts it off.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.plan import Plan

FLASH_2_PAGE = 256  # FlashAttention-2 requires pages of a multiple of this many tokens


@dataclass(frozen=True)
class PagedInputs:
    """Inputs of a paged attention kernel for S = B * H * Q sequences with one head each.

    Attributes:
        queries: ``[B * H * N, 1, D]``, sequence after sequence.
        keys, values: pages, ``[B * Hkv * Q, page, 1, D]``.
        page_table: int32 ``[S, K]``, the pages of each sequence in order.
        num_keys: int32 ``[S]``, keys of each sequence.
        query_starts: int32 ``[S + 1]``, the first query of each sequence.
    """

    queries: Tensor
    keys: Tensor
    values: Tensor
    page_table: Tensor
    num_keys: Tensor
    query_starts: Tensor

    def restore_outputs(self, out: Tensor, lse: Tensor, q: Tensor, plan: Plan) -> tuple[Tensor, Tensor]:
        """Return the kernel's ``out [B * H * N, 1, D]`` and ``lse [B * H * N]`` with the shape and token order of
        ``q [B, H, N, D]``. Sequences without keys get 0 and -inf, because kernels differ in what they return."""
        out, lse = out.reshape(q.shape), lse.reshape(q.shape[:3])
        if plan.lengths is not None:
            empty = (self.num_keys == 0).view(*q.shape[:2], -1).repeat_interleave(plan.query_sizes[0, 0], 2)
            out, lse = out.masked_fill(empty[..., None], 0), lse.masked_fill(empty, -torch.inf)
        return plan.restore(out), plan.restore(lse)


def paged_inputs(q: Tensor, k: Tensor, v: Tensor, plan: Plan) -> PagedInputs:
    """Return the inputs that compute ``plan`` for ``q [B, H, N, D]`` and ``k, v [B, Hkv, N, D]``. Copies keys and
    values, and also queries if the plan has an order."""
    batch, heads = q.shape[:2]
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    index = plan.index.expand(batch, heads, -1, -1)
    key_heads = k.shape[1]
    key_sequence = torch.arange(batch * key_heads, device=q.device).view(batch, key_heads)
    page_table = key_sequence.repeat_interleave(heads // key_heads, 1)[..., None, None] * plan.blocks + index
    starts = torch.arange(batch * heads, device=q.device)[:, None] * plan.tokens
    starts = (starts + torch.arange(plan.blocks, device=q.device) * plan.block).flatten()
    return PagedInputs(
        queries=q.reshape(-1, 1, q.shape[-1]),
        keys=_split_into_pages(k, plan),
        values=_split_into_pages(v, plan),
        page_table=page_table.flatten(0, 2).int(),
        num_keys=_keys_per_sequence(plan, batch, heads).flatten(),
        query_starts=F.pad(starts, (0, 1), value=batch * heads * plan.tokens).int(),
    )


def _split_into_pages(x: Tensor, plan: Plan) -> Tensor:
    return F.pad(x, (0, 0, 0, -plan.tokens % plan.block)).reshape(-1, plan.block, 1, x.shape[-1])


def _keys_per_sequence(plan: Plan, batch: int, heads: int) -> Tensor:
    """Return the number of keys, without padding, that each query block keeps, int32 ``[B, H, Q]``."""
    lengths = torch.full((1,), plan.tokens, device=plan.index.device) if plan.lengths is None else plan.lengths
    starts = torch.arange(plan.blocks, device=plan.index.device) * plan.block
    block_sizes = (lengths[:, None] - starts).clamp(0, plan.block)[:, None, None]
    kept_sizes = torch.take_along_dim(block_sizes, plan.index.long(), -1) * plan.valid
    return kept_sizes.sum(-1).expand(batch, heads, -1).int()
