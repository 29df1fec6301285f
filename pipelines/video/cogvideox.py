"""CogVideoX 1.0 and 1.5, and ConsisID: joint self-attention over text and video tokens, text first."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, GridShape, ParallelPlan, pipeline_class


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, F, C, H, W]``. Version 1.5 patches frames too and pads the last patch."""
    _, frames, _, height, width = arguments["hidden_states"].shape
    patch, patch_frames = config["patch_size"], config.get("patch_size_t") or 1
    return -(-frames // patch_frames), height // patch, width // patch


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 16 for version 1.5, which patches frames too, else 8."""
    return 16 if transformer.get("patch_size_t") else 8


SPLIT = {
    "transformer_blocks.0": {"hidden_states": 1, "encoder_hidden_states": 1},
    "transformer_blocks.*": {"image_rotary_emb": (0, 0)},
}


def _consisid_plan(config: Mapping) -> ParallelPlan:
    """Gather after the last block, because ConsisID then removes as many tokens as the whole text has."""
    return SPLIT | {f"transformer_blocks.{config['num_layers'] - 1}": (1, 1)}


FAMILY = Family(
    name="cogvideox",
    fps=_fps,
    transformers=("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"),
    size_multiple=16,
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=_grid,
    text="before",
    parallel={
        "CogVideoXTransformer3DModel": lambda config: SPLIT | {"proj_out": 1},
        "ConsisIDTransformer3DModel": _consisid_plan,
    },
    pipelines=(
        "CogVideoXPipeline",
        "CogVideoXImageToVideoPipeline",
        "CogVideoXVideoToVideoPipeline",
        "CogVideoXFunControlPipeline",
        "ConsisIDPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
