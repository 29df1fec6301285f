"""EasyAnimate 5.1: joint self-attention over text and video tokens, text first."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, patch_size, pipeline_class

FAMILY = Family(
    name="easyanimate",
    fps=8,
    transformers=("EasyAnimateTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, patch_size(config)),
    text="before",
    pipelines=(
        "EasyAnimatePipeline",
        "EasyAnimateControlPipeline",
        "EasyAnimateInpaintPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
