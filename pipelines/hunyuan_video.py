"""HunyuanVideo: joint self-attention over video and text tokens, text last and padded at the end.

The text refiner in the context embedder stays dense.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class

FAMILY = Family(
    name="hunyuan_video",
    fps=24,
    transformers=("HunyuanVideoTransformer3DModel",),
    size_multiple=16,
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: patch_grid(
        arguments, (config["patch_size_t"], config["patch_size"], config["patch_size"])
    ),
    text="after",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline", "HunyuanSkyreelsImageToVideoPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
