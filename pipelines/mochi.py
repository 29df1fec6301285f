"""Mochi: video and text attend jointly, text after the video. The model drops padded text itself and attends one batch
item at a time, so calls of one step may differ in length."""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, channels_first, stock_pipeline

FAMILY = Family(
    name="mochi",
    transformers=("MochiTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: channels_first(arguments, (1, config["patch_size"], config["patch_size"])),
    text="after",
    pipelines=("MochiPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return stock_pipeline(__name__, FAMILY, name)
