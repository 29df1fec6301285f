"""Wan 2.1, Wan 2.2 and derived models: text to video, image to video, VACE, Animate, Lucy Edit, ChronoEdit.

Self-attention is over video tokens only; the text enters through cross-attention, which stays dense. The reference
image of Wan Animate is the first frame; its face blocks stay dense.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 30 for Animate, 24 for Lucy Edit and Wan 2.2 5B, which has a timestep for each token, else 16."""
    if pipeline.get("_class_name") == "WanAnimatePipeline":
        return 30
    return 24 if pipeline.get("expand_timesteps") or pipeline.get("_class_name") == "LucyEditPipeline" else 16


FAMILY = Family(
    name="wan",
    fps=_fps,
    transformers=(
        "WanTransformer3DModel",
        "WanVACETransformer3DModel",
        "WanAnimateTransformer3DModel",
        "ChronoEditTransformer3DModel",
    ),
    size_multiple=16,
    sites=r"(vace_)?blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, config["patch_size"]),
    pipelines=(
        "WanPipeline",
        "WanImageToVideoPipeline",
        "WanVACEPipeline",
        "WanVideoToVideoPipeline",
        "WanAnimatePipeline",
        "LucyEditPipeline",
        "ChronoEditPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
