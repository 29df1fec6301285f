"""Compiled FlexAttention, PyTorch's block-sparse attention (J. Dong et al., arXiv:2412.05496), on CPU and GPU.

The eager fallback of FlexAttention, which stores N x N scores, is never used: if compilation fails, ``attend`` raises.
On a CPU, PyTorch returns no log-sum-exp, so ``lse`` is None.
"""

from __future__ import annotations

import functools
import logging
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

LSE = torch.cuda.is_available()
CLUSTERS = False
THIRD_PARTY = True

_log = logging.getLogger("dit_sparse")


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if q.device.type not in ("cuda", "cpu"):
        return f"requires CUDA or CPU tensors, got {q.device.type} tensors"
    if q.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "requires a C++ compiler (g++ or clang++) on the PATH to compile for CPUs"
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "has no backward pass on CPUs, got inputs that require grad; call it under torch.no_grad()"
    if q.device.type == "cuda" and plan.block % 128 and plan.block != 64:
        return f"requires blocks of 64 or a multiple of 128 tokens on CUDA, got {plan.block}"
    return None


@with_tail
def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Compute attention as specified in `executors`.

    Raises:
        RuntimeError: compilation failed or the limit of recompilations was reached.
    """
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    mask = _block_mask(plan, q.shape[0], q.shape[1])
    return_lse = q.device.type == "cuda"
    options = dict(block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_lse=return_lse)
    try:
        with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
            result = _compiled_flex_attention()(q, k, v, **options)
    except Exception as error:  # compiler messages can be several pages long
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RuntimeError(f"FlexAttention cannot compute this call: {reason}") from error
    out, lse = result if return_lse else (result, None)
    return plan.restore(out), None if lse is None else plan.restore(lse)


@functools.cache
def _compiled_flex_attention():
    from torch.nn.attention.flex_attention import flex_attention

    _log.info("compiling FlexAttention, which takes up to a minute in each process")
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_mask(plan: Plan, batch: int, heads: int):
    """Return the plan as a BlockMask. Its blocks are full, so that no mask is evaluated, unless the plan has
    padding."""
    from torch.nn.attention.flex_attention import BlockMask

    index = F.pad(plan.index, (0, plan.blocks - plan.index.shape[-1])).expand(batch, heads, -1, -1).contiguous()
    count = plan.count.expand(batch, heads, -1).contiguous()
    no_count, no_index = torch.zeros_like(count), torch.zeros_like(index)
    shape = dict(BLOCK_SIZE=plan.block, seq_lengths=(plan.tokens, plan.tokens), compute_q_blocks=False)
    if plan.lengths is None:
        return BlockMask.from_kv_blocks(no_count, no_index, count, index, **shape)
    lengths = plan.lengths
    torch._dynamo.mark_static(lengths)  # PyTorch 2.13 writes invalid C++ for a batch of variable size here

    def padding_mask(b, h, query, key):
        return key < lengths[b]

    return BlockMask.from_kv_blocks(count, index, no_count, no_index, mask_mod=padding_mask, **shape)
