"""Motif-Video: joint self-attention over video and text tokens, text last and padded at the end.

Image embeddings stand before the text and count as text. Decoder layers (``num_decoder_layers``) attend to a second
copy of the video instead of the text. It counts as text too, so that they compute more than the requested density.
"""

from __future__ import annotations

from functools import cache

from dit_sparse.pipelines.family import Family, patch_grid, pipeline_class

FAMILY = Family(
    name="motif_video",
    fps=24,
    transformers=("MotifVideoTransformer3DModel",),
    sites=r"(single_)?transformer_blocks\.\d+\.attn",
    grid=lambda config, arguments: patch_grid(
        arguments, (config["patch_size_t"], config["patch_size"], config["patch_size"])
    ),
    text="after",
    pipelines=(
        "MotifVideoPipeline",
        "MotifVideoImage2VideoPipeline",
    ),
)


@cache
def __getattr__(name: str) -> type:
    return pipeline_class(__name__, FAMILY, name)
