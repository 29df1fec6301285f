"""ModuleAdapter: the declaration of a plain torch module whose self-attention is made sparse, such as the denoisers of
3-D generators that are not in diffusers.

To add one, write ``pipelines/three_d/<name>.py`` with a module-level ``ADAPTER = ModuleAdapter(...)`` and add the name
to ``ADAPTERS``.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from dit_sparse.grid import BaseGrid
from dit_sparse.pipelines.family import Family, class_names

ADAPTERS = ("trellis", "ultrashape", "actionmesh", "hunyuan3d", "hunyuan3d21", "triposg", "partcrafter")

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class ModuleAdapter:
    """How to make a plain torch module sparse, passed as ``family=``.

    Attributes:
        sites: regular expression that matches the full names of all self-attention modules and of no other module. The
            class of a cross-attention module may be the same; its name is not.
        grid: ``grid(arguments)`` returns the tokens of a forward call: a `Grid` or `VoxelGrid`, or a sequence with one
            for each batch item. ``arguments`` are the arguments of the module's forward, by name, and the module
            itself as ``arguments["self"]``.
        step: ``step(arguments)`` returns the timestep of a forward call, a number or a tensor. A new value is a new
            denoising step, and the value of the first step starts a new generation.
        call: name of the function that computes attention in the file of the attention modules, such as
            ``"sparse_scaled_dot_product_attention"``. Its arguments are q, k and v, or one argument with all three:
            a tensor ``[T, 3, H, D]`` or ``[B, N, 3, H, D]``, or an object with such ``feats``. None:
            ``scaled_dot_product_attention`` of PyTorch, under any name.
        heads_first: whether q, k and v of the function ``call`` are ``[B, H, N, D]``, as in PyTorch, or
            ``[B, N, H, D]``, as in flash-attn. Sequences without a batch are ``[T, H, D]`` in both cases.
        transformers: class names of the modules that it is for; empty: any class.
        name: for messages.
        steps: number of denoising steps, used if neither the user nor the scheduler of a pipeline gives it.
    """

    sites: str
    grid: Callable[[Arguments], BaseGrid | Sequence[BaseGrid]]
    step: Callable[[Arguments], Any]
    call: str | None = None
    heads_first: bool = True
    transformers: tuple[str, ...] = ()
    name: str = "module"
    steps: int | None = None
    text: ClassVar[None] = None
    mask: ClassVar[None] = None
    cached_keys: ClassVar[bool] = False
    packed_text: ClassVar[bool] = False

    def supports(self, class_names: set[str]) -> bool:
        """Return whether the adapter is for a module with these names of its class and base classes."""
        return not self.transformers or not class_names.isdisjoint(self.transformers)


AnyFamily = Family | ModuleAdapter


def adapter_of(module: object) -> ModuleAdapter | None:
    """Return the adapter of a module by the names of its class and base classes, or None if there is none."""
    names = class_names(type(module))
    adapters = (importlib.import_module(f"dit_sparse.pipelines.three_d.{name}").ADAPTER for name in ADAPTERS)
    return next((adapter for adapter in adapters if adapter.supports(names)), None)
