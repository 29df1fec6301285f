"""AnyFlow, the bidirectional model and FAR, which generates chunks of frames: self-attention over video tokens only.

FAR packs the frames of early chunks into larger patches. They are reference tokens, and so are the tokens that pad the
sequence for FlexAttention. Queries of one chunk attend to a cache of the earlier ones, or all chunks are computed with
a causal mask.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

from dit_sparse.pipelines.family import Family, GridShape, pipeline_class

PADDING = 128  # the sequence is padded to a multiple of it


def _uses_cache(arguments: Mapping) -> bool:
    """Return whether a call computes one chunk with the cache of the earlier ones."""
    return arguments.get("kv_cache") is not None and not arguments["kv_cache_flag"]["is_cache_step"]


def _chunks(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the frames in large patches, and the other frames of the keys."""
    frames, partition = arguments["hidden_states"].shape[1], arguments.get("chunk_partition")
    if partition is None:
        return 0, frames // config["patch_size"][0]
    chunks, most = len(partition), config["full_chunk_limit"]
    if _uses_cache(arguments):
        chunks = 1 + arguments["kv_cache_flag"]["num_cached_chunks"]
    elif arguments.get("kv_cache") is not None:
        most -= 1
    packed = max(chunks - most, 0)
    return sum(partition[:packed]), sum(partition[packed:chunks])


def _grid(config: Mapping, arguments: Mapping) -> GridShape:
    """Return the grid of latents ``[B, F, C, H, W]``, and of the frames of the cache before them."""
    height, width = arguments["hidden_states"].shape[-2:]
    return _chunks(config, arguments)[1], height // config["patch_size"][1], width // config["patch_size"][2]


def _references(config: Mapping, arguments: Mapping) -> tuple[int, int]:
    """Return the tokens in large patches, and those that pad the queries."""
    if arguments.get("chunk_partition") is None:
        return 0, 0
    latents, packed = arguments["hidden_states"], _chunks(config, arguments)[0]
    sides = zip(latents.shape[-2:], config["compressed_patch_size"][1:], strict=True)
    before, queries = packed * prod(size // step for size, step in sides), prod(_grid(config, arguments))
    if _uses_cache(arguments):
        queries = latents.shape[1] * prod(_grid(config, arguments)[1:])
    return before, -(queries if _uses_cache(arguments) else before + queries) % PADDING


FAMILY = Family(
    name="anyflow",
    fps=16,
    transformers=("AnyFlowTransformer3DModel", "AnyFlowFARTransformer3DModel"),
    sites=r"blocks\.\d+\.attn1",
    grid=_grid,
    references=_references,
    cached_keys=True,
    pipelines=("AnyFlowPipeline", "AnyFlowFARPipeline"),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
