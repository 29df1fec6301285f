"""Report the forward calls of one transformer to its run.

The hook is a plain forward pre-hook of the module. Offloading, caches and LoRA replace ``transformer.forward`` or
rebuild chains of hooks on it; a pre-hook remains in place, and removing it does not affect their changes. diffusers'
cache context and the end of a generation are observed by methods set on this one instance. Of plain modules the forward
itself is replaced on the instance.
"""

from __future__ import annotations

import functools
import inspect
import itertools
import threading
import types
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from ...pipelines.family import Family
from ..forward import TokenLayout
from ..items import ItemLayout


class ForwardHook:
    """Observe a transformer.

    Args:
        module: the transformer or its wrapper.
        transformer: the transformer itself.
        family: reads the token grid from the arguments of a call.
        begin: ``begin(timestep, latents, layout, context, compiled)`` is called before every forward call.
        end: called after every forward call that is not compiled and raised no error.
        reset: called when diffusers ends a generation.
    """

    _numbers = itertools.count()
    _hooks: ClassVar[WeakValueDictionary[int, ForwardHook]] = WeakValueDictionary()

    def __init__(
        self,
        module: nn.Module,
        transformer: nn.Module,
        family: Family,
        begin: Callable[[Any, Tensor, TokenLayout, Any, bool], None],
        end: Callable[[], None],
        reset: Callable[[], None],
    ) -> None:
        number = next(self._numbers)
        self.number, self._hooks[number] = torch.tensor(number), self
        self.begin, self.end, self.reset = begin, end, reset
        self._local = threading.local()
        self._config, self._family = getattr(transformer, "config", {}), family
        self._names = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
        self._handles = self._observe(module, transformer)
        self._methods = [
            InstanceMethod(transformer, name, wrapper)
            for name, wrapper in (("cache_context", self._cache_context), ("_reset_stateful_cache", self._reset))
            if hasattr(type(transformer), name)
        ]
        _register_operator()

    def remove(self) -> None:
        """Remove the hooks and methods of this object; those of other code stay."""
        for handle in (*self._handles, *self._methods):
            handle.remove()
        self.begin = self.end = self.reset = None
        self._handles, self._methods, self._config = [], [], None

    def _observe(self, module: nn.Module, transformer: nn.Module) -> list[Any]:
        return [
            module.register_forward_pre_hook(HookCallback(self._before), with_kwargs=True),
            module.register_forward_hook(HookCallback(self._after)),
        ]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        timestep, latents = arguments.get(self._family.timestep), arguments[self._family.latents]
        if not torch.compiler.is_compiling():
            self.begin(timestep, latents, self.layout(arguments), getattr(self._local, "context", None), False)
            return None
        # A compiled graph cannot read the timestep or the arguments that contain the grid: they pass through an
        # operator that reads them at run time.
        is_timestep = isinstance(timestep, Tensor)
        name = self._family.timestep if is_timestep else self._family.latents
        read = [arguments.get(one) for one in self._family.reads]
        sizes = [] if any(isinstance(one, Tensor) for one in read) else list(self._sizes(arguments))
        passed = torch.ops.dit_sparse.begin_forward(arguments[name], is_timestep, latents, sizes, read, self.number)
        if name in kwargs:
            return args, kwargs | {name: passed}
        place = self._names.index(name)
        return (*args[:place], passed, *args[place + 1 :]), kwargs

    def layout(self, arguments: Mapping[str, Any]) -> TokenLayout:
        """Return the tokens of a call with these arguments."""
        return TokenLayout(*self._sizes(arguments))

    def read_layout(self, latents: Tensor, read: Sequence[Tensor | None]) -> TokenLayout:
        """Return the tokens of a call from its latents and the arguments that the family reads."""
        return self.layout({self._family.latents: latents} | dict(zip(self._family.reads, read, strict=True)))

    def _sizes(self, arguments: Mapping[str, Any]) -> tuple[int, ...]:
        return *self._family.grid(self._config, arguments), *self._family.references(self._config, arguments)

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        if not torch.compiler.is_compiling():
            self.end()

    def _cache_context(self, stock: Callable) -> Callable:
        @contextmanager
        def cache_context(name: str, **fields: Any):
            with stock(name, **fields):
                outer = getattr(self._local, "context", None)
                self._local.context = types.SimpleNamespace(name=name, **fields)
                try:
                    yield
                finally:
                    self._local.context = outer

        return cache_context

    def _reset(self, stock: Callable) -> Callable:
        def reset_stateful_cache(*args: Any, **kwargs: Any) -> Any:
            self.reset()
            return stock(*args, **kwargs)

        return reset_stateful_cache


