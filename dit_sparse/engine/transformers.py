"""Find the transformers of a model: those of a diffusers pipeline, and the plain modules of any other object."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from ..pipelines.family import class_names, family_of
from ..pipelines.module_adapter import AnyFamily, ModuleAdapter, adapter_of
from ..pipelines.proposal import no_adapter_message

Transformer = tuple[str, nn.Module, nn.Module, AnyFamily]


def find_transformers(model: Any, family: AnyFamily | None) -> list[Transformer]:
    """Return name, wrapper, module and family of every transformer of a pipeline, or of the bare transformer.

    In objects other than diffusers pipelines, and in modules of unknown classes, the modules that have an adapter are
    found by their class names.

    Args:
        model: a pipeline, a transformer, or an object that holds models.
        family: adapter of the user, or None.

    Raises:
        ValueError: there is no transformer, or no adapter for it.
    """
    if isinstance(model, type):
        raise ValueError(f"a model must be a pipeline or transformer, got the class {model.__name__}")
    components = model.components if hasattr(model, "components") else {"transformer": model}
    transformers = [
        (name, *_unwrap(component, family))
        for name, component in components.items()
        if name.startswith("transformer") and isinstance(component, nn.Module)
    ]
    unknown = [transformer for _, _, transformer in transformers if _family_of(transformer, family) is None]
    if transformers and not unknown:
        return [(*parts, _family_of(parts[-1], family)) for parts in transformers]
    if plain := _plain_modules(model, family):
        return plain
    if unknown:
        raise ValueError(no_adapter_message(unknown[0], family))
    raise ValueError(f"{type(model).__name__} has no transformer to make sparse")


def _family_of(transformer: nn.Module, family: AnyFamily | None) -> AnyFamily | None:
    """Return the family of a transformer: the user's if it names the class, else that of an adapter, or None."""
    if family is not None and family.supports(class_names(type(transformer))):
        return family
    return family_of(transformer) or adapter_of(transformer)


def _unwrap(module: nn.Module, family: AnyFamily | None) -> tuple[nn.Module, nn.Module]:
    """Return the module that the pipeline calls, and the transformer inside wrappers (torch.compile, DDP, PEFT)."""
    module = getattr(module, "_orig_mod", module)  # a compiled module calls the hooks of the module it wraps
    inner = module
    while _family_of(inner, family) is None:
        peft = getattr(getattr(inner, "base_model", None), "model", None)
        wrapped = (getattr(inner, "_orig_mod", None), getattr(inner, "module", None), peft)
        wrapped = [part for part in wrapped if isinstance(part, nn.Module)]
        if not wrapped:
            break
        inner = wrapped[0]
    return module, inner


def _plain_modules(model: Any, family: AnyFamily | None) -> list[Transformer]:
    """Return the modules with an adapter that an object holds as attributes, in dicts and lists or inside other
    modules, each once.

    Raises:
        ValueError: the adapter of the user names no class.
    """
    if isinstance(family, ModuleAdapter) and not family.transformers:
        reason = "which of its modules the adapter is for is unknown: name their classes as transformers="
        raise ValueError(f"{type(model).__name__} is no torch module, and {reason}")
    found: dict[int, Transformer] = {}
    for name, module in _held_modules(model):
        for path, part, adapter in _with_adapter(name, module, family):
            found.setdefault(id(part), (path, part, part, adapter))
    return list(found.values())


def _held_modules(model: Any) -> Iterator[tuple[str, nn.Module]]:
    if isinstance(model, nn.Module):
        yield "", model
        return
    for name, value in getattr(model, "__dict__", {}).items():
        parts = {name: value}
        if isinstance(value, Mapping):
            parts = {f"{name}.{key}": part for key, part in value.items()}
        elif isinstance(value, Sequence) and not isinstance(value, str):
            parts = {f"{name}.{index}": part for index, part in enumerate(value)}
        yield from ((path, part) for path, part in parts.items() if isinstance(part, nn.Module))


def _with_adapter(
    path: str, module: nn.Module, family: AnyFamily | None
) -> Iterator[tuple[str, nn.Module, ModuleAdapter]]:
    """Return path, module and adapter of the outermost modules that have one."""
    is_users = isinstance(family, ModuleAdapter) and family.supports(class_names(type(module)))
    if adapter := family if is_users else adapter_of(module):
        yield path, module, adapter
        return
    for name, child in module.named_children():
        yield from _with_adapter(f"{path}.{name}".lstrip("."), child, family)
