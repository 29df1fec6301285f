"""Cosmos 1, 2 and 2.5: self-attention over video tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class


def _fps(pipeline: Mapping, transformer: Mapping) -> int:
    """Return 30 for Cosmos 1, and 16 for later versions."""
    return 30 if pipeline.get("_class_name") in ("CosmosTextToWorldPipeline", "CosmosVideoToWorldPipeline") else 16


FAMILY = Family(
    name="cosmos",
    fps=_fps,
    transformers=("CosmosTransformer3DModel",),
    sites=r"transformer_blocks\.\d+\.attn1",
    grid=lambda config, arguments: patch_grid(arguments, config["patch_size"]),
    pipelines=(
        "CosmosTextToWorldPipeline",
        "CosmosVideoToWorldPipeline",
        "Cosmos2TextToImagePipeline",
        "Cosmos2VideoToWorldPipeline",
        "Cosmos2_5_PredictBasePipeline",
        "Cosmos2_5_TransferPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
