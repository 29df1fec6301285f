"""Block-sparse attention by PyTorch's own paged attention, ``torch.nn.attention.varlen``: FlashAttention-2, or
FlashAttention-3 where it has been activated (``torch.nn.attention.activate_flash_attention_impl``)."""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.plan import Plan

from .pages import FLASH_2_PAGE, paged

LSE = True
CLUSTERS = False
THIRD_PARTY = True


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if reason := launching.why_not_elsewhere("FlashAttention", q, k):
        return reason
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"FlashAttention takes a head_dim that is a multiple of 8 up to 256, not {q.shape[-1]}"
    return _missing_from_torch() or _page_size(plan)


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    call = paged(q, k, v, plan)
    longest = call.table.shape[1] * plan.block
    out, lse = varlen_attn(
        call.queries, call.keys, call.values, call.starts, None, plan.block, longest,
        return_aux=AuxRequest(lse=True), scale=scale, seqused_k=call.used, block_table=call.table,
    )  # fmt: skip
    return call.back(out, lse, q, plan)


def _missing_from_torch() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"PyTorch {torch.__version__} has no torch.nn.attention.varlen"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"varlen_attn of PyTorch {torch.__version__} takes no block_table"
    return None


def _page_size(plan: Plan) -> str | None:
    from torch.nn import attention

    implementation = getattr(attention, "current_flash_attention_impl", lambda: None)()
    if implementation in (None, "FA2") and plan.block % FLASH_2_PAGE:
        return (
            f"FlashAttention-2 wants pages of a multiple of {FLASH_2_PAGE} tokens, not blocks of {plan.block}; "
            "FlashAttention-3 takes smaller ones once torch.nn.attention.activate_flash_attention_impl has it"
        )
    return None
