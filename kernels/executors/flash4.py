"""Block-sparse attention of FlashAttention-4 (T. Dao et al., package ``flash-attn-4``), for Hopper and Blackwell GPUs.

The block size must match the tiles of its kernel, which depend on the architecture and head_dim; the package raises an
error if it does not.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.tail import with_tail
from dit_sparse.plan import Plan

LSE = True
CLUSTERS = False
THIRD_PARTY = True
BLOCKS = {9: (64, 128), 10: (256,), 11: (256,)}  # supported blocks by major compute capability, version 4.0.0b36


def why_not(q: Tensor, k: Tensor, plan: Plan) -> str | None:
    if not _is_installed():
        return "requires the package flash-attn-4"
    if reason := launching.why_not_third_party(q, k):
        return reason
    major = torch.cuda.get_device_capability(q.device)[0]
    if plan.block not in BLOCKS.get(major, ()):
        supported = "; ".join(
            f"{' or '.join(map(str, sizes))} tokens on compute capability {capability}"
            for capability, sizes in BLOCKS.items()
        )
        return f"requires blocks of {supported}, got {plan.block} tokens on {major}"
    if plan.lengths is not None:
        return "does not support padding together with block sparsity"
    return None


@with_tail
def attend(q: Tensor, k: Tensor, v: Tensor, plan: Plan, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Compute attention as specified in `executors`."""
    from flash_attn.cute.block_sparsity import BlockSparseTensorsTorch
    from flash_attn.cute.interface import flash_attn_func

    q, scale = launching.with_positive_scale(q, scale)
    q, k, v = (plan.arrange(x).transpose(1, 2) for x in (q, k, v))
    count, index = plan.count.contiguous(), plan.index.contiguous()
    block_lists = BlockSparseTensorsTorch(
        mask_block_cnt=torch.zeros_like(count),
        mask_block_idx=torch.zeros_like(index),
        full_block_cnt=count,
        full_block_idx=index,
        block_size=(plan.block, plan.block),
    )
    out, lse = flash_attn_func(q, k, v, softmax_scale=scale, block_sparse_tensors=block_lists, return_lse=True)
    return plan.restore(out.transpose(1, 2)), plan.restore(lse)


def _is_installed() -> bool:
    try:
        return importlib.util.find_spec("flash_attn.cute") is not None
    except ModuleNotFoundError:
        return False
