"""What is to be known of a model family: which modules are self-attention, and where the token grid is read.

A family names its diffusers classes by string, so importing one imports nothing heavy. The mathematics of a method
never asks which family runs.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType

FAMILIES = ("wan", "hunyuan_video", "cogvideox", "mochi", "ltx")

Shape = tuple[int, int, int]


@dataclass(frozen=True)
class Family:
    """One family of diffusers transformers.

    Attributes:
        name: the file's name.
        transformers: class names of its transformers.
        sites: regular expression over module names that finds the self-attention modules, and nothing else.
        grid: frames, height and width of the video tokens, from the transformer's config and its call's arguments.
        text: on which side of the video tokens the text stands in self-attention; None: it is not there.
        pipelines: class names of its diffusers pipelines.
    """

    name: str
    transformers: tuple[str, ...]
    sites: str
    grid: Callable[[Mapping, Mapping], Shape]
    text: str | None = None
    pipelines: tuple[str, ...] = ()


def family_of(transformer: object) -> Family | None:
    """The family a transformer belongs to, by its class's name or a parent's; None when nobody knows it."""
    names = {cls.__name__ for cls in type(transformer).__mro__}
    families = (importlib.import_module(f"dit_sparse.pipelines.{name}").FAMILY for name in FAMILIES)
    return next((family for family in families if names & set(family.transformers)), None)


def channels_first(arguments: Mapping, patch: Shape) -> Shape:
    """Latents ``[B, C, F, H, W]`` cut into patches; a last patch that is not full is dropped, as Conv3d drops it."""
    frames, height, width = arguments["hidden_states"].shape[-3:]
    return frames // patch[0], height // patch[1], width // patch[2]


class SetAttnProcessor:
    """Gives a pipeline ``set_attn_processor``, the habit of diffusers' models. ``sparse_run`` is what runs now."""

    sparse_run = None

    def set_attn_processor(self, processor) -> None:
        """``processor``: a ``dit_sparse.SparseAttnProcessor``; None: back to the model's own processors, bit for bit;
        any other diffusers processor is handed to every transformer."""
        if self.sparse_run is not None:
            self.sparse_run.disable()
            self.__dict__["sparse_run"] = None
        if hasattr(processor, "attach"):
            self.__dict__["sparse_run"] = processor.attach(self)
        elif processor is not None:
            for name, part in self.components.items():
                if name.startswith("transformer") and part is not None:
                    part.set_attn_processor(processor)


def stock_pipeline(module: ModuleType | str, family: Family, name: str) -> type:
    """diffusers' own pipeline class of that name with ``set_attn_processor`` added; made when first asked for."""
    if name not in family.pipelines:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    import diffusers

    doc = f"diffusers.{name} with ``set_attn_processor``."
    return type(name, (SetAttnProcessor, getattr(diffusers, name)), {"__module__": module, "__doc__": doc})
