"""The denoiser, a sparse-token transformer with the structure and names of the flow models of TRELLIS, and the encoder
of the prompts.

Sources: TRELLIS (Xiang et al., arXiv:2412.01506), whose class names, arguments and calls of attention it has, and its
successor TRELLIS.2, whose modulation is shared by all layers and whose queries and keys are normalised and rotated. The
weights and code are the project's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .prompts import COLOURS, COUNTS, PATTERNS, SHAPES, Scene
from .sparse_tensor import SparseTensor, sparse_scaled_dot_product_attention
from .surface import CHANNELS

CONDITION = 10  # channels of the coarse condition
WAVELENGTHS = (3.0, 4.0, 5.3, 8.0, 11.0, 16.0, 24.0, 40.0, 80.0, 200.0)  # of the position encoding, in cells
ROTARY_WAVELENGTHS = (6.0, 12.0, 32.0, 96.0)
CONFIG = {"dim": 128, "heads": 2, "layers": 4, "cond_dim": 64}
SIGMA, SIGMA_DETAIL = 0.75, 0.2  # standard deviations of the means over a cell, and of the differences to them


def position_features(points: Tensor) -> Tensor:
    """Return the position encoding of ``points [T, 3]``, in cells from the centre of the grid, ``[T, 43]``.

    Solids are mirrored at x = 0 and z = 0. The encoding of x and z is even, so mirror images have the same features.
    """
    waves = 2 * torch.pi * points[..., None] / points.new_tensor(WAVELENGTHS)
    return torch.cat([waves.cos().flatten(1), waves[:, 1].sin(), points.abs() / 32], 1)


def rotations(points: Tensor) -> Tensor:
    """Return cosine and sine of the rotary position encoding of ``points [T, 3]``, in cells, ``[2, T, 1, 12]``."""
    angles = (2 * torch.pi * points[..., None] / points.new_tensor(ROTARY_WAVELENGTHS)).flatten(1)[:, None]
    return torch.stack([angles.cos(), angles.sin()])


def rotate(x: Tensor, rotation: Tensor) -> Tensor:
    """Rotate the first 24 channels of queries or keys ``[T, H, D]``. The others encode no relative position."""
    cos, sin = rotation
    count = cos.shape[-1]
    first, second, rest = x.split([count, count, x.shape[-1] - 2 * count], -1)
    return torch.cat([first * cos - second * sin, first * sin + second * cos, rest], -1)


class SparseMultiHeadAttention(nn.Module):
    """Self-attention with normalised and rotated queries and keys, or cross-attention to the prompt."""

    def __init__(self, dim: int, heads: int, cond_dim: int | None = None) -> None:
        super().__init__()
        self.heads = heads
        if cond_dim is None:
            self.to_qkv = nn.Linear(dim, 3 * dim)
            self.q_norm, self.k_norm = (nn.RMSNorm(dim // heads, eps=1e-6) for _ in range(2))
        else:
            self.to_q, self.to_kv = nn.Linear(dim, dim), nn.Linear(cond_dim, 2 * dim)
        self.to_out = nn.Linear(dim, dim)

    def forward(self, x: SparseTensor, rotation: Tensor, cond: Tensor | None = None) -> SparseTensor:
        if cond is None:
            q, k, v = self.to_qkv(x.feats).unflatten(-1, (3, self.heads, -1)).unbind(1)
            q, k = rotate(self.q_norm(q), rotation), rotate(self.k_norm(k), rotation)
            h = sparse_scaled_dot_product_attention(x.replace(torch.stack([q, k, v], 1)))
        else:
            q = x.replace(self.to_q(x.feats).unflatten(-1, (self.heads, -1)))
            h = sparse_scaled_dot_product_attention(q, self.to_kv(cond).unflatten(-1, (2, self.heads, -1)))
        return x.replace(self.to_out(h.feats.flatten(1)))


class ModulatedSparseTransformerCrossBlock(nn.Module):
    """Self-attention, cross-attention and a feed-forward network, modulated by the timestep."""

    def __init__(self, dim: int, heads: int, cond_dim: int) -> None:
        super().__init__()
        self.norm1, self.norm3 = (nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False) for _ in range(2))
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.self_attn = SparseMultiHeadAttention(dim, heads)
        self.cross_attn = SparseMultiHeadAttention(dim, heads, cond_dim)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU("tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Parameter(torch.zeros(6 * dim))

    def forward(self, x: SparseTensor, modulation: Tensor, rotation: Tensor, cond: Tensor) -> SparseTensor:
        shift1, scale1, gate1, shift3, scale3, gate3 = (modulation + self.modulation).chunk(6, -1)
        attended = self.self_attn(x.replace(self.norm1(x.feats) * (1 + scale1) + shift1), rotation)
        x = x.replace(x.feats + gate1 * attended.feats)
        x = x.replace(x.feats + self.cross_attn(x.replace(self.norm2(x.feats)), rotation, cond).feats)
        return x.replace(x.feats + gate3 * self.mlp(self.norm3(x.feats) * (1 + scale3) + shift3))


class SLatFlowModel(nn.Module):
    """Velocity of the channels of surface cells.

    Args:
        dim, heads, layers: size of the transformer.
        cond_dim: channels of the prompt tokens.
    """

    def __init__(self, dim: int, heads: int, layers: int, cond_dim: int) -> None:
        super().__init__()
        self.config = {"dim": dim, "heads": heads, "layers": layers, "cond_dim": cond_dim}
        self.input_layer = nn.Linear(CHANNELS + CONDITION, dim)
        self.position_layer = nn.Linear(4 * len(WAVELENGTHS) + 3, dim, bias=False)
        self.t_embedder = nn.Sequential(nn.Linear(64, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(ModulatedSparseTransformerCrossBlock(dim, heads, cond_dim) for _ in range(layers))
        self.out_layer = nn.Linear(dim, CHANNELS)
        self._initialise(dim)

    def _initialise(self, dim: int) -> None:
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)
        with torch.no_grad():
            self.position_layer.weight.mul_(2)
            gates = self.adaLN_modulation[1].bias.view(6, dim)
            self.adaLN_modulation[1].weight.mul_(0.1)
            gates.zero_()
            gates[2], gates[5] = 0.5, 0.5
            for block in self.blocks:
                # With equal projections of queries and keys, a cell attends to its mirror images from the start.
                q, k, _ = block.self_attn.to_qkv.weight.chunk(3)
                k.copy_(q)
                block.self_attn.q_norm.weight.fill_(1.4)
                block.self_attn.k_norm.weight.fill_(1.4)

    def forward(self, x: SparseTensor, t: Tensor, cond: Tensor, concat_cond: SparseTensor | None = None):
        """Return the velocity, noise minus data.
        The network computes the difference to the best linear estimate, with unit variance, as in EDM (Karras et al.,
        arXiv:2206.00364, section 5): from the means over the sub-voxels of a cell and from the differences to them.

        Args:
            x: noisy channels of packed cells, feats ``[T, 32]``; coordinates relative to the centre of the grid.
            t: timestep of each item, from 0 (data) to 1000 (noise), ``[B]``.
            cond: tokens of the prompts, ``[B, M, cond_dim]``.
            concat_cond: coarse condition of the same cells, feats ``[T, 10]``.

        Returns:
            A sparse tensor with feats ``[T, 32]``.
        """
        points = x.coords[:, 1:].to(x.feats.dtype) + 0.5
        coarse = x.feats.new_zeros(len(points), CONDITION) if concat_cond is None else concat_cond.feats
        h = self.input_layer(torch.cat([x.feats, coarse], 1)) + self.position_layer(position_features(points))
        modulation = self.adaLN_modulation(self.t_embedder(_timestep_features(t / 1000)))
        if len(t) > 1:
            modulation = modulation.repeat_interleave(torch.tensor(x.sizes, device=h.device), 0)
        h, rotation = x.replace(h), rotations(points)
        for block in self.blocks:
            h = block(h, modulation, rotation, cond)
        h = self.out_layer(F.layer_norm(h.feats, h.feats.shape[-1:]))
        level = (t / 1000).repeat_interleave(torch.tensor(x.sizes, device=h.device))[:, None]
        pairs = zip(split_means(x.feats), split_means(h), (SIGMA, SIGMA_DETAIL), strict=True)
        return x.replace(sum(_velocity(*parts, level) for parts in pairs))


def split_means(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return the means over the sub-voxels of a cell and the differences to them, of ``[T, 32]``, in that shape."""
    means = values.unflatten(1, (4, 8)).mean(2, keepdim=True).expand(-1, -1, 8).flatten(1)
    return means, values - means


