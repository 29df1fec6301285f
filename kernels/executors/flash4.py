"""FlashAttention-4's block sparsity (T. Dao et al., package ``flash-attn-4``, in the CuTe language): Hopper, Blackwell.

Its blocks must fit the tiles of its kernel, which differ from one architecture and head_dim to the next; it says so
itself where they do not.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = False
THIRD_PARTY = True
BLOCKS = {9: (64, 128), 10: (256,), 11: (256,)}  # tokens, by major compute capability, as of 4.0.0b36


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if not _installed():
        return "the package flash-attn-4 is not installed"
    if reason := launching.why_not_elsewhere("FlashAttention-4", q, k):
        return reason
    major = torch.cuda.get_device_capability(q.device)[0]
    if plan.block not in BLOCKS.get(major, ()):
        told = "; ".join(f"{' or '.join(map(str, sizes))} on compute capability {on}" for on, sizes in BLOCKS.items())
        return f"FlashAttention-4 takes sparse blocks of {told}, not {plan.block} on {major}"
    if plan.lengths is not None:
        return "FlashAttention-4 takes no padding together with sparse blocks"
    return None


def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Attention of ``q [B, H, N, D]`` over the kept blocks of ``k, v [B, Hkv, N, D]``; see ``reference.attend``."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    q, k, v = (plan.arrange(x).transpose(1, 2) for x in (q, k, v))
    count, index = plan.count.contiguous(), plan.index.contiguous()
    lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(index),
        full_block_cnt=count,
        full_block_idx=index,
        block_size=(plan.block, plan.block),
    )
    out, lse = flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=lists, return_lse=True)
    return plan.restore(out.transpose(1, 2)), plan.restore(lse)


def _installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
