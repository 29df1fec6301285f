"""Block-sparse attention by the paged attention of PyTorch, ``torch.nn.attention.varlen``.

PyTorch uses FlashAttention-2, or FlashAttention-3 after ``torch.nn.attention.activate_flash_attention_impl("FA3")``.
"""

from __future__ import annotations

import inspect

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

from .pages import FLASH_2_PAGE, paged_inputs

LSE = True
CLUSTERS = False
THIRD_PARTY = True


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if reason := launching.why_not_third_party(q, k):
        return reason
    if q.shape[-1] % 8 or q.shape[-1] > 256:
        return f"requires a head_dim that is a multiple of 8, at most 256, got {q.shape[-1]}"
    return _missing_from_torch() or _unsupported_page_size(plan)


@with_tail
def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`."""
    from torch.nn.attention.varlen import AuxRequest, varlen_attn

    q, scale = launching.with_positive_scale(q, scale)
    inputs = paged_inputs(q, k, v, plan)
    max_keys = inputs.page_table.shape[1] * plan.block
    out, lse = varlen_attn(
        inputs.queries, inputs.keys, inputs.values, inputs.query_starts, None, plan.block, max_keys,
        return_aux=AuxRequest(lse=True), scale=scale, seqused_k=inputs.num_keys, block_table=inputs.page_table,
    )  # fmt: skip
    return inputs.restore_outputs(out, lse, q, plan)


def _missing_from_torch() -> str | None:
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return f"requires torch.nn.attention.varlen, which PyTorch {torch.__version__} does not have"
    if "block_table" not in inspect.signature(varlen_attn).parameters:
        return f"requires varlen_attn with block_table, which PyTorch {torch.__version__} does not have"
    return None


def _unsupported_page_size(plan: Plan) -> str | None:
    from torch.nn import attention

    implementation = getattr(attention, "current_flash_attention_impl", lambda: None)()
    if implementation in (None, "FA2") and plan.block % FLASH_2_PAGE:
        return (
            f"requires blocks of a multiple of {FLASH_2_PAGE} tokens with FlashAttention-2, got {plan.block}; "
            'call torch.nn.attention.activate_flash_attention_impl("FA3") for smaller blocks'
        )
    return None
