"""Whole transformers measured: one forward pass of full-size models with random weights, dense beside sparse.

Weights say nothing about time, so none are downloaded. What has to fit is the model in bfloat16 and its activations.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dit_sparse import Grid, enable

from .bench import seconds_of

DENSITIES = (0.3, 0.25, 0.15)


@dataclass(frozen=True)
class Model:
    """A transformer as it is published, and the clip it is asked for.

    Attributes:
        make: from a number of layers, None for all of them, the module.
        inputs: from the grid and ``randn(*shape)``, the arguments of its forward pass.
        grid: tokens of a usual clip on a GPU.
        small: tokens on a CPU, where one layer is enough to wait for.
    """

    make: Callable[[int | None], nn.Module]
    inputs: Callable[[Grid, Callable[..., Tensor]], dict]
    grid: Grid
    small: Grid


def _wan(heads: int, ffn: int, depth: int) -> Callable[[int | None], nn.Module]:
    def make(layers: int | None) -> nn.Module:
        from diffusers import WanTransformer3DModel

        return WanTransformer3DModel(num_attention_heads=heads, ffn_dim=ffn, num_layers=layers or depth)

    return make


def _wan_inputs(grid: Grid, randn: Callable[..., Tensor]) -> dict:
    return {
        "hidden_states": randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, 512, 4096),
    }


def _hunyuan(layers: int | None) -> nn.Module:
    from diffusers import HunyuanVideoTransformer3DModel

    depth = {} if layers is None else {"num_layers": layers, "num_single_layers": layers}
    return HunyuanVideoTransformer3DModel(**depth)


def _hunyuan_inputs(grid: Grid, randn: Callable[..., Tensor]) -> dict:
    return {
        "hidden_states": randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, grid.after, 4096),
        "encoder_attention_mask": torch.ones(1, grid.after, dtype=torch.bool),
        "pooled_projections": randn(1, 768),
        "guidance": torch.tensor([6000.0]),
    }


def _cogvideox(layers: int | None) -> nn.Module:
    from diffusers import CogVideoXTransformer3DModel

    return CogVideoXTransformer3DModel(
        num_attention_heads=48,
        num_layers=layers or 42,
        patch_size_t=2,
        patch_bias=False,
        use_rotary_positional_embeddings=True,
    )


def _cogvideox_inputs(grid: Grid, randn: Callable[..., Tensor]) -> dict:
    return {
        "hidden_states": randn(1, 2 * grid.frames, 16, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, grid.before, 4096),
        "image_rotary_emb": (randn(grid.video, 64), randn(grid.video, 64)),
    }


P720, FEW = Grid(21, 45, 80), Grid(8, 16, 32)
MODELS = {
    "wan2.1-1.3b": Model(_wan(12, 8960, 30), _wan_inputs, P720, FEW),
    "wan2.1-14b": Model(_wan(40, 13824, 40), _wan_inputs, P720, FEW),
    "hunyuan-video": Model(_hunyuan, _hunyuan_inputs, Grid(33, 45, 80, after=256), Grid(8, 16, 32, after=256)),
    "cogvideox1.5-5b": Model(_cogvideox, _cogvideox_inputs, Grid(11, 48, 85, before=226), Grid(8, 16, 32, before=226)),
}


@torch.no_grad()
def measured(
    name: str, device: str, densities: Sequence[float] = DENSITIES, method: str = "radial", rounds: int = 2
) -> Iterator[dict]:
    """One row for every density, each with a dense time of its own, taken beside it."""
    model = MODELS[name]
    gpu = device == "cuda"
    grid, layers = (model.grid, None) if gpu else (model.small, 1)
    with _default(torch.bfloat16 if gpu else torch.float32, device):
        generator = torch.Generator(device).manual_seed(0)
        transformer = model.make(layers).eval()
        inputs = model.inputs(grid, lambda *shape: torch.randn(shape, generator=generator))
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
            "layers": layers or "all",
            "grid": str(grid),
            "tokens": grid.tokens,
            "dtype": "bfloat16" if gpu else "float32",
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