class ModuleHook(ForwardHook):
    """Observe a plain module by its adapter, a `ModuleAdapter`. A compiled one runs eagerly while it is sparse.

    The forward of the instance is replaced, because samplers may call ``module.forward(...)``, which runs no hooks.
    """

    def _observe(self, module: nn.Module, transformer: nn.Module) -> list[Any]:
        def wrapper(stock: Callable) -> Callable:
            @torch.compiler.disable
            def forward(*args: Any, **kwargs: Any) -> Any:
                self._before(transformer, args, kwargs)
                output = stock(*args, **kwargs)
                self._after(transformer, args, output)
                return output

            return forward

        return [InstanceMethod(transformer, "forward", wrapper)]

    def _before(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        arguments = dict(zip(self._names, args, strict=False)) | kwargs
        layout = ItemLayout.from_grids(self._family.grid(arguments | {"self": module}))
        latents = next(iter(arguments.values()), None)
        try:
            weakref.ref(latents)
        except TypeError:  # the branches of guidance cannot be told apart by their latents
            latents = self
        self.begin(self._family.step(arguments), latents, layout, None, False)


class HookCallback:
    """A forward hook. A copy or a pickle of it does nothing."""

    def __init__(self, function: Callable) -> None:
        self.function = function

    def __call__(self, *args: Any) -> Any:
        return self.function(*args)

    def __reduce__(self):
        return HookCallback, (_do_nothing,)


def _do_nothing(*args: Any) -> None:
    return None


class InstanceMethod:
    """A method replaced on one instance. A copy or a pickle of it is the method of the class."""

    def __init__(self, instance: object, name: str, wrapper: Callable[[Callable], Callable]) -> None:
        self.instance, self.name = instance, name
        self._before = instance.__dict__.get(name)
        self._call = wrapper(getattr(instance, name))
        instance.__dict__[name] = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._call(*args, **kwargs)

    def remove(self) -> None:
        """Restore the previous attribute, unless other code has replaced the method since."""
        if self.instance.__dict__.get(self.name) is self:
            del self.instance.__dict__[self.name]
            if self._before is not None:
                self.instance.__dict__[self.name] = self._before
        self._call = getattr(type(self.instance), self.name).__get__(self.instance)

    def __reduce__(self):
        return _bind, (getattr(type(self.instance), self.name), self.instance)


def _bind(function: Callable, instance: object) -> Callable:
    return types.MethodType(function, instance)


@functools.cache
def _register_operator() -> None:
    """Register ``torch.ops.dit_sparse.begin_forward``, the start of a forward call in a compiled graph."""

    @torch.library.custom_op("dit_sparse::begin_forward", mutates_args=())
    def begin_forward(
        passed: Tensor, is_timestep: bool, latents: Tensor, sizes: Sequence[int], read: Sequence[Tensor | None],
        number: Tensor,
    ) -> Tensor:  # fmt: skip
        hook = ForwardHook._hooks.get(int(number))
        if hook is not None and hook.begin is not None:
            context = getattr(hook._local, "context", None)
            layout = TokenLayout(*sizes) if sizes else hook.read_layout(latents, read)
            hook.begin(passed if is_timestep else None, latents, layout, context, True)
        return passed.clone()

    @begin_forward.register_fake
    def _(passed, is_timestep, latents, sizes, read, number):
        return torch.empty_like(passed)
