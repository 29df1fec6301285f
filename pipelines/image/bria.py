"""Bria 3.2, Bria FIBO and FIBO 2: joint self-attention over text and image tokens, text first.

The text tokens of FIBO 2 come from its perceiver. Batches in which their number differs have them after the image and
stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import (
    Family,
    GridShape,
    merged_grid,
    merged_references,
    packed_shapes,
    pipeline_class,
)


def _shapes(config: Mapping, arguments: Mapping) -> list[GridShape]:
    """Return the sizes of the image and of its references in tokens."""
    if (ids := arguments.get("img_ids")) is not None:
        return packed_shapes(ids)
    images, patch = [arguments["hidden_states"], *(arguments.get("context_latents") or ())], config["patch_size"]
    return [(1, image.shape[-2] // patch, image.shape[-1] // patch) for image in images]


FAMILY = Family(
    name="bria",
    transformers=("BriaTransformer2DModel", "BriaFiboTransformer2DModel", "BriaFibo2Transformer2DModel"),
    sites=r"((single_)?transformer_blocks\.\d+\.attn|layers\.\d+\.attention)",
    grid=lambda config, arguments: merged_grid(_shapes(config, arguments)),
    references=lambda config, arguments: merged_references(_shapes(config, arguments)),
    text="before",
    reads=("img_ids",),
    images=True,
    pipelines=("BriaPipeline", "BriaFiboPipeline", "BriaFiboEditPipeline", "BriaFibo2Pipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
