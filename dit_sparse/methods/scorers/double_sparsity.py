"""Double Sparsity: attention is estimated from a few heavy channels of each head.

Source: S. Yang et al., "Post-Training Sparse Attention with Double Sparsity", arXiv:2408.07092, sec. 4. A channel c of
a head is heavy if it contributes much to the scores:

    importance_c = mean over sampled queries r and keys s of |q_rc k_sc|

The n heaviest channels S of each head, found once, give the approximate scores

    sum over c in S of q_c k_c / sqrt(n)

which are as wide as full scores if all channels contribute equally: the scale 1 / sqrt(D), corrected by sqrt(D / n).
The tokens with the highest scores are attended to.

Planning: N^2 D / 256 multiply-adds (every 16th query, every 16th channel).

Differs from the authors:
- Blocks are kept, not tokens: those that receive the most approximate attention from a few queries of the row.
- Without stored ``channels``, they are found at the first plan of a generation. Theirs are found offline, for which
  `heavy_channels` serves. The paper keeps 1/16 of the channels and of the tokens.
- The two channels that RoPE rotates together are kept or left out together, by their joint importance, because their
  content moves between them along the sequence.
- Channels are compared after subtracting the mean of all keys, which changes no softmax.
- Approximate keys have full precision; theirs can have 4 bits.

With 1/4 of the channels, the upper end of the paper's range, masks retain as much attention of `shapes-wan` as
those of other scorers; with 1/16 they retain less, but more than random blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...budget import Budget, Top
from ...grid import BaseGrid, Site
from ...kernels.planning.block_mass import block_mass_and_lse
from ...method import Scorer
from ...notation.settings import POWER_OF_TWO, within


@dataclass(frozen=True, kw_only=True)
class DoubleSparsity(Scorer):
    """Block mass from heavy channels.

    Attributes:
        share: fraction n / D of the channels, at least one pair.
        channels: stored channels of every head of every layer, instead of ``share``.
        adjacent_pairs: whether RoPE rotates channels 2c and 2c + 1 together; otherwise c and c + D / 2.
        samples: number of queries, and of keys, that channels are found from.
        queries_per_block: queries of each block that are scored: a power of two that divides the block.
    """

    default_budget: ClassVar[Budget] = Top(1 / 16)
    share: float = within("(0, 1]", 1 / 16)
    channels: tuple[tuple[tuple[int, ...], ...], ...] | None = None
    adjacent_pairs: bool = True
    samples: int = within("[1, 10000]", 256)
    queries_per_block: int = within(POWER_OF_TWO, 4)

    def __post_init__(self) -> None:
        super().__post_init__()
        counts = {len(head) for layer in self.channels or () for head in layer}
        if self.channels is not None and (len(counts) != 1 or 0 in counts):
            raise ValueError("channels must be equally many, at least one, for every head of every layer")

    def check_model(self, layers: int, heads: int) -> None:
        if self.channels and [len(layer) for layer in self.channels] != [heads] * layers:
            raise ValueError(f"channels must be those of {layers} layers with {heads} heads each")

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        rows = min(self.queries_per_block, site.block)
        if site.block % rows:
            raise ValueError(f"queries_per_block must divide the block of {site.block}, got {self.queries_per_block}")
        if "channels" not in memory:
            memory["channels"] = self._stored(q, site) if self.channels else self._find(q, k, site.grid)
        index = memory["channels"][:, :, None].expand(*q.shape[:2], q.shape[2], -1)
        return block_mass_and_lse(q.gather(-1, index), k.gather(-1, index), site.block, rows=rows)[0].log()

    def _find(self, q: Tensor, k: Tensor, grid: BaseGrid) -> Tensor:
        samples = min(self.samples, grid.video)
        tokens = torch.arange(samples, device=q.device) * grid.video // samples + grid.before
        queries, keys = q[:, :, tokens].float(), k[:, :, tokens].float()
        return heavy_channels(queries, keys, round(self.share * q.shape[-1]), self.adjacent_pairs)

    def _stored(self, q: Tensor, site: Site) -> Tensor:
        """Return the stored channels of the layer's heads, ``[1, H, n]``."""
        first, layer = site.first_head or 0, self.channels[site.layer]
        heads = range(first, first + q.shape[1]) if site.heads is None else site.heads
        channels = torch.tensor([layer[head] for head in heads if head < len(layer)])
        if len(channels) != q.shape[1] or int(channels.max()) >= q.shape[-1] or int(channels.min()) < 0:
            raise ValueError(f"channels do not fit {q.shape[1]} heads with a head_dim of {q.shape[-1]}")
        return channels[None].to(q.device)


def heavy_channels(q: Tensor, k: Tensor, count: int, adjacent_pairs: bool = True) -> Tensor:
    """Return the channels of each head that contribute most to the scores, int64 ``[B, H, count]``.

    Args:
        q, k: sampled queries and keys, ``[B, H, S, D]``.
        count: number of channels, rounded to whole pairs, at least one pair.
        adjacent_pairs: whether channels 2c and 2c + 1 are a pair; otherwise c and c + D / 2. Channels of an odd
            ``head_dim`` are no pairs.
    """
    importance = q.abs().mean(2) * (k - k.mean(2, keepdim=True)).abs().mean(2)  # mean of all products of two samples
    pair = 1 if q.shape[-1] % 2 else 2
    shape = (-1, pair) if adjacent_pairs else (pair, -1)
    numbers = torch.arange(q.shape[-1], device=q.device).view(shape)
    axis = -1 if adjacent_pairs else -2
    best = importance.unflatten(-1, shape).sum(axis).topk(max(1, round(count / pair))).indices
    return (numbers if adjacent_pairs else numbers.mT)[best].flatten(-2)
