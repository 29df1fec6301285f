"""CogView 3 Plus and CogView 4: joint self-attention over text and image tokens, text first."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="cogview",
    transformers=("CogView3PlusTransformer2DModel", "CogView4Transformer2DModel"),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    text="before",
    images=True,
    pipelines=(
        "CogView3PlusPipeline",
        "CogView4Pipeline",
        "CogView4ControlPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
