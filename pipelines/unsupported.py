"""Transformer classes of diffusers that sparse attention does not support, with the reasons."""

from __future__ import annotations

LINEAR = "its self-attention is linear, without a softmax whose pairs could be dropped"
OWN_MASK = "it computes a sparse attention of its own"
SHORT = "its sequences are short"
MORE_KEYS = "its queries attend to more keys than queries, and no plan covers the additional keys"

UNSUPPORTED = {
    "SanaTransformer2DModel": LINEAR,
    "SanaVideoTransformer3DModel": LINEAR,
    "SanaWMTransformer3DModel": "most of its layers are linear, and the others have no attention processor; enable "
    "its refiner instead, pipe.refiner",
    "LatteTransformer3DModel": "its self-attention is factorised into short sequences of space and of time",
    "TransformerTemporalModel": "its self-attention is over time only, in short sequences",
    "Kandinsky6SRTransformer3DModel": OWN_MASK,
    "WanAnimate2Transformer3DModel": OWN_MASK,
    "Ideogram4Transformer2DModel": "its mask lets the padding of prompts attend to itself",
    "AceStepTransformer1DModel": "half of its layers have a sliding window of their own",
    "LongCatAudioDiTTransformer": SHORT,
    "StableAudioDiTModel": SHORT,
    "StableAudio3DiTModel": SHORT,
    "MiniMaxMusic3Transformer1DModel": SHORT,
    "PriorTransformer": SHORT,
    "DiTTransformer2DModel": SHORT,
    "UVit2DModel": SHORT,
    "OmniGenTransformer2DModel": "its mask is an additive matrix of all query-key pairs",
    "RFD4ProteinaTransformer": "it adds a learned bias to every query-key pair",
    "NucleusMoEImageTransformer2DModel": MORE_KEYS,
    "PRXTransformer2DModel": MORE_KEYS,
    "QwenImage21Transformer2DModel": MORE_KEYS,
}


def why_unsupported(class_names: set[str]) -> str | None:
    """Return why a transformer with one of these class names stays dense, or None if none is in the table."""
    return next((reason for name, reason in UNSUPPORTED.items() if name in class_names), None)
