"""HunyuanVideo: video and text attend jointly, text after the video, its padding at the very end. The text refiner
inside the context embedder stays dense."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, channels_first, stock_pipeline

FAMILY = Family(
    name="hunyuan_video",
    transformers=("HunyuanVideoTransformer3DModel",),
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: channels_first(
        arguments, (config["patch_size_t"], config["patch_size"], config["patch_size"])
    ),
    text="after",
    pipelines=("HunyuanVideoPipeline", "HunyuanVideoImageToVideoPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
