"""Ulysses context parallelism: between two all-to-all exchanges, each rank has all tokens of some heads.

diffusers splits the tokens of a transformer over ranks, and its Ulysses attention exchanges them for heads. The call
that is made between the exchanges is intercepted, so methods and executors see whole sequences of fewer heads. Ring
attention raises an error, because no rank holds a whole sequence.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from ...grid import Grid
from ..forward import AttentionCall, HeadShare, TokenLayout


def check_parallelism(transformer: nn.Module, modules: Sequence[nn.Module]) -> None:
    """Raise ValueError if a transformer uses a form of context parallelism that cannot be computed.

    Args:
        modules: its self-attention modules.
    """
    config = _context_parallel(getattr(transformer, "_parallel_config", None))
    if config is None:
        return
    refuse_ring(config)
    for processor in (getattr(module, "processor", None) for module in modules):
        if getattr(processor, "_parallel_config", None) is None:
            raise ValueError(
                f"{type(processor).__name__} would attend to the tokens of one rank only: call "
                "dit_sparse.enable_parallelism(...) in place of the model's own method, and after "
                "fuse_qkv_projections() and other changes of processors"
            )


def refuse_ring(config: Any) -> None:
    """Raise ValueError if a ``ContextParallelConfig`` asks for ring attention."""
    if config.ring_degree > 1:
        raise ValueError(
            "ring attention is not supported, because no rank holds a whole sequence: "
            "use ContextParallelConfig(ulysses_degree=...), or disable sparse attention"
        )


def attend_in_parallel(
    call: AttentionCall, enable_gqa: bool, parallel_config: Any, compute: Callable[[AttentionCall], Tensor]
) -> Tensor:
    """Return the output ``[B, H, N / ranks, D]`` of a call of one rank, or that of a call without context parallelism.
    Calls that require gradients stay dense.

    Args:
        call: with the tokens of this rank.
        enable_gqa: as in ``scaled_dot_product_attention``; diffusers refuses it.
        parallel_config: that of the processor, or None.
        compute: computes a call with the heads of this rank and all tokens.
    """
    if parallel_config is None:
        return compute(call)
    config = _context_parallel(parallel_config)
    # A mask over all keys is in the order of the model, not in that of the exchanged tokens.
    is_global = isinstance(call.mask, Tensor) and call.mask.shape[-1] != call.k.shape[2]
    if config is None or config.ulysses_degree == 1 or config.ring_degree > 1 or call.needs_gradient or is_global:
        return compute(replace(call, is_parallel=True))
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
    from diffusers.models.attention_dispatch import _templated_context_parallel_attention as ulysses_attention

    rank, ranks = torch.distributed.get_rank(config._ulysses_mesh.get_group()), config.ulysses_degree
    share = HeadShare(rank * -(-call.q.shape[1] // ranks), ranks)
    backend = AttentionBackendName(call.backend or "native")

    def attend(_, query, key, value, mask, *options: Any, **names: Any) -> Tensor:
        def stock() -> Tensor:
            out = dispatch_attention_fn(query, key, value, mask, scale=call.scale, backend=backend)
            return out.transpose(1, 2)

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        return compute(replace(call, q=q, k=k, v=v, mask=mask, stock=stock, share=share)).transpose(1, 2)

    inputs = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
    settings = (call.mask, call.dropout_p, call.is_causal, call.scale, enable_gqa)
    out = ulysses_attention(*inputs, *settings, forward_op=attend, backward_op=None, _parallel_config=parallel_config)
    return out.transpose(1, 2)


@lru_cache(maxsize=16)
def joint_order(ranks: int, grid: Grid, layout: TokenLayout, device: torch.device) -> Tensor | None:
    """Return the order ``[N]`` of a sequence whose text and video were split over the ranks separately: token i of the
    model's sequence is at ``order[i]`` after the all-to-all exchange. None without text."""
    before, after = grid.before - layout.references_before, grid.after - layout.references_after
    if before == after == 0:
        return None
    lengths = before, grid.tokens - before - after, after
    sizes = torch.tensor([[len(part) for part in torch.arange(n).tensor_split(ranks)] for n in lengths])
    starts = (sizes.T.flatten().cumsum(0) - sizes.T.flatten()).view(ranks, 3).T
    runs = zip(starts.flatten().tolist(), sizes.flatten().tolist(), strict=True)
    return torch.cat([torch.arange(start, start + size) for start, size in runs]).to(device)


def arrange(call: AttentionCall, order: Tensor) -> AttentionCall:
    """Return a call with its tokens in an order ``[N]``."""
    q, k, v = (x.index_select(2, order) for x in (call.q, call.k, call.v))
    mask = call.mask
    if isinstance(mask, Tensor) and mask.shape[-1] == len(order):
        mask = mask.index_select(-1, order)
        if mask.ndim > 2 and mask.shape[-2] == len(order):
            mask = mask.index_select(-2, order)
    return replace(call, q=q, k=k, v=v, mask=mask, stock=lambda: call.stock().index_select(2, order))


def _context_parallel(parallel_config: Any) -> Any:
    return getattr(parallel_config, "context_parallel_config", None)
