"""GUI-KV: keys are ranked by the attention and the norm of their token, less what the row's own frame explains.

Source: K.-H. Huang et al., "GUI-KV: Efficient GUI Agents via KV Cache with Spatio-Temporal Awareness",
arXiv:2510.00536. Reconstructed from the abstract: the constants, and how the parts are combined, are ours. The saliency
of a token is the attention that it receives from the current frame, plus the norm of its hidden state. Keys of other
frames are redundant as far as they lie in the subspace of the keys of the current frame. With an orthonormal basis U of
it (QR decomposition), the score of key n is

    (attention_n + alpha norm_n) (1 - beta |U^T k_n|^2 / |k_n|^2)

where attention and norm are relative to their means, and the second factor is 1 for keys of the current frame.

Planning: 32 F N D multiply-adds for F frames (16 queries and 16 basis vectors of each).

Differs from the authors:
- There is no last frame: every frame in turn is the current one, for the rows of its queries. A key block has the mean
  score of its tokens, and a query block the mean of the scores for its frames.
- Attention is measured by a few queries of the current frame.
- Methods see no hidden states: the norm is that of the values, which weights the attention in the output.
- A basis of all keys of a frame would span all channels: it is that of ``rank`` evenly spaced keys. The mean of all
  keys is subtracted first, which changes no softmax.
- Redundancy lowers the rank of a key, and does not remove it, so that a density is met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...grid import Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import pool, score_in_chunks


@dataclass(frozen=True, kw_only=True)
class GUIKV(Scorer):
    """Saliency without redundancy.

    Attributes:
        samples: queries of each frame that attention is measured by.
        rank: greatest number of vectors of the basis of a frame, at most half of the channels.
        norm_weight: alpha.
        redundancy: beta.
    """

    needs_raster: ClassVar[bool] = True
    needs_values: ClassVar[bool] = True
    samples: int = within("[1, 10000]", 16)
    rank: int = within("[1, 256]", 8)
    norm_weight: float = within("[0, 1000]", 0.5)
    redundancy: float = within("[0, 1]", 0.5)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        grid, block = site.grid, site.block
        queries = q[:, :, _spread(grid, self.samples, q.device)].float() * q.shape[-1] ** -0.5  # [B, H, F, S, D]
        keys, norms = k.float(), v.float().norm(dim=-1)
        norms = (self.norm_weight * norms / norms.mean(-1, keepdim=True).clamp(min=1e-12))[:, :, None]
        centred = keys - keys.mean(2, keepdim=True)
        lengths = centred.square().sum(-1).clamp(min=1e-12)[:, :, None]
        rank = max(1, min(self.rank, q.shape[-1] // 2))
        basis = orthonormal_basis(centred[:, :, _spread(grid, rank, q.device)])
        own = _tokens_of_frames(grid, q.device)

        def score_frames(frames: slice) -> Tensor:
            samples, vectors = queries[:, :, frames], basis[:, :, frames]
            attention = (samples.flatten(2, 3) @ keys.mT).softmax(-1).unflatten(2, samples.shape[2:4]).mean(3)
            inside = (vectors.flatten(2, 3) @ centred.mT).square_().unflatten(2, vectors.shape[2:4]).sum(3) / lengths
            saliency = attention * grid.tokens + norms
            score = saliency * (1 - self.redundancy * inside.masked_fill_(own[frames], 0.0))
            return pool(score.mT, block).mT

        per_frame = q.shape[0] * q.shape[1] * (queries.shape[3] + rank) * grid.tokens
        scores = score_in_chunks(score_frames, grid.frames, per_frame)  # [B, H, F, Qb]
        return (pool(own[None, None].mT, block) @ scores).log()


def orthonormal_basis(x: Tensor) -> Tensor:
    """Return an orthonormal basis of the span of the last R vectors, ``[..., R, D]``, by the Gram-Schmidt process: many
    small QR decompositions at once, without synchronization with the GPU. Dependent vectors become 0."""
    basis: list[Tensor] = []
    for vector in x.unbind(-2):
        rest = vector
        for _ in range(2):  # the second pass removes rounding errors
            rest = rest - sum((rest * one).sum(-1, keepdim=True) * one for one in basis) if basis else rest
        length = rest.norm(dim=-1, keepdim=True)
        basis.append(
            torch.where(length > 1e-4 * vector.norm(dim=-1, keepdim=True), rest / length.clamp(min=1e-12), 0.0)
        )
    return torch.stack(basis, -2)


def _spread(grid: Grid, count: int, device: torch.device) -> Tensor:
    """Return evenly spaced tokens of every frame, at most ``count`` of each, ``[F, count]``."""
    count = min(count, grid.frame)
    starts = torch.arange(grid.frames, device=device)[:, None] * grid.frame + grid.before
    return starts + torch.arange(count, device=device) * grid.frame // count


def _tokens_of_frames(grid: Grid, device: torch.device) -> Tensor:
    """Return which tokens are those of each frame, bool ``[F, N]``; text counts as the nearest frame."""
    video = torch.arange(grid.tokens, device=device) - grid.before
    frame = video.clamp(0, grid.video - 1) // grid.frame
    return frame == torch.arange(grid.frames, device=device)[:, None]
