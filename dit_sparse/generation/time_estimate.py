"""Estimated denoising time of a clip before it is generated: its operations, and a speed measured on this machine."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from dit_sparse import SparseAttnProcessor
from dit_sparse.kernels.calibration import CallSignature, cost_model

from ..bundled import model_call, model_source
from .model_config import CONFIGS, COUNTS, read_config

OTHER_LAYERS = 2.0  # time of an operation outside of attention, in times of attention; bundled model on a CPU


@dataclass(frozen=True)
class TimeEstimate:
    """Denoising time of a clip, in seconds.

    Attributes:
        tokens: video tokens.
        dense: with dense attention.
        sparse: with sparse attention, without the time of plans; None if the density is not known in advance.
    """

    tokens: int
    dense: float
    sparse: float | None


@dataclass(frozen=True)
class _Structure:
    """Sizes of a `WanTransformer3DModel` and its autoencoder."""

    layers: int
    heads: int
    head_dim: int
    ffn_dim: int
    patch: list[int]
    temporal_factor: int
    spatial_factor: int

    def tokens(self, frames: int, height: int, width: int) -> int:
        """Return the video tokens of a clip. The pipeline rounds the frames to one more than a multiple of the temporal
        factor, and the autoencoder drops the remainder."""
        factor = self.temporal_factor
        latents = (frames - 1 if frames % factor == 1 else frames) // factor + 1
        rows, columns = height // self.spatial_factor, width // self.spatial_factor
        return (latents // self.patch[0]) * (rows // self.patch[1]) * (columns // self.patch[2])

    def operations_per_token(self) -> int:
        """Return the multiply-adds of the linear layers of one block."""
        width = self.heads * self.head_dim
        return 8 * width**2 + 2 * width * self.ffn_dim


def estimate_time(model: str, call: dict, processor: SparseAttnProcessor, device: str = "cpu") -> TimeEstimate | None:
    """Estimate the denoising time of a clip. Nothing is loaded; the speed of dense attention is measured once.

    Args:
        model: the bundled model or a local diffusers folder.
        call: arguments of the pipeline call.
        processor: settings of the sparse attention.
        device: such as ``"cpu"`` or ``"cuda:0"``.

    Returns:
        None if the transformer is not a `WanTransformer3DModel` whose configs are local, or the call gives no size.
    """
    structure = _read_structure(Path(model_source(model)))
    steps, *size = (call.get(name) for name in COUNTS)
    if structure is None or steps is None or None in size:
        return None
    tokens = structure.tokens(*size)
    branches = 2 if (call.get("guidance_scale") or 5.0) > 1 else 1
    dtype = torch.float32 if device == "cpu" or model_call(model) else torch.bfloat16
    signature = CallSignature(torch.device(device), dtype, structure.head_dim, 64, clusters=False, reorders=False)
    per_pair = cost_model("dense", signature).per_pair
    attention = per_pair * structure.heads * tokens**2
    per_operation = per_pair / (2 * structure.head_dim)
    others = OTHER_LAYERS * per_operation * structure.operations_per_token() * tokens
    seconds = lambda density: steps * branches * structure.layers * (density * attention + others)
    density, dense_steps = processor.settings.method.density, processor.settings.schedule.first_sparse_step(steps)
    sparse_share = max(steps - dense_steps, 0) / steps
    sparse = None if density is None else seconds(1 - sparse_share * (1 - density))
    return TimeEstimate(tokens, seconds(1), sparse)


def _read_structure(folder: Path) -> _Structure | None:
    _, transformer, vae = (read_config(folder / name) for name in CONFIGS)
    names = ("num_layers", "num_attention_heads", "attention_head_dim", "ffn_dim", "patch_size")
    if transformer.get("_class_name") != "WanTransformer3DModel" or any(name not in transformer for name in names):
        return None
    factors = vae.get("scale_factor_temporal", 4), vae.get("scale_factor_spatial", 8)
    return _Structure(*(transformer[name] for name in names), *factors)
