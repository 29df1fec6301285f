"""Benchmark of one forward pass of published transformers with random weights, dense and sparse.

Weights do not affect time, so none are downloaded. On a GPU a model has its full size: the model in bfloat16 and its
activations must fit into memory. On a CPU it has one layer and few heads, and proportionally fewer tokens: attention
grows with the tokens and the rest of a layer with the channels, so attention keeps its share of the work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction

import diffusers
import torch
from torch import Tensor, nn

from dit_sparse import DEFAULT_METHOD, Grid, enable

from .timing import median_seconds

DENSITIES = (0.3, 0.25, 0.15)


@dataclass(frozen=True)
class Size:
    """Size of a transformer and of its input.

    Attributes:
        heads: attention heads.
        layers: layers of each kind that the model has; None: the published number.
        grid: the self-attention sequence.
        text: prompt tokens.
    """

    heads: int
    layers: int | None
    grid: Grid
    text: int


@dataclass(frozen=True)
class Model:
    """A published transformer architecture and the inputs of its forward pass.

    Attributes:
        class_name: its class in diffusers.
        layers: the published number of layers of each kind.
        config: returns the arguments of the class for a size.
        inputs: returns the arguments of the forward pass for a size and ``randn(*shape)``.
        full: the published size, with a clip at 720p.
        small: 256 channels; video and prompt tokens are reduced in proportion to the channels.
    """

    class_name: str
    layers: tuple[int, ...]
    config: Callable[[Size], dict]
    inputs: Callable[[Size, Callable[..., Tensor]], dict]
    full: Size
    small: Size

    def make(self, size: Size) -> nn.Module:
        return getattr(diffusers, self.class_name)(**self.config(size))

    def label(self, name: str, size: Size) -> str:
        """Return the name of a model, or that of a stand-in, by its layers: ``"1/30 of wan2.1-1.3b, CPU"``."""
        if size.layers is None:
            return name
        return f"{Fraction(size.layers * len(self.layers), sum(self.layers))} of {name}, CPU"


def _wan_inputs(size: Size, randn: Callable[..., Tensor]) -> dict:
    grid = size.grid
    return {
        "hidden_states": randn(1, 16, grid.frames, 2 * grid.height, 2 * grid.width),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": randn(1, size.text, 4096),
    }


def _hunyuan_inputs(size: Size, randn: Callable[..., Tensor]) -> dict:
    return _wan_inputs(size, randn) | {
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
    """Return a Wan 2.1; ``ffn``, the width of the feed-forward layer, is scaled with the heads."""
    config = lambda size: {
        "num_attention_heads": size.heads,
        "ffn_dim": ffn * size.heads // heads,
        "num_layers": size.layers or layers,
    }
    full = Size(heads, None, Grid(21, 45, 80), text=512)
    return Model("WanTransformer3DModel", (layers,), config, _wan_inputs, full, small)


MODELS = {
    "wan2.1-1.3b": _wan(heads=12, ffn=8960, layers=30, small=Size(2, 1, Grid(21, 20, 30), text=85)),
    "wan2.1-14b": _wan(heads=40, ffn=13824, layers=40, small=Size(2, 1, Grid(7, 18, 30), text=26)),
    "hunyuan-video": Model(
        "HunyuanVideoTransformer3DModel",
        (20, 40),
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
        (42,),
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
def measure_model(
    name: str,
    device: str,
    densities: Sequence[float] = DENSITIES,
    method: str = DEFAULT_METHOD,
    rounds: int = 2,
    compiled: bool = False,
) -> Iterator[dict]:
    """Yield one row per density, with the dense time measured right before the sparse one.

    Args:
        name: a key of ``MODELS``.
        device: ``"cuda"`` for the full size, ``"cpu"`` for the small one.
        densities: requested densities.
        method: name of a sparse method.
        rounds: forward passes that a median is taken of.
        compiled: whether ``torch.compile`` compiles the blocks, for the dense and the sparse passes.
    """
    model = MODELS[name]
    size, dtype = (model.full, torch.bfloat16) if device == "cuda" else (model.small, torch.float32)
    # Importing the class creates tensors, so it is imported before the tensor defaults change.
    getattr(diffusers, model.class_name)
    torch.manual_seed(0)
    with _default_tensors(dtype, device):
        transformer = model.make(size).eval()
        inputs = model.inputs(size, torch.randn)
    if compiled:
        _compile_blocks(transformer)
    forward = lambda: transformer(**inputs, return_dict=False)
    forward()
    for density in densities:
        dense = median_seconds(forward, device, rounds)
        with enable(transformer, method, density=density, dense_steps=0, dense_layers=0, min_tokens=1) as run:
            forward()  # makes the plans and compiles kernels
            sparse = median_seconds(forward, device, rounds)
            report = run.report()
        yield {
            "model": model.label(name, size),
            "heads": size.heads,
            "layers": size.layers or "all",
            "grid": str(size.grid),
            "tokens": size.grid.tokens,
            "dtype": str(dtype).removeprefix("torch."),
            "compiled": compiled,
            "method": method,
            "density_asked": density,
            "density": round(report.density_achieved, 4),
            "executor": ", ".join(report.executors),
            "seconds_dense": dense,
            "seconds_sparse": sparse,
            "speedup": dense / sparse,
        }


def _compile_blocks(transformer: nn.Module) -> None:
    """Compile the modules of every list of blocks, each as one graph."""
    for blocks in transformer.children():
        if isinstance(blocks, nn.ModuleList):
            for block in blocks:
                block.compile(fullgraph=True)


@contextmanager
def _default_tensors(dtype: torch.dtype, device: str) -> Iterator[None]:
    """Create tensors with this dtype and device by default, so that large weights are not copied."""
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            yield
    finally:
        torch.set_default_dtype(previous)
