"""AuraFlow: joint self-attention over 8 registers, text and image tokens, in this order."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, image_grid, pipeline_class

FAMILY = Family(
    name="aura_flow",
    transformers=("AuraFlowTransformer2DModel",),
    sites=r"(joint|single)_transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: image_grid(arguments, config["patch_size"]),
    references=lambda config, arguments: (8, 0),
    text="before",
    images=True,
    pipelines=("AuraFlowPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
