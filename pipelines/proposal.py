"""Propose a family for a transformer class without an adapter, by its structure."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping

from torch import nn

from dit_sparse.pipelines.family import (
    Family,
    GridShape,
    class_names,
    image_grid,
    merged_grid,
    packed_shapes,
    patch_grid,
    patch_size,
)
from dit_sparse.pipelines.unsupported import why_unsupported

OTHER_STREAMS = re.compile(r"refiner|perceiver|embedder|text|txt|audio|context|fusion|motion|face|cross|cond\b")
TEXT = re.compile(r"encoder|txt|text|context|cap_|_t$")
CONCATENATION = re.compile(r"torch\.cat\(\s*[\[(]\s*([\w.]+)[^,\])]*,\s*([\w.]+)")


def propose_family(transformer: nn.Module) -> Family | None:
    """Return a family that fits the structure of a transformer, to be checked by the user.

    The sites are the attention modules of repeated blocks, without cross-attention and without the blocks of other
    streams. The position of the text is read from the source of the processors, and the token grid is expected in the
    arguments that diffusers' transformers share.

    Args:
        transformer: a diffusers transformer of any class.

    Returns:
        The family, or None if the transformer has no such module or no latents.
    """
    arguments = [name for name in inspect.signature(type(transformer).forward).parameters if name != "self"]
    modules = {path: module for path, module in transformer.named_modules() if _is_self_attention(path, module)}
    if not modules or not arguments:
        return None
    first = lambda *names: next((name for name in names if name in arguments), names[0])
    return Family(
        name=re.sub(r"(transformer|model|[23]d)+", "", type(transformer).__name__.lower()) or "custom",
        transformers=(type(transformer).__name__,),
        sites="|".join(sorted({re.sub(r"\\\.\d+(?=\\\.|$)", r"\\.\\d+", re.escape(path)) for path in modules})),
        grid=_grid_reader(arguments),
        text=_text_side(transformer, modules),
        timestep=first("timestep", "timesteps", "t"),
        latents=first("hidden_states", arguments[0]),
    )


def no_adapter_message(transformer: nn.Module, family: Family | None = None) -> str:
    """Return the error message for a transformer without an adapter: the reason, or a proposed family.

    Args:
        transformer: the transformer.
        family: the family that the user gave for other classes, or None.
    """
    name = type(transformer).__name__
    if family is not None:
        return f"the family {family.name!r} is for {', '.join(family.transformers)}, got the transformer {name}"
    message = f"no adapter in dit_sparse/pipelines supports {name}"
    if reason := why_unsupported(class_names(type(transformer))):
        return f"{message}: {reason}"
    if proposal := propose_family(transformer):
        text = f"text {proposal.text}" if proposal.text else "no text"
        found = f"sites {proposal.sites!r}, {text} in self-attention"
        return f"{message}; pass family=dit_sparse.propose_family(model) after checking the proposal: {found}"
    return f"{message}; pass family=dit_sparse.ModuleAdapter(...) for a plain torch module, or use dit_sparse.attention"


def _is_self_attention(path: str, module: nn.Module) -> bool:
    """Return whether a module is an attention module with a processor, in repeated blocks, over the latents."""
    if not hasattr(module, "processor") or not re.search(r"\.\d+\.", path) or OTHER_STREAMS.search(path):
        return False
    return not getattr(module, "is_cross_attention", False) and not path.endswith("attn2")


def _text_side(transformer: nn.Module, modules: Mapping[str, nn.Module]) -> str | None:
    """Return the side of the text in the first concatenation of text and latents in the source, or None."""
    processors = {type(module.processor) for module in modules.values()}
    functions = [*(cls.__call__ for cls in processors), type(transformer).forward]
    for function in functions:
        for left, right in CONCATENATION.findall(_source(function)):
            sides = bool(TEXT.search(left)), bool(TEXT.search(right))
            if sides[0] != sides[1] and "mask" not in left + right:
                return "before" if sides[0] else "after"
    return None


def _source(function: Callable) -> str:
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return ""


def _grid_reader(names: list[str]) -> Callable[[Mapping, Mapping], GridShape]:
    """Return the function that reads the token grid from the arguments with these names."""
    if "img_ids" in names:
        return _grid_of_ids
    if "img_shapes" in names:
        return lambda config, arguments: merged_grid(arguments["img_shapes"][0])
    if {"num_frames", "height", "width"} <= set(names):
        return lambda config, arguments: (arguments["num_frames"], arguments["height"], arguments["width"])
    return _grid_of_latents


def _grid_of_ids(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of position ids, or of the latents if a call has none."""
    ids = arguments.get("img_ids")
    return _grid_of_latents(config, arguments) if ids is None else merged_grid(packed_shapes(ids))


def _grid_of_latents(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, C, F, H, W]`` or ``[B, C, H, W]``."""
    patch = patch_size(config)
    return image_grid(arguments, patch[-1]) if arguments["hidden_states"].ndim == 4 else patch_grid(arguments, patch)
