"""Processors that compute Ulysses attention where those of diffusers cannot.

diffusers splits the tokens of a transformer over ranks, and its ``dispatch_attention_fn`` exchanges them for heads. Two
kinds of processors need more. Those that call ``F.scaled_dot_product_attention`` would attend to the tokens of one rank
only: here the call is exchanged, too. And if text and video are split separately, a mask over all keys is not in the
order of the exchanged tokens: each rank passes the part of its own tokens, which diffusers gathers.
"""

from __future__ import annotations

import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .replacement import replace_globals


def parallel_class(stock: type, config: Any, text: str | None, mask_argument: str | None) -> type:
    """Return a subclass of a processor's class that computes Ulysses attention.

    Args:
        stock: class of a processor of diffusers.
        config: a ``ContextParallelConfig`` that is set up before a processor is called.
        text: position of the text tokens, as in ``Family``.
        mask_argument: name of the processor's argument with a mask over all keys, as in ``Family``, or None.

    Raises:
        ValueError: the processor calls no attention function whose calls can be exchanged.
    """
    exchanged = replace_globals(stock.__call__, functools.partial(_exchanging_names, config))
    if exchanged is None and not hasattr(stock, "_parallel_config"):
        raise ValueError(f"{stock.__name__} calls no attention function that context parallelism supports")
    call = exchanged or stock.__call__
    if mask_argument in inspect.signature(call).parameters:
        call = _with_own_mask(call, config, text, mask_argument)
    members = {"__call__": call, "__doc__": stock.__doc__, "_parallel_config": None}
    return type(f"Parallel{stock.__name__}", (stock,), members)


def replace_class(processor: Any, cls: type) -> Any:
    """Return a processor of a subclass that shares the state of ``processor``."""
    replaced = object.__new__(cls)
    replaced.__dict__ = processor.__dict__
    return replaced


def _exchanging_names(config: Any, function: types.FunctionType) -> dict[str, Any]:
    names, scope = function.__code__.co_names, function.__globals__
    if "scaled_dot_product_attention" not in names or scope.get("F") is not F:
        return {}
    functions = {name: value for name, value in vars(F).items() if not name.startswith("__")}
    functions["scaled_dot_product_attention"] = _exchanging_attention(config)
    return {"F": types.SimpleNamespace(**functions)}


def _exchanging_attention(config: Any) -> Callable:
    """Return ``scaled_dot_product_attention`` for ``[B, H, N, D]`` with the tokens of one rank."""
    from diffusers.models._modeling_parallel import ParallelConfig
    from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

    options = {"backend": AttentionBackendName.NATIVE, "parallel_config": ParallelConfig(config)}

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        inputs = (x.transpose(1, 2) for x in (query, key, value))
        out = dispatch_attention_fn(*inputs, attn_mask, dropout_p, is_causal, scale, enable_gqa, **options)
        return out.transpose(1, 2)

    return scaled_dot_product_attention


def _with_own_mask(call: Callable, config: Any, text: str | None, mask_argument: str) -> Callable:
    """Return the call of a processor that gets the part of a mask of the tokens of this rank."""

    @functools.wraps(call)
    def call_with_own_mask(self, attn, hidden_states, encoder_hidden_states=None, *args, **kwargs):
        mask, lengths = kwargs.get(mask_argument), [hidden_states.shape[1], encoder_hidden_states.shape[1]]
        if isinstance(mask, Tensor) and mask.shape[-1] != sum(lengths):
            lengths = lengths if text == "after" else lengths[::-1]
            kwargs[mask_argument] = own_mask(mask, lengths, config)
        return call(self, attn, hidden_states, encoder_hidden_states, *args, **kwargs)

    return call_with_own_mask


def own_mask(mask: Tensor, lengths: list[int], config: Any) -> Tensor:
    """Return the part of a mask over all keys ``[..., N]`` of the tokens of this rank.

    Args:
        mask: in the order of the model.
        lengths: tokens of this rank of each part of the sequence that was split.
        config: the ``ContextParallelConfig``.
    """
    from diffusers.models._modeling_parallel import gather_size_by_comm

    group, ranks = config._ulysses_mesh.get_group(), config.ulysses_degree
    rank = torch.distributed.get_rank(group)
    if config.ulysses_anything:
        lengths = [sum(gather_size_by_comm(length, group)) for length in lengths]
    else:
        lengths = [length * ranks for length in lengths]
    return torch.cat([part.tensor_split(ranks, -1)[rank] for part in mask.split(lengths, -1)], -1)
