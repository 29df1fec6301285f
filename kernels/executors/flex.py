"""FlexAttention, compiled: PyTorch's own block-sparse attention (J. Dong et al., arXiv:2412.05496), CPU and GPU.

Never the eager fallback, which would write N x N scores: where compilation stops, this raises. On the CPU PyTorch
gives no log-sum-exp, so ``lse`` is None there.
"""

from __future__ import annotations

import functools
import shutil

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.plan import Plan

LSE = torch.cuda.is_available()
CLUSTERS = False
THIRD_PARTY = True


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if q.device.type not in ("cuda", "cpu"):
        return f"FlexAttention compiles for CUDA and CPU, not for {q.device.type}"
    if q.device.type == "cpu" and not (shutil.which("g++") or shutil.which("clang++")):
        return "FlexAttention on a CPU needs a C++ compiler (g++ or clang++), and there is none on the PATH"
    if q.device.type == "cpu" and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad):
        return "FlexAttention on a CPU has no backward pass; run under torch.no_grad()"
    if q.device.type == "cuda" and plan.block % 128 and plan.block != 64:
        return f"FlexAttention on a GPU wants blocks of 64 or a multiple of 128 tokens, not {plan.block}"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``.

    Raises:
        RuntimeError: compilation gave up; the eager fallback would materialise the N x N scores.
    """
    q, k, v = (plan.arrange(x) for x in (q, k, v))
    mask = _block_mask(plan, q.shape[0], q.shape[1])
    with_lse = q.device.type == "cuda"
    with torch._dynamo.config.patch(recompile_limit=256, fail_on_recompile_limit_hit=True):
        result = _compiled()(
            q, k, v, block_mask=mask, scale=scale, enable_gqa=q.shape[1] != k.shape[1], return_lse=with_lse
        )
    out, lse = result if with_lse else (result, None)
    return plan.restore(out), None if lse is None else plan.restore(lse)


@functools.cache
def _compiled():
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _block_mask(plan: Plan, batch: int, heads: int):
    """The plan as FlexAttention's BlockMask. Blocks count as full, so no mask is evaluated in them, unless padding
    has to be masked."""
    from torch.nn.attention.flex_attention import BlockMask

    index = F.pad(plan.index, (0, plan.blocks - plan.index.shape[-1])).expand(batch, heads, -1, -1).contiguous()
    count = plan.count.expand(batch, heads, -1).contiguous()
    none, nowhere = torch.zeros_like(count), torch.zeros_like(index)
    shape = dict(BLOCK_SIZE=plan.block, seq_lengths=(plan.tokens, plan.tokens), compute_q_blocks=False)
    if plan.lengths is None:
        return BlockMask.from_kv_blocks(none, nowhere, count, index, **shape)
    lengths = plan.lengths

    def real_key(b, h, query, key):
        return key < lengths[b]

    return BlockMask.from_kv_blocks(count, index, none, nowhere, mask_mod=real_key, **shape)
