"""Cosmos 3: the queries of video, sound and action tokens attend to the text and to themselves, text first.

The causal self-attention of the text is short and stays dense. Sound and action tokens are reference tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from dit_sparse.pipelines.family import Family, merged_grid, merged_references, pipeline_class


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the tokens of smaller videos, sound and action, all after the video."""
    shapes = arguments["vision_token_shapes"]
    others = arguments["sequence_length"] - arguments["und_len"] - sum(map(prod, shapes))
    return 0, merged_references(shapes)[1] + others


FAMILY = Family(
    name="cosmos3",
    fps=24,
    transformers=("Cosmos3OmniTransformer",),
    sites=r"layers\.\d+\.self_attn",
    grid=lambda config, arguments: merged_grid(arguments["vision_token_shapes"]),
    references=_references,
    text="before",
    cached_keys=True,
    timestep="vision_timesteps",
    latents="vision_timesteps",  # the latents are a list
    pipelines=("Cosmos3OmniPipeline",),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
