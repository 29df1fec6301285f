"""Block-sparse attention by the paged attention of xFormers.

Uses the paged block-diagonal bias of xFormers and the first of its operators (FlashAttention-3, FlashAttention-2, its
Triton kernel) that is available and supports the page size.
"""

from __future__ import annotations

import importlib.util

from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

from .pages import FLASH_2_PAGE, paged_inputs

LSE = True
CLUSTERS = False
THIRD_PARTY = True
PAGE = 64  # the Triton kernel of xFormers requires pages of a multiple of this many tokens


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "requires the package xformers (pip install 'dit-sparse[xformers]')"
    if reason := launching.why_not_third_party(q, k):
        return reason
    if plan.block % PAGE:
        return f"requires blocks of a multiple of {PAGE} tokens, got {plan.block}"
    return None


@with_tail
def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`.

    xFormers takes the lengths of all sequences as Python lists, so every call synchronizes with the GPU.
    """
    from xformers.ops import fmha

    q, scale = launching.with_positive_scale(q, scale)
    inputs = paged_inputs(q, k, v, plan)
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=inputs.query_starts.diff().tolist(),
        kv_seqlen=inputs.num_keys.tolist(),
        block_tables=inputs.page_table,
        page_size=plan.block,
        device=q.device,
    )
    tensors = (inputs.queries[None], inputs.keys.flatten(0, 1)[None], inputs.values.flatten(0, 1)[None])
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        *tensors, attn_bias=bias, scale=scale, op=_operator(plan.block)
    )
    return inputs.restore_outputs(out, lse, q, plan)


def _operator(page: int):
    """Return the operator for a page size. The dispatcher of xFormers ignores the page size, and FlashAttention-2 then
    raises an error."""
    from xformers.ops import fmha

    if fmha.flash3.FwOp.is_available():
        return fmha.flash3.FwOp
    if page % FLASH_2_PAGE == 0 and fmha.flash.FwOp.is_available():
        return fmha.flash.FwOp
    return fmha.triton_splitk.FwOp
