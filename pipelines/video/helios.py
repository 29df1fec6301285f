"""Helios: self-attention over history frames at three scales and the frames to generate; text by cross-attention.

History frames are reference tokens: they attend to all tokens and all tokens attend to them.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, history_tokens, patch_grid, pipeline_class

HISTORY = {"latents_history_short": 1, "latents_history_mid": 2, "latents_history_long": 4}

FAMILY = Family(
    name="helios",
    fps=24,
    transformers=("HeliosTransformer3DModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, config["patch_size"]),
    references=lambda config, arguments: (history_tokens(arguments, HISTORY, config["patch_size"]), 0),
    pipelines=("HeliosPipeline", "HeliosPyramidPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
