"""Read the q, k and v of an attention function of any layout, and write its output.

Recognized are three tensors, one tensor that holds all three, and objects with such ``feats``, as the sparse tensors of
3-D generators are. Calls with any other argument that has a value, such as position encodings, are not.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

INPUTS = ("qkv", "q", "k", "v", "query", "key", "value", "queries", "keys", "values")
SCALES = ("scale", "softmax_scale", "sm_scale")
LENGTHS = re.compile(r"cu_seqlens|max_seqlen|seqlens?")  # of packed items, which the grid gives


@dataclass(frozen=True)
class PackedCall:
    """The arguments of an attention function as q, k and v.

    Attributes:
        q, k, v: ``[B, H, N, D]``, with B = 1 for packed sequences.
        scale: factor of the scores; None: ``1 / sqrt(D)``.
        read: returns the output ``[B, H, N, D]`` that a result of the function holds.
        write: returns the result of the function for an output ``[B, H, N, D]``.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    scale: float | None
    read: Callable[[Any], Tensor]
    write: Callable[[Tensor], Any]


def read_call(function: Callable, heads_first: bool, args: Sequence, kwargs: Mapping) -> PackedCall | str:
    """Return a call of an attention function as q, k and v, or why that is not possible.

    Args:
        function: the attention function.
        heads_first: whether q, k and v are ``[B, H, N, D]`` or ``[B, N, H, D]``.
        args, kwargs: its arguments.
    """
    inputs, scale = [], None
    for name, value in _named(function, args, kwargs):
        if name in INPUTS or (name is None and len(inputs) < 3 and _feats(value) is not None):
            inputs.append(value)
        elif name in SCALES:
            scale = value
        elif not (value is None or (isinstance(value, bool | int | float) and not value) or _is_length(name)):
            return f"the attention function has the argument {name or type(value).__name__}"
    tensors = [_feats(one) for one in inputs]
    if any(one is None for one in tensors) or len(tensors) not in (1, 3):
        return f"the attention function has {len(tensors)} inputs"
    if len(tensors) == 1:
        axis = tensors[0].ndim - 3
        if axis not in (1, 2) or tensors[0].shape[axis] != 3:
            return f"the attention function has an input of shape {list(tensors[0].shape)}"
        tensors, heads_first = tensors[0].unbind(axis), False
    if len({one.ndim for one in tensors}) > 1 or tensors[0].ndim not in (3, 4):
        return f"the attention function has inputs of shape {list(tensors[0].shape)}"
    heads_first = heads_first and tensors[0].ndim == 4
    arrange = lambda x: x if heads_first else x.transpose(-3, -2)
    batched = lambda x: x[None] if x.ndim == 3 else x
    q, k, v = (batched(arrange(one)) for one in tensors)
    is_packed, wrap = tensors[0].ndim == 3, inputs[0]
    unpack = lambda result: batched(arrange(_feats(result)))

    def write(out: Tensor) -> Any:
        out = arrange(out[0] if is_packed else out).contiguous()
        return out if isinstance(wrap, Tensor) else wrap.replace(out)

    return PackedCall(q, k, v, scale, unpack, write)


def _named(function: Callable, args: Sequence, kwargs: Mapping) -> list[tuple[str | None, Any]]:
    """Return the arguments with their names; None for those of ``*args``."""
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except (TypeError, ValueError):
        parameters = []
    names = [one.name for one in parameters if one.kind in (one.POSITIONAL_ONLY, one.POSITIONAL_OR_KEYWORD)]
    names += [None] * (len(args) - len(names))
    return [*zip(names, args, strict=False), *kwargs.items()]


def _feats(value: Any) -> Tensor | None:
    value = getattr(value, "feats", value)
    return value if isinstance(value, Tensor) else None


def _is_length(name: str | None) -> bool:
    return name is not None and LENGTHS.match(name) is not None
