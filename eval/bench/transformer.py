"""Whole transformers measured: one forward pass of published models with random weights, dense beside sparse.

Weights say nothing about time, so none are downloaded. On a GPU a model has its full size: what has to fit is the model
in bfloat16 and its activations. On a CPU it has one layer and few heads, and as many fewer tokens: attention grows with
the tokens, the rest of a layer with the channels, so that its share of the work stays near that of the full size.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import diffusers
import torch
from torch import Tensor, nn

from dit_sparse import Grid, enable

from .attention import seconds_of

DENSITIES = (0.3, 0.25, 0.15)


@dataclass(frozen=True)
class Size:
    """Attention heads, layers (of each kind that a model has; None: all of them), tokens that attend to each other, and
    those of the prompt."""

    heads: int
    layers: int | None
    grid: Grid
    text: int


@dataclass(frozen=True)
class Model:
    """A transformer as it is published, and the clip it is asked for.

    Attributes:
        kind: its class in diffusers.
        config: from a size, the arguments of the class.
        inputs: from a size and ``randn(*shape)``, the arguments of its forward pass.
        full: the published size, and a usual clip at 720p.
        small: 256 channels, and as many fewer tokens, of video and prompt, as there are fewer channels.
    """

    kind: str
    config: Callable[[Size], dict]
    inputs: Callable[[Size, Callable[..., Tensor]], dict]
    full: Size
    small: Size

    def make(self, size: Size) -> nn.Module:
        return getattr(diffusers, self.kind)(**self.config(size))


def _wan_inputs(size: Size, randn: Callable[..., Tensor]) -> dict:
    grid = size.grid
    return {
        "hidden_states": randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, size.text, 4096),
    }


def _hunyuan_inputs(size: Size, randn: Callable[..., Tensor]) -> dict:
    grid = size.grid
    return {
        "hidden_states": randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, size.text, 4096),
        "encoder_attention_mask": torch.ones(1, size.text, dtype=torch.bool),
        "pooled_projections": randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


def _cogvideox_inputs(size: Size, randn: Callable[..., Tensor]) -> dict:
    grid = size.grid
    return {
        "hidden_states": randn(1, 2 * grid.frames, 16, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, size.text, 4096),
        "image_rotary_emb": (randn(grid.video, 64), randn(grid.video, 64)),
    }


def _wan(heads: int, ffn: int, layers: int, small: Size) -> Model:
    """Wan 2.1; ``ffn``, the width between the two linear layers, goes with the heads."""
    config = lambda size: {
        "num_attention_heads": size.heads,
        "ffn_dim": ffn * size.heads // heads,
        "num_layers": size.layers or layers,
    }
    full = Size(heads, None, Grid(21, 45, 80), text=512)
    return Model("WanTransformer3DModel", config, _wan_inputs, full, small)


MODELS = {
    "wan2.1-1.3b": _wan(heads=12, ffn=8960, layers=30, small=Size(2, 1, Grid(21, 20, 30), text=85)),
    "wan2.1-14b": _wan(heads=40, ffn=13824, layers=40, small=Size(2, 1, Grid(7, 18, 30), text=26)),
    "hunyuan-video": Model(
        "HunyuanVideoTransformer3DModel",
        lambda size: {
            "num_attention_heads": size.heads,
            "num_layers": size.layers or 20,
            "num_single_layers": size.layers or 40,
        },
        _hunyuan_inputs,
        full=Size(24, None, Grid(33, 45, 80, after=256), text=256),
        small=Size(2, 1, Grid(11, 30, 30, after=21), text=21),
    ),
    "cogvideox1.5-5b": Model(
        "CogVideoXTransformer3DModel",
        lambda size: {
            "num_attention_heads": size.heads,
            "num_layers": size.layers or 42,
            "patch_size_t": 2,
            "patch_bias": False,
            "use_rotary_positional_embeddings": True,
        },
        _cogvideox_inputs,
        full=Size(48, None, Grid(11, 48, 85, before=226), text=226),
        small=Size(4, 1, Grid(11, 17, 20, before=19), text=19),
    ),
}


@torch.no_grad()
def measured(
    name: str, device: str, densities: Sequence[float] = DENSITIES, method: str = "radial", rounds: int = 2
) -> Iterator[dict]:
    """One row for every density, each with a dense time of its own, taken beside it."""
    model, gpu = MODELS[name], device == "cuda"
    size, dtype = (model.full, torch.bfloat16) if gpu else (model.small, torch.float32)
    getattr(diffusers, model.kind)  # imported before the defaults change, for modules make tensors of their own
    torch.manual_seed(0)
    with _default(dtype, device):
        transformer = model.make(size).eval()
        inputs = model.inputs(size, torch.randn)
    forward = lambda: transformer(**inputs, return_dict=False)
    seconds = lambda: statistics.median(seconds_of(forward, device) for _ in range(rounds))
    forward()
    for density in densities:
        dense = seconds()
        with enable(transformer, method, density=density, dense_steps=0, dense_layers=0, min_tokens=1) as run:
            forward()  # makes the plans and compiles what has to be compiled
            sparse = seconds()
            report = run.report()
        yield {
            "model": name,
            "heads": size.heads,
            "layers": size.layers or "all",
            "grid": str(size.grid),
            "tokens": size.grid.tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "method": method,
            "density_asked": density,
            "density": round(report.density_achieved, 4),
            "executor": ", ".join(report.executors),
            "seconds_dense": dense,
            "seconds_sparse": sparse,
            "speedup": dense / sparse,
        }


@contextmanager
def _default(dtype: torch.dtype, device: str) -> Iterator[None]:
    """New tensors are of that type and on that device: no second copy of fourteen billion weights."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(before)
