"""DeltaLLM: keys that hardly change from frame to frame are skipped outside of a local window of exact attention.

Source: J. Qi et al., "DeltaLLM: A Training-Free Framework Exploiting Temporal Sparsity for Efficient Edge LLM
Inference", arXiv:2507.19608. Reconstructed from the abstract: the rule for deltas is inferred. The keys of one place in
consecutive frames are a sequence in time. A key is skipped if its distance to the last anchor of its place,

    delta_n = |k_n - anchor| / mean over all keys m of |k_m - mean key|,

is below ``threshold``, because the anchor explains it; otherwise it is the next anchor. The first frame holds the first
anchors, whose own delta is the distance to the mean key. Attention is exact in a local window around each query.

Planning: 2 N D multiply-adds (distances of keys to their anchors).

Differs from the authors:
- Time runs over the frames of a video, not over the tokens of a text.
- Blocks are skipped, not keys: those whose mean delta is at most the threshold. With a density, blocks are ranked by
  it, after those of the window, of which the nearest come first.
- The weight of skipped keys is left out. Theirs get the logits of the anchor, which attention to a subset of the keys
  cannot express. Queries are not skipped, since every token needs an output.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ...budget import Above, Budget
from ...density import VideoBlocks
from ...grid import Blocks, Grid, Site
from ...method import Scorer
from ...notation.settings import within
from ...scoring import pool

WINDOW = 1e6  # added to the scores of the window, which are kept first


@dataclass(frozen=True, kw_only=True)
class DeltaLLM(Scorer):
    """Changes of keys in time, and a local window.

    Attributes:
        threshold: least delta of a key that is not skipped, relative to the mean distance of keys from their mean.
        window: attention is exact between frames at most this far apart.
    """

    needs_raster: ClassVar[bool] = True
    threshold: float = within("[0, 100]", 0.5)
    window: int = within("[0, 10000]", 1)

    def paper_budget(self, blocks: VideoBlocks) -> Budget:
        return Above(self.threshold)

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        delta = pool(self._deltas(k.float(), site.grid)[..., None], site.block).mT  # [B, H, 1, Qb]
        near, distance = _window(site.grid, site.block, self.window, q.device)
        return torch.where(near, WINDOW - distance, delta)

    def _deltas(self, k: Tensor, grid: Grid) -> Tensor:
        """Return the delta of every key, ``[B, H, N]``; 0 for text."""
        frames = k[:, :, grid.before : grid.before + grid.video].unflatten(2, (grid.frames, grid.frame)).unbind(2)
        anchor = torch.stack(frames).mean((0, 3))[:, :, None]
        scale = torch.stack([(frame - anchor).norm(dim=-1).mean(-1) for frame in frames]).mean(0)[..., None]
        deltas: list[Tensor] = []
        for frame in frames:
            delta = (frame - anchor).norm(dim=-1) / scale.clamp(min=1e-12)
            anchor = torch.where((delta >= self.threshold)[..., None], frame, anchor) if deltas else frame
            deltas.append(delta)
        return F.pad(torch.cat(deltas, -1), (grid.before, grid.after))


@lru_cache(maxsize=16)
def _window(grid: Grid, block: int, frames: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return which pairs of blocks are in the window, and the distance of all pairs in blocks, ``[Qb, Qb]``."""
    near = Blocks.from_grid(grid, block).frame.gap() <= frames
    position = torch.arange(len(near))
    return near.to(device), (position[:, None] - position).abs().to(device)
