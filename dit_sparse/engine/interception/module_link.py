"""Intercept the attention calls of a plain torch module, which has no processor.

The module's forward is replaced on this one instance by the same code with one global name replaced: the name of the
attention function. The code of functions of the same package that the forward calls is searched, too. Nothing is
patched globally, and removing the replacement restores the module exactly.
"""

from __future__ import annotations

import threading
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..forward import AttentionCall
from .forward_hook import InstanceMethod
from .module_calls import read_call
from .replacement import replace_globals

SDPA = "scaled_dot_product_attention"


class ModuleLink:
    """Connects one module to the run that computes its attention calls.

    Args:
        attend: computes a call.
        report_missed: called with a reason if the forward ran and none of its attention calls was intercepted.
        call, heads_first: as in `ModuleAdapter`.
    """

    def __init__(
        self,
        attend: Callable[[AttentionCall], Tensor],
        report_missed: Callable[[str], None],
        call: str | None,
        heads_first: bool,
    ) -> None:
        self.attend: Callable[[AttentionCall], Tensor] | None = attend
        self.report_missed, self.call, self.heads_first = report_missed, call, heads_first
        self._method: InstanceMethod | None = None
        self._local = threading.local()  # calls of this thread: how many were intercepted, why the last was not

    def install(self, module: nn.Module) -> None:
        """Intercept the calls of ``module``, unless they are already.

        Raises:
            ValueError: the forward of the module does not call the attention function.
        """
        if self._method is None:
            self._method = InstanceMethod(module, "forward", self._intercept)
            self._method.dit_sparse_link = self

    def remove(self, module: nn.Module) -> None:
        """Restore the module's forward."""
        if self._method is not None:
            self._method.remove()
        self.attend = self.report_missed = self._method = None

    def _intercept(self, stock: Any) -> Callable:
        """Return a forward that runs the code of ``stock`` with its attention function replaced."""
        name, owner = self.call or f"F.{SDPA}", getattr(stock, "__self__", None)
        if owner is None:
            reason = "other code, such as CPU offloading, has replaced the forward of an attention module"
            raise ValueError(f"{reason}: make the model sparse before")
        code = replace_globals(stock.__func__, self._choose)
        if code is None:
            raise ValueError(
                f"the forward of {type(owner).__name__} does not call {name}: pass the name of its attention function "
                "as call=, or the names of the modules that call it as sites="
            )
        missed = f"{type(owner).__name__} made no call of {name} that can be intercepted"

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.attend is None:  # the run has ended
                return stock(*args, **kwargs)
            before, self._local.reason = self._calls, None
            output = code(owner, *args, **kwargs)
            if self._calls == before:
                self.report_missed(self._local.reason or missed)
            return output

        return forward

    @property
    def _calls(self) -> int:
        return getattr(self._local, "calls", 0)

    def _choose(self, function: types.FunctionType, seen: frozenset = frozenset()) -> dict[str, Any]:
        """Return the new values of the names in the code of a function that lead to its attention function."""
        names, scope = function.__code__.co_names, function.__globals__
        values = {name: scope[name] for name in names if name in scope}
        if self.call is not None:
            found = {self.call: self._own_function(values[self.call])} if self.call in values else {}
        else:
            found = {name: _with_sdpa(value, names, self._sdpa) for name, value in values.items()}
            found = {name: value for name, value in found.items() if value is not None}
        seen, package = seen | {function.__code__}, _package(function)
        for name, value in values.items():
            is_own = isinstance(value, types.FunctionType) and _package(value) == package
            if name not in found and is_own and value.__code__ not in seen:
                copy = replace_globals(value, lambda inner: self._choose(inner, seen))
                found |= {} if copy is None else {name: copy}
        return found

    def _attend(self, call: AttentionCall) -> Tensor:
        if self.attend is None or call.q.shape[2] != call.k.shape[2]:  # cross-attention
            return call.stock()
        self._local.calls = self._calls + 1
        return self.attend(call)

    def _sdpa(
        self, query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ) -> Tensor:
        options = {"scale": scale, "enable_gqa": enable_gqa}
        stock = lambda: F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if query.ndim == 4:
            return self._attend(AttentionCall(query, key, value, attn_mask, is_causal, dropout_p, scale, stock))
        if query.ndim != 3 or attn_mask is not None:
            return stock()
        inputs = (x[None] for x in (query, key, value))
        return self._attend(AttentionCall(*inputs, None, is_causal, dropout_p, scale, lambda: stock()[None]))[0]

    def _own_function(self, function: Callable) -> Callable:
        """Return the attention function of the model with its calls intercepted."""

        def attention(*args: Any, **kwargs: Any) -> Any:
            call = None if self.attend is None else read_call(function, self.heads_first, args, kwargs)
            if call is None or isinstance(call, str):
                self._local.reason = call
                return function(*args, **kwargs)
            stock = lambda: call.read(function(*args, **kwargs))
            attention_call = AttentionCall(
                call.q, call.k, call.v, None, False, 0.0, call.scale, stock, is_checked=False
            )
            return call.write(self._attend(attention_call))

        return attention


def link_of(module: nn.Module) -> ModuleLink | None:
    """Return the active link of a plain module, or None."""
    link = getattr(module.__dict__.get("forward"), "dit_sparse_link", None)
    return link if link is not None and link.attend is not None else None


class _ModuleProxy:
    """A module of Python with some attributes replaced."""

    def __init__(self, target: types.ModuleType, **replaced: Any) -> None:
        self.__dict__.update(replaced, _target=target)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._target, name)


def _with_sdpa(value: Any, names: tuple[str, ...], sdpa: Callable) -> Any:
    """Return the value of a global name with PyTorch's attention replaced by ``sdpa``, or None if it does not hold it.

    Args:
        value: of the global.
        names: of the code, which tell the attributes that it may read.
    """
    if value is F.scaled_dot_product_attention:
        return sdpa
    if SDPA not in names or not isinstance(value, types.ModuleType):
        return None
    functional = _ModuleProxy(F, **{SDPA: sdpa})
    if value is F:
        return functional
    if value is nn and "functional" in names:
        return _ModuleProxy(nn, functional=functional)
    if value is torch and {"nn", "functional"} <= set(names):
        return _ModuleProxy(torch, nn=_ModuleProxy(nn, functional=functional))
    return None


def _package(function: types.FunctionType) -> str:
    return (function.__module__ or "").split(".")[0]
