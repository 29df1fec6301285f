"""Framepack of HunyuanVideo: history frames at three scales, the frames to generate, and text, which is last.

History frames are reference tokens: they attend to all tokens and all tokens attend to them.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, history_tokens, patch_grid, pipeline_class

HISTORY = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}

FAMILY = Family(
    name="framepack",
    fps=30,
    transformers=("HunyuanVideoFramepackTransformer3DModel",),
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: patch_grid(
        arguments, (config["patch_size_t"], config["patch_size"], config["patch_size"])
    ),
    text="after",
    references=lambda config, arguments: (history_tokens(arguments, HISTORY, (1, 2, 2)), 0),
    pipelines=("HunyuanVideoFramepackPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
