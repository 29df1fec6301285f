"""The only file that knows how a diffusers attention call is diverted.

A module's processor is replaced by one of a subclass that shares its state, so projections, norms, RoPE, masks and
whatever a later diffusers adds stay the model's own. During the processor's call one torch function is intercepted,
``scaled_dot_product_attention``: every processor, with or without diffusers' dispatcher, ends there with
``[B, H, N, D]`` queries and keys after RoPE. Nothing of torch or diffusers is patched.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

Attend = Callable[..., Tensor]  # attend(sdpa, q, k, v, ...): what the intercepted call becomes


def intercept_attention(module: nn.Module, attend: Callable[[], Attend | None]) -> Callable[[], None]:
    """Divert the attention call of one attention module; returns the function that puts the original back.

    Args:
        module: an attention module of diffusers, with a ``processor``.
        attend: asked before every call; what it returns takes the place of ``scaled_dot_product_attention``, or, if it
            returns None, the call runs as if nothing had been diverted.
    """
    original = module.processor
    module.processor = _intercepting_processor(original, attend)

    def undo() -> None:
        if getattr(module.processor, "dit_sparse_attend", None) is attend:
            module.processor = original

    return undo


def is_intercepted(module: nn.Module) -> bool:
    return hasattr(getattr(module, "processor", None), "dit_sparse_attend")


def _intercepting_processor(processor: Any, attend: Callable[[], Attend | None]) -> Any:
    """A processor of a diverted subclass that holds the very ``__dict__`` of the original, so that what diffusers sets
    on one (a backend, a parallel configuration) is set on both."""
    diverted = object.__new__(_intercepting_class(type(processor)))
    diverted.__dict__ = processor.__dict__
    diverted.dit_sparse_attend = attend
    return diverted


@functools.cache
def _intercepting_class(original: type) -> type:
    # diffusers drops every keyword that the processor's __call__ does not name: the signature must stay visible.
    @functools.wraps(original.__call__)
    def call(self, *args, **kwargs):
        attend = self.dit_sparse_attend()
        if attend is None:
            return original.__call__(self, *args, **kwargs)
        with _native_backend(self), _Interceptor(attend):
            return original.__call__(self, *args, **kwargs)

    members = {
        "__slots__": ("dit_sparse_attend",),
        "__call__": torch.compiler.disable(call),
        "__doc__": original.__doc__,
    }
    return type(f"Sparse{original.__name__}", (original,), members)


class _Interceptor(TorchFunctionMode):
    """Hands every ``scaled_dot_product_attention`` inside it to ``attend``; torch suspends the mode meanwhile."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.attend(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def _native_backend(processor: Any):
    """diffusers' dispatcher ends in torch's own function only with its native backend; the user's choice comes back."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    state = processor.__dict__
    chosen = state.get("_attention_backend", _native_backend)
    state["_attention_backend"] = "native"
    try:
        yield
    finally:
        if chosen is _native_backend:
            del state["_attention_backend"]
        else:
            state["_attention_backend"] = chosen
