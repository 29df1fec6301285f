"""Interception of a diffusers attention call: the only file that knows how it is done.

A module's processor is replaced by an instance of a subclass that shares its state, so projections, norms, RoPE, masks
and later additions of diffusers stay those of the model. During the processor's call one torch function is intercepted,
``scaled_dot_product_attention``, with ``[B, H, N, D]`` queries and keys after RoPE: every processor calls it, with or
without diffusers' dispatcher. Nothing of torch or diffusers is patched.
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

Attend = Callable[..., Tensor]  # attend(sdpa, q, k, v, ...), the arguments of the intercepted call after its function


def intercept_attention(module: nn.Module, attend: Callable[[], Attend | None]) -> Callable[[], None]:
    """Intercept the attention call of a module.

    Args:
        module: a diffusers attention module with a ``processor``.
        attend: called before every call of the processor. It returns the replacement of
            ``scaled_dot_product_attention``, or None to run the original processor.

    Returns:
        A function that restores the original processor.
    """
    original = module.processor
    module.processor = _intercepting_processor(original, attend)

    def undo() -> None:
        if getattr(module.processor, "dit_sparse_attend", None) is attend:
            module.processor = original

    return undo


def is_intercepted(module: nn.Module) -> bool:
    """Whether a module's attention call is intercepted."""
    return hasattr(getattr(module, "processor", None), "dit_sparse_attend")


def _intercepting_processor(processor: Any, attend: Callable[[], Attend | None]) -> Any:
    """Return an instance of an intercepting subclass that shares the ``__dict__`` of the original processor, so that
    what diffusers sets on one (a backend, a parallel configuration) is set on both."""
    intercepting = object.__new__(_intercepting_class(type(processor)))
    intercepting.__dict__ = processor.__dict__
    intercepting.dit_sparse_attend = attend
    return intercepting


@functools.cache
def _intercepting_class(original: type) -> type:
    """Return a subclass of a processor class whose call intercepts ``scaled_dot_product_attention``."""

    # diffusers drops every keyword that the processor's __call__ does not name: the signature must stay visible.
    @functools.wraps(original.__call__)
    def call(self, *args, **kwargs):
        attend = self.dit_sparse_attend()
        if attend is None:
            return original.__call__(self, *args, **kwargs)
        with _native_backend(self), _SDPAInterceptor(attend):
            return original.__call__(self, *args, **kwargs)

    members = {
        "__slots__": ("dit_sparse_attend",),
        "__call__": torch.compiler.disable(call),
        "__doc__": original.__doc__,
    }
    return type(f"Sparse{original.__name__}", (original,), members)


class _SDPAInterceptor(TorchFunctionMode):
    """Passes ``scaled_dot_product_attention`` calls to ``attend``. torch suspends the mode during ``attend``."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self.attend = attend

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention:
            return self.attend(function, *args, **(kwargs or {}))
        return function(*args, **(kwargs or {}))


@contextmanager
def _native_backend(processor: Any):
    """Select diffusers' native backend, the only one that calls torch's function, and restore the user's choice."""
    if not hasattr(processor, "_attention_backend"):
        yield
        return
    state, unset = processor.__dict__, object()
    backend = state.get("_attention_backend", unset)
    state["_attention_backend"] = "native"
    try:
        yield
    finally:
        if backend is unset:
            del state["_attention_backend"]
        else:
            state["_attention_backend"] = backend
