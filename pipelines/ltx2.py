"""LTX-2: self-attention over video tokens only.

The audio stream, its self-attention and the attention between both streams are short and stay dense.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, pipeline_class

FAMILY = Family(
    name="ltx2",
    fps=24,
    transformers=("LTX2VideoTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: tuple(arguments[name] for name in ("num_frames", "height", "width")),
    pipelines=(
        "LTX2Pipeline",
        "LTX2ImageToVideoPipeline",
        "LTX2ConditionPipeline",
        "LTX2InContextPipeline",
        "LTX2DFRPipeline",
        "LTX2DFRTemporalRefinePipeline",
        "LTX2HDRPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
