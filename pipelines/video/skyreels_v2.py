"""SkyReels V2: text to video, image to video, diffusion forcing.

Self-attention is over video tokens only. Models with ``num_frame_per_block`` above 1 attend causally by groups of
frames.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class

FAMILY = Family(
    name="skyreels_v2",
    fps=24,
    transformers=("SkyReelsV2Transformer3DModel",),
    sites=r"blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, config["patch_size"]),
    pipelines=(
        "SkyReelsV2Pipeline",
        "SkyReelsV2ImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingPipeline",
        "SkyReelsV2DiffusionForcingImageToVideoPipeline",
        "SkyReelsV2DiffusionForcingVideoToVideoPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