def noisy_variance(level: Tensor, sigma: float = SIGMA) -> Tensor:
    """Return the variance of noisy data at a noise level in [0, 1]."""
    return ((1 - level) * sigma).square() + level.square()


def _velocity(x: Tensor, h: Tensor, sigma: float, level: Tensor) -> Tensor:
    """Return the velocity of noisy data ``x`` of standard deviation ``sigma``, from the output of the network."""
    variance = noisy_variance(level, sigma)
    return (level - (1 - level) * sigma**2) / variance * x - sigma / variance.sqrt() * h


def _timestep_features(t: Tensor) -> Tensor:
    angles = t[:, None] * torch.logspace(0, 2, 32, device=t.device)
    return torch.cat([angles.cos(), angles.sin()], 1)


class PromptEncoder(nn.Module):
    """Two tokens for each prompt: the words of the main part and those of its base, by the grammar of the prompts.

    Args:
        dim: channels of a token.
    """

    VOCABULARY = ("<none>", *COLOURS, *PATTERNS, *SHAPES, *COUNTS)

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(len(self.VOCABULARY), dim)
        self.slots = nn.Parameter(torch.randn(2, dim))

    def forward(self, scenes: list[Scene | None]) -> Tensor:
        """Return the tokens of scenes, ``[B, 2, dim]``; None is the empty prompt."""
        words = torch.tensor([[self._words(*part) for part in _parts(scene)] for scene in scenes])
        return self.words(words.to(self.slots.device)).sum(2) + self.slots

    def _words(self, *words: str) -> list[int]:
        return [self.VOCABULARY.index(word) for word in words]


