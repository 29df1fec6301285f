"""Block-sparse attention by xFormers' paged attention: its paged block-diagonal bias, and the first of its operators
(FlashAttention-3, FlashAttention-2, its own Triton kernel) that is there and takes pages of this size."""

from __future__ import annotations

import importlib.util

from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.plan import Plan

from .pages import FLASH_2_PAGE, paged

LSE = True
CLUSTERS = False
THIRD_PARTY = True
PAGE = 64  # tokens; the pages of its own Triton kernel are multiples of this


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "the package xformers is not installed (pip install 'dit-sparse[xformers]')"
    if reason := launching.why_not_elsewhere("xFormers' paged attention", q, k):
        return reason
    if plan.block % PAGE:
        return f"xFormers' paged attention wants pages of a multiple of {PAGE} tokens, not blocks of {plan.block}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``.

    xFormers wants the lengths of all sequences on the host, which waits for the device at every call.
    """
    from xformers.ops import fmha

    call = paged(q, k, v, plan)
    bias = fmha.attn_bias.PagedBlockDiagonalPaddedKeysMask.from_seqlens(
        q_seqlen=call.starts.diff().tolist(),
        kv_seqlen=call.used.tolist(),
        block_tables=call.table,
        page_size=plan.block,
        device=q.device,
    )
    one_batch = (call.queries[None], call.keys.flatten(0, 1)[None], call.values.flatten(0, 1)[None])
    out, lse = fmha.memory_efficient_attention_forward_requires_grad(
        *one_batch, attn_bias=bias, scale=scale, op=_operator(plan.block)
    )
    return call.back(out, lse, q, plan)


def _operator(page: int):
    """xFormers' own dispatch does not look at the size of a page, and FlashAttention-2 then refuses."""
    from xformers.ops import fmha

    if fmha.flash3.FwOp.is_available():
        return fmha.flash3.FwOp
    if page % FLASH_2_PAGE == 0 and fmha.flash.FwOp.is_available():
        return fmha.flash.FwOp
    return fmha.triton_splitk.FwOp
