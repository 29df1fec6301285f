"""Chroma: joint self-attention over text and image tokens, text first."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, merged_grid, merged_references, packed_shapes, pipeline_class

FAMILY = Family(
    name="chroma",
    transformers=("ChromaTransformer2DModel",),
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: merged_grid(packed_shapes(arguments["img_ids"])),
    references=lambda config, arguments: merged_references(packed_shapes(arguments["img_ids"])),
    text="before",
    reads=("img_ids",),
    images=True,
    pipelines=(
        "ChromaPipeline",
        "ChromaImg2ImgPipeline",
        "ChromaInpaintPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