def _parts(scene: Scene | None) -> list[tuple[str, ...]]:
    nothing = ("<none>",) * 4
    if scene is None:
        return [nothing, nothing]
    word = next(word for word, count in COUNTS.items() if count == scene.count)
    main = scene.part.colour, scene.part.pattern, scene.part.shape, word
    base = scene.base and (scene.base.colour, scene.base.pattern, scene.base.shape, "a")
    return [main, base or nothing]


def save_weights(folder: Path, model: SLatFlowModel, encoder: PromptEncoder) -> None:
    """Write ``config.json`` and ``model.safetensors`` in float16 to a folder."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        f"{name}.{key}": value.detach().cpu().half().contiguous()
        for name, module in (("model", model), ("encoder", encoder))
        for key, value in module.state_dict().items()
    }
    (folder / "config.json").write_text(json.dumps({"class": "Shapes3DPipeline", **model.config}, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors")


def load_weights(folder: Path) -> tuple[SLatFlowModel, PromptEncoder]:
    """Return the modules of a folder in float32, for inference.

    Raises:
        ValueError: the folder holds no model of this kind.
    """
    try:
        config = json.loads((folder / "config.json").read_text())
        model = SLatFlowModel(**{name: config[name] for name in CONFIG})
        weights = load_file(folder / "model.safetensors")
    except (OSError, KeyError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder} is no folder of shapes-3d: it needs config.json and model.safetensors") from error
    encoder = PromptEncoder(config["cond_dim"])
    for name, module in (("model", model), ("encoder", encoder)):
        own = {key.partition(".")[2]: value.float() for key, value in weights.items() if key.startswith(f"{name}.")}
        module.load_state_dict(own)
        module.eval().requires_grad_(False)
    return model, encoder
