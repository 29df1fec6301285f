"""SEA: a Performer estimates the attention map at a fixed width, which is interpolated to all keys.

Source: H. Lee et al., "SEA: Sparse Linear Attention with Estimated Attention Mask", arXiv:2310.01777, sec. 3. With the
positive random features of a Performer (K. Choromanski et al., arXiv:2009.14794),

    phi(x) = exp(W x' - |x'|^2 / 2),    x' = x / D^(1/4),    so that the mean of phi(q) phi(k) is exp(q . k / sqrt(D)),

the attention of each query to K groups of keys costs O(N). A small network turns this estimate into the compressed
attention map, which is trained to be that of the model. Its best entries, interpolated to all keys, are attended to.

Planning: 8 N D + 512 N multiply-adds (means of 8 tokens, 32 features, 128 columns).

Differs from the authors:
- Tokens are means of ``group`` tokens, and the rows of the map are blocks of queries.
- The features W are trained, from orthogonal random ones, which the untrained gate uses.
- Their network of convolutions over the map and a linear attention is one filter along each row of the log map, which
  is the identity before the training.
- The mean of all keys is subtracted, which changes no softmax and reduces the variance of the estimate.
- Only the mask: the linear attention that they add to the output is left out.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ...gating.gate import Gate, Tensors
from ...grid import Site
from ...notation.settings import within
from ...scoring import split_blocks

TAPS = 5  # of the filter
MIN_MASS = 1e-9


@dataclass(frozen=True, kw_only=True)
class SEA(Gate):
    """Attention of blocks estimated by random or trained features.

    Attributes:
        group: tokens of a mean; at most a block.
        features_per_head: rows of W.
        width: K, greatest number of columns of the compressed map; the authors use 128 and 256.
        seed: of the random features.
    """

    group: int = within("[1, 256]", 8)
    features_per_head: int = within("[1, 256]", 32)
    width: int = within("[1, 4096]", 128)
    seed: int = within("[0, 4294967296)", 0)

    def initial(self, head_dim: int) -> Tensors:
        generator = torch.Generator().manual_seed(self.seed)
        identity = F.one_hot(torch.tensor([TAPS // 2]), TAPS).float()
        return {"features": orthogonal_features(head_dim, self.features_per_head, generator)[None], "filter": identity}

    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        k = k - k.mean(2, keepdim=True)
        queries, keys = (self._groups(x, site.block) * q.shape[-1] ** -0.25 for x in (q, k))
        sizes = self._groups(torch.ones_like(q[:1, :1, :, :1]), site.block, count=True)[..., 0]
        return {"tokens": queries, "sizes": sizes}, {"tokens": keys, "sizes": sizes}

    def _groups(self, x: Tensor, block: int, count: bool = False) -> Tensor:
        """Return the means of the groups of every block, or their tokens, ``[B, H, Qb, groups, D]``."""
        size = min(self.group, block)
        blocks = split_blocks(x, block)
        groups = F.pad(blocks, (0, 0, 0, -block % size)).unflatten(3, (-1, size)).sum(4)
        return groups if count else groups / self._groups(torch.ones_like(x[:1, :1, :, :1]), block, True).clamp(min=1)

    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        features, blocks = parameters["features"][:, None], keys["tokens"].shape[2]  # [H|1, 1, D, features]
        mass = _positive_features(keys["tokens"], features, (2, 3, 4)) * keys["sizes"][..., None]
        mass = mass.sum(3)  # [B, H, Qb, features]
        compressed = F.adaptive_avg_pool1d(mass.mT.flatten(0, 1), min(self.width, blocks)).unflatten(0, mass.shape[:2])
        estimate = _positive_features(queries["tokens"], features, (4,)).flatten(2, 3) @ compressed
        estimate = estimate / estimate.sum(-1, keepdim=True).clamp(min=1e-30)
        rows = estimate.unflatten(2, queries["tokens"].shape[2:4]) * queries["sizes"][..., None]
        rows = (rows.sum(3) / queries["sizes"].sum(-1, keepdim=True)).clamp(min=MIN_MASS).log()
        if rows.shape[-1] < blocks:
            rows = F.interpolate(rows.flatten(0, 1), blocks, mode="linear").unflatten(0, rows.shape[:2])
        padded = F.pad(rows.flatten(0, 1), (TAPS // 2, TAPS // 2), "replicate").unfold(-1, TAPS, 1)
        return (padded.unflatten(0, rows.shape[:2]) * parameters["filter"][:, None, None]).sum(-1)


def _positive_features(x: Tensor, features: Tensor, over: tuple[int, ...]) -> Tensor:
    """Return phi of ``x [B, H, Qb, groups, D]`` up to a factor that is common to the dimensions ``over``."""
    exponent = x @ features - x.square().sum(-1, keepdim=True) / 2
    return (exponent - exponent.amax(over, keepdim=True)).exp()


def orthogonal_features(dim: int, number: int, generator: torch.Generator) -> Tensor:
    """Return columns of random orthogonal matrices with the lengths of normal vectors, ``[D, number]``."""
    matrices = [torch.linalg.qr(torch.randn(dim, dim, generator=generator))[0] for _ in range(-(-number // dim))]
    return torch.cat(matrices, 1)[:, :number] * torch.randn(dim, number, generator=generator).norm(dim=0)
