"""Stand-ins for 3-D denoisers that are not in diffusers, with random weights and the same structure of calls.

- `PackedDenoiser`: sparse tensors of several items, one attention function of its own for self- and cross-attention, as
  in TRELLIS.
- `AnchoredDenoiser`: a time token before the tokens of voxels, whose coordinates are an argument, as in UltraShape.
- `FrameDenoiser`: modules with a processor, and a time token in every frame of tokens without coordinates, as in
  ActionMesh.
- `AliasDenoiser`: an attention function under another name, called by a helper function, as in Hunyuan3D.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIM, HEADS = 32, 2


@dataclass
class SparseTensor:
    """Features ``[T, ...]`` and coordinates ``[T, 4]`` of packed items."""

    feats: Tensor
    coords: Tensor

    def replace(self, feats: Tensor) -> SparseTensor:
        return replace(self, feats=feats)


def sparse_scaled_dot_product_attention(*args):
    """Self-attention of ``qkv [T, 3, H, D]``, or attention of ``q [T, H, D]`` to ``kv [B, M, 2, H, D]``."""
    source, items = args[0], args[0].coords[:, 0]
    out = torch.empty_like(source.feats[:, 0] if len(args) == 1 else source.feats)
    for item in items.unique().tolist():
        own = items == item
        if len(args) == 1:
            q, k, v = (x.transpose(0, 1) for x in source.feats[own].unbind(1))
        else:
            q, (k, v) = source.feats[own].transpose(0, 1), (x.transpose(0, 1) for x in args[1][item].unbind(1))
        out[own] = F.scaled_dot_product_attention(q[None], k[None], v[None])[0].transpose(0, 1)
    return source.replace(out)


class PackedAttention(nn.Module):
    def __init__(self, is_cross: bool = False) -> None:
        super().__init__()
        self.num_heads, self.is_cross = HEADS, is_cross
        self.to_q, self.to_kv = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM)
        self.to_qkv, self.out = nn.Linear(DIM, 3 * DIM), nn.Linear(DIM, DIM)

    def forward(self, x: SparseTensor, context: Tensor | None = None) -> SparseTensor:
        if self.is_cross:
            q = x.replace(self.to_q(x.feats).unflatten(-1, (HEADS, -1)))
            h = sparse_scaled_dot_product_attention(q, self.to_kv(context).unflatten(-1, (2, HEADS, -1)))
        else:
            h = sparse_scaled_dot_product_attention(x.replace(self.to_qkv(x.feats).unflatten(-1, (3, HEADS, -1))))
        return x.replace(self.out(h.feats.flatten(1)))


class PackedBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.self_attn, self.cross_attn = PackedAttention(), PackedAttention(is_cross=True)

    def forward(self, x: SparseTensor, context: Tensor) -> SparseTensor:
        x = x.replace(x.feats + self.self_attn(x).feats)
        return x.replace(x.feats + self.cross_attn(x, context).feats)


class PackedDenoiser(nn.Module):
    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PackedBlock() for _ in range(layers))

    def forward(self, x: SparseTensor, t: Tensor, cond: Tensor) -> SparseTensor:
        x = x.replace(x.feats + t)
        for block in self.blocks:
            x = block(x, cond)
        return x


class Attention(nn.Module):
    """Self- and cross-attention of ``[B, N, D]`` by PyTorch's function."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q, self.to_kv, self.out = nn.Linear(DIM, DIM), nn.Linear(DIM, 2 * DIM), nn.Linear(DIM, DIM)

    def heads(self, x: Tensor, context: Tensor | None) -> list[Tensor]:
        inputs = self.to_q(x), *self.to_kv(x if context is None else context).chunk(2, -1)
        return [part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in inputs]

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = F.scaled_dot_product_attention(*self.heads(x, context))
        return self.out(out.transpose(1, 2).flatten(2))


class AnchoredBlock(nn.Module):
    def __init__(self, attention: type[Attention]) -> None:
        super().__init__()
        self.attn1, self.attn2 = attention(), attention()

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        x = x + self.attn1(x)
        return x + self.attn2(x, context)


class AnchoredDenoiser(nn.Module):
    attention: type[Attention] = Attention

    def __init__(self, layers: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AnchoredBlock(self.attention) for _ in range(layers))

    def forward(self, x: Tensor, t: Tensor, contexts: Tensor, voxel_cond: Tensor | None = None) -> Tensor:
        position = voxel_cond.to(x.dtype) @ torch.eye(3, DIM) * 0.1
        x = torch.cat([t.expand(len(x), 1, DIM), x + position], 1)
        for block in self.blocks:
            x = block(x, contexts)
        return x[:, 1:]


sdpa = nn.functional.scaled_dot_product_attention


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return sdpa(q, k, v).transpose(1, 2).flatten(2)


class AliasAttention(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.out(attention(*self.heads(x, context)))


class AliasDenoiser(AnchoredDenoiser):
    attention = AliasAttention


class LongNameAttention(Attention):
    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = torch.nn.functional.scaled_dot_product_attention(*self.heads(x, context))
        return self.out(out.transpose(1, 2).flatten(2))


class LongNameDenoiser(AnchoredDenoiser):
    attention = LongNameAttention


def rotated_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attention of ``[B, N, H, D]`` that changes its queries, so that q, k and v do not determine the output."""
    q, k, v = (x.transpose(1, 2) for x in (q.roll(1, -1), k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2)


def flash_attention(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, bias: Tensor | None = None):
    """Attention of ``[B, N, H, D]``."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, bias, scale=softmax_scale).transpose(1, 2)


class OwnAttention(Attention):
    """Calls functions of its own. ``bias``: whether it passes a bias."""

    bias = False

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        q, k, v = (part.transpose(1, 2) for part in self.heads(x, context))
        if self.bias is None:
            return self.out(rotated_attention(q, k, v).flatten(2))
        bias = torch.zeros(q.shape[1], k.shape[1]) if self.bias else None
        return self.out(flash_attention(q, k, v, softmax_scale=0.3, bias=bias).flatten(2))


class OwnDenoiser(AnchoredDenoiser):
    attention = OwnAttention


class Processor:
    """A processor as in diffusers: it computes the attention of its module."""

    def __call__(self, module: Attention, x: Tensor, context: Tensor | None = None) -> Tensor:
        out = F.scaled_dot_product_attention(*module.heads(x, context))
        return module.out(out.transpose(1, 2).flatten(2))


class ProcessorAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.processor = Processor()

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        return self.processor(self, x, context)


class FrameDenoiser(AnchoredDenoiser):
    """Tokens of several frames, ``x [B, frames, tokens, D]``."""

    attention = ProcessorAttention

    def forward(self, x: Tensor, t: Tensor, contexts: Tensor) -> Tensor:
        frames = x.shape[:2]
        x = torch.cat([t.expand(*frames, 1, DIM), x], 2).flatten(1, 2)
        for block in self.blocks:
            x = block(x, contexts)
        return x.unflatten(1, (frames[1], -1))[:, :, 1:]
