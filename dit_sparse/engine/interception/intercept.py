"""Intercept the attention calls of a diffusers attention module.

The module's processor is replaced by an instance of a subclass that shares its state. Its ``__call__`` runs the
processor's own code with one global name replaced: ``dispatch_attention_fn``, or ``F`` where the processor calls
``F.scaled_dot_product_attention``. Projections, norms, RoPE and masks stay the model's own, and no module is patched.
If the name cannot be replaced, the processor is not changed, and a hook of the module counts its calls. Under
``torch.compile`` the replacement is a custom operator, so that blocks compile with ``fullgraph=True`` and the plan is
still chosen at run time.

A copy or a pickle of an intercepting processor is an unmodified processor.

"""

from __future__ import annotations

import functools
import itertools
import threading
import types
from collections.abc import Callable
from dataclasses import replace
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..forward import AttentionCall, chosen_backend
from .forward_hook import HookCallback
from .parallel import attend_in_parallel
from .replacement import replace_globals


class Interception:
    """Connects one attention module to the run that computes its attention calls.

    Args:
        attend: computes a call.
        report_missed: called with a reason if the processor ran and none of its attention calls was intercepted.
        mask_argument: name of the processor's argument from which all layers compute the same mask, or None.

    Attributes:
        number: identifies this object inside a compiled graph. A 0-d tensor, because Dynamo would compile a graph for
            every value of an int.
    """

    _numbers = itertools.count()
    _links: ClassVar[WeakValueDictionary[int, Interception]] = WeakValueDictionary()

    def __init__(
        self,
        attend: Callable[[AttentionCall], Tensor],
        report_missed: Callable[[str], None],
        mask_argument: str | None = None,
    ) -> None:
        number = next(self._numbers)
        self.number, self._links[number] = torch.tensor(number), self
        self.attend: Callable[[AttentionCall], Tensor] | None = attend
        self.report_missed, self.mask_argument = report_missed, mask_argument
        self.stock_processor: Any = None
        self._hook: RemovableHandle | None = None

    @property
    def active(self) -> bool:
        return self.attend is not None

    def install(self, module: nn.Module) -> None:
        """Intercept the calls of ``module``, or count them if that is not possible."""
        if interception_of(module) is self:
            return
        intercepting = _intercepting_class(type(module.processor))
        if intercepting is None:
            hook = HookCallback(self._count_call)
            self._hook = self._hook or module.register_forward_pre_hook(hook, with_kwargs=True)
            _register_operators()
            return
        self._remove_hook()
        _register_operators()
        self.stock_processor = module.processor
        processor = object.__new__(intercepting)
        processor.__dict__ = self.stock_processor.__dict__  # shared, so that a backend set by diffusers applies to both
        processor.dit_sparse_interception = self
        module.processor = processor

    def remove(self, module: nn.Module) -> None:
        """Restore the module's processor, unless it was replaced by another one, and disconnect all copies."""
        if interception_of(module) is self:
            module.processor = self.stock_processor
        self._remove_hook()
        self.attend = self.report_missed = self.stock_processor = None

    def _remove_hook(self) -> None:
        if self._hook is not None:
            self._hook.remove()
        self._hook = None

    def _count_call(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if interception_of(module) is self:
            return None
        processor = module.processor
        name = getattr(processor, "__name__", type(processor).__name__)
        reason = f"{name} calls no attention function that can be intercepted"
        if not torch.compiler.is_compiling():
            self.report_missed(reason)
        elif args:
            return (torch.ops.dit_sparse.count_missed(args[0], self.number, reason), *args[1:]), kwargs
        else:
            first = next(iter(kwargs))
            return args, kwargs | {first: torch.ops.dit_sparse.count_missed(kwargs[first], self.number, reason)}
        return None

    def compute(self, call: AttentionCall) -> Tensor:
        return call.stock() if self.attend is None else self.attend(call)


def interception_of(module: nn.Module) -> Interception | None:
    """Return the active interception of an attention module, or None."""
    interception = getattr(getattr(module, "processor", None), "dit_sparse_interception", None)
    return interception if interception is not None and interception.active else None


@functools.cache
def _intercepting_class(stock: type) -> type | None:
    """Return the subclass of a processor's class that intercepts its attention calls, or None if that is impossible."""
    code = replace_globals(stock.__call__, _attention_names)
    if code is None or not stock.__dictoffset__:
        return None

    # diffusers drops every keyword argument that is not in the signature of the processor's __call__.
    @functools.wraps(stock.__call__)
    def call(self, *args, **kwargs):
        interception = self.dit_sparse_interception
        if interception.attend is None:  # the run has ended
            return stock.__call__(self, *args, **kwargs)
        if torch.compiler.is_compiling():
            _tracing.number = interception.number
            return code(self, *args, **kwargs)
        outer, _active.interception, _active.calls = _active.interception, interception, 0
        _active.mask_source = kwargs.get(interception.mask_argument)
        try:
            output = code(self, *args, **kwargs)
        finally:
            _active.interception = outer
        if not _active.calls:
            interception.report_missed(f"{stock.__name__} made no attention call that can be intercepted")
        return output

    def reduce(self, protocol):
        return _new_instance, (stock,), dict(self.__dict__)

    members = {"__slots__": ("dit_sparse_interception",), "__call__": call, "__reduce_ex__": reduce}
    try:
        intercepting = type(f"Sparse{stock.__name__}", (stock,), members | {"__doc__": stock.__doc__})
        object.__new__(intercepting)
    except Exception:  # the class cannot be subclassed, or it extends a built-in type
        return None
    return intercepting


def _new_instance(stock: type) -> Any:
    return object.__new__(stock)


def _attention_names(function: types.FunctionType) -> dict[str, Any]:
    """Return the replacement of the attention function that a processor's code calls; empty if it calls none."""
    names, scope = function.__code__.co_names, function.__globals__
    if "dispatch_attention_fn" in names and "dispatch_attention_fn" in scope:
        return {"dispatch_attention_fn": _intercepting_dispatcher(scope["dispatch_attention_fn"])}
    if "F" in names and "scaled_dot_product_attention" in names:
        attention = getattr(scope["F"], "scaled_dot_product_attention", None)
        return {"F": _intercepting_functional(None if scope["F"] is F else attention)}
    return {}


@functools.cache
def _intercepting_dispatcher(dispatch: Callable) -> Callable:
    """Return diffusers' ``dispatch_attention_fn``, whose tensors are ``[B, N, H, D]``, with its calls intercepted."""

    def dispatch_attention_fn(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False,
        attention_kwargs=None, *, backend=None, parallel_config=None,
    ):  # fmt: skip
        def stock():
            return dispatch(
                query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, attention_kwargs,
                backend=backend, parallel_config=parallel_config,
            )  # fmt: skip

        q, k, v = (x.transpose(1, 2) for x in (query, key, value))
        if torch.compiler.is_compiling():
            if not (attn_mask is None or isinstance(attn_mask, Tensor)):
                reason = f"a compiled graph cannot pass on a {type(attn_mask).__name__}"
                query = torch.ops.dit_sparse.count_missed(query, _tracing.number, reason)
                return stock()
            name = None if backend is None else str(getattr(backend, "value", backend))
            call = (q, k, v, attn_mask, _tracing.number, dropout_p, is_causal, scale, enable_gqa, name)
            return torch.ops.dit_sparse.attend(*call).transpose(1, 2)
        call = AttentionCall(
            q, k, v, attn_mask, is_causal, dropout_p, scale, lambda: stock().transpose(1, 2), chosen_backend(backend)
        )
        return attend_in_parallel(call, enable_gqa, parallel_config, _compute_active).transpose(1, 2)

    return dispatch_attention_fn


@functools.cache
def _intercepting_functional(replaced: Callable | None) -> types.SimpleNamespace:
    """Return ``torch.nn.functional`` with ``scaled_dot_product_attention`` intercepted.

    Args:
        replaced: the function that the processor calls in its place, or None.
    """

    def scaled_dot_product_attention(
        query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    ):
        if torch.compiler.is_compiling():
            call = (query, key, value, attn_mask, _tracing.number, dropout_p, is_causal, scale, enable_gqa, None)
            return torch.ops.dit_sparse.attend(*call)
        options = {"scale": scale, "enable_gqa": enable_gqa}
        attend = replaced or F.scaled_dot_product_attention
        stock = lambda: attend(query, key, value, attn_mask, dropout_p, is_causal, **options)
        call = AttentionCall(query, key, value, attn_mask, is_causal, dropout_p, scale, stock)
        return attend_in_parallel(call, enable_gqa, _parallel_config_of(_active.interception), _compute_active)

    functions = {name: value for name, value in vars(F).items() if not name.startswith("__")}
    return types.SimpleNamespace(**functions | {"scaled_dot_product_attention": scaled_dot_product_attention})


class _ActiveInterception(threading.local):
    """The interception whose processor is running in this thread, and the number of its attention calls so far."""

    interception: Interception | None = None
    calls = 0
    mask_source: Tensor | None = None


class _TracedInterception:
    """The number of the interception that Dynamo is tracing. Not thread-local, because Dynamo cannot read
    thread-locals."""

    number: Tensor | None = None


_active, _tracing = _ActiveInterception(), _TracedInterception()


def _compute_active(call: AttentionCall) -> Tensor:
    _active.calls += 1
    if _active.interception is None:
        return call.stock()
    return _active.interception.compute(replace(call, mask_source=_active.mask_source))


def _parallel_config_of(interception: Interception | None) -> Any:
    return getattr(getattr(interception, "stock_processor", None), "_parallel_config", None)


@functools.cache
def _register_operators() -> None:
    """Register the operators of compiled graphs: ``torch.ops.dit_sparse.attend``, an intercepted call, and
    ``count_missed``, which copies a tensor and counts a call that cannot be intercepted."""

    @torch.library.custom_op("dit_sparse::count_missed", mutates_args=())
    def count_missed(x: Tensor, number: Tensor, reason: str) -> Tensor:
        interception = Interception._links.get(int(number))
        if interception is not None and interception.active:
            interception.report_missed(reason)
        return x.clone()

    @count_missed.register_fake
    def _(x, number, reason):
        return torch.empty_like(x)

    @torch.library.custom_op("dit_sparse::attend", mutates_args=())
    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, number: Tensor, dropout_p: float, is_causal: bool,
        scale: float | None, enable_gqa: bool, backend: str | None,
    ) -> Tensor:  # fmt: skip
        interception = Interception._links.get(int(number))
        parallel = _parallel_config_of(interception)

        def stock() -> Tensor:
            from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn

            name = None if backend is None else AttentionBackendName(backend)
            inputs = (*(x.transpose(1, 2) for x in (q, k, v)), mask, dropout_p, is_causal, scale, enable_gqa)
            return dispatch_attention_fn(*inputs, backend=name, parallel_config=parallel).transpose(1, 2)

        call = AttentionCall(q, k, v, mask, is_causal, dropout_p, scale, stock, chosen_backend(backend))
        compute = (lambda call: call.stock()) if interception is None else interception.compute
        return attend_in_parallel(call, enable_gqa, parallel, compute).contiguous()

    @attend.register_fake
    def _(q, k, v, mask, number, dropout_p, is_causal, scale, enable_gqa, backend):
        return q.new_empty(*q.shape[:-1], v.shape[-1])
