"""HunyuanVideo, HunyuanVideo 1.5, Framepack and Motif-Video: joint self-attention over video and text tokens, text last
and padded at the end.

- The text refiner in the context embedder stays dense. The image tokens of HunyuanVideo 1.5 and Motif-Video stand
  before the text and count as text.
- The history frames of Framepack, at three scales, stand before the frames to generate. They are reference tokens: they
  attend to all tokens and all tokens attend to them.
- Decoder layers of Motif-Video (``num_decoder_layers``) attend to a second copy of the video instead of the text. It
  counts as text too, so that they compute more than the requested density.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, ParallelPlan, history_tokens, patch_grid, patch_size, pipeline_class

HISTORY = {"latents_clean": 1, "latents_history_2x": 2, "latents_history_4x": 4}


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 30 for Framepack, else 24."""
    return 30 if pipeline.get("_class_name") == "HunyuanVideoFramepackPipeline" else 24


def _parallel_plan(config: Mapping) -> ParallelPlan | str:
    """Split video and text separately before the first block, and gather the video after the last layer."""
    if config.get("image_condition_type") == "token_replace":
        return (
            "its blocks modulate the tokens of the first frame by their position in the sequence, which the ranks split"
        )
    return {
        "rope": {0: 0, 1: 0},
        "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
        "proj_out": 1,
    }


FAMILY = Family(
    name="hunyuan_video",
    fps=_fps,
    transformers=(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideoFramepackTransformer3DModel",
        "MotifVideoTransformer3DModel",
    ),
    size_multiple=16,
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: patch_grid(arguments, patch_size(config)),
    text="after",
    references=lambda config, arguments: (history_tokens(arguments, HISTORY, (1, 2, 2)), 0),
    mask="attention_mask",
    parallel={"HunyuanVideoTransformer3DModel": _parallel_plan},
    pipelines=(
        "HunyuanVideoPipeline",
        "HunyuanVideoImageToVideoPipeline",
        "HunyuanSkyreelsImageToVideoPipeline",
        "HunyuanVideo15Pipeline",
        "HunyuanVideo15ImageToVideoPipeline",
        "HunyuanVideoFramepackPipeline",
        "MotifVideoPipeline",
        "MotifVideoImage2VideoPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
