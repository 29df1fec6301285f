"""HunyuanVideo 1.5: joint self-attention over video, image and text tokens, text last and padded at the end."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class

FAMILY = Family(
    name="hunyuan_video15",
    fps=24,
    transformers=("HunyuanVideo15Transformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: patch_grid(
        arguments, (config["patch_size_t"], config["patch_size"], config["patch_size"])
    ),
    text="after",
    mask="attention_mask",
    pipelines=("HunyuanVideo15Pipeline", "HunyuanVideo15ImageToVideoPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
