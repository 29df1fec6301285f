"""PBS-Attn: keys that many queries want are moved together, then blocks are chosen.

Source: X. Wang et al., "Sparser Block-Sparse Attention via Token Permutation", arXiv:2510.21270, sec. 3. Attention does
not care in which order keys and values come. A few probe queries give each key an importance, the attention it
receives on average; keys are sorted by it, so that the heavy ones share blocks, and few blocks hold most of a query
block's attention. Queries stay where they are, and nothing has to be put back.

Differs from the authors: they sort inside segments, for their attention is causal; here one sort takes all video keys.
The probes are queries evenly spaced over the sequence, not its last block. Sorted keys of one block may lie anywhere,
so their mean says little: blocks are ranked by the mean query's attention to every key,

    s_ij = log sum over c in block j of exp(mean(Q_i) . k_c / sqrt(D))

Text is a group of its own that attends to and is attended by all; no own block is kept, for sorted keys have none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..budget import Mass, up_to
from ..clusters import ClusterPlan, Clusters
from ..grid import Site
from ..method import Method
from ..scoring import by_query_blocks, pool


@dataclass(frozen=True, kw_only=True)
class PBS(Method):
    """One global sort of the keys.

    Attributes:
        probes: queries that tell the importance of keys.
        share: of the estimated attention that is kept, where no density is given.
    """

    probes: int = 128
    share: float = 0.9

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.probes < 1:
            raise ValueError(f"probes is how many queries tell the importance of keys, at least 1, not {self.probes}")
        Mass(self.share)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> ClusterPlan:
        grid, block, scale = site.grid, site.block, q.shape[-1] ** -0.5
        k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
        q, k = (x[:, :, grid.before : grid.before + grid.video].float() for x in (q, k))
        probes = q[:, :, :: max(1, grid.video // self.probes)]
        importance = (probes @ k.mT * scale).softmax(-1).mean(2)
        rank = importance.argsort(dim=-1, descending=True, stable=True)
        means, k = pool(q, block), torch.take_along_dim(k, rank[..., None], 2)
        blocks = means.shape[2]

        def estimate(part: slice) -> Tensor:
            logits = F.pad(means[:, :, part] @ k.mT * scale, (0, -grid.video % block), value=-torch.inf)
            return logits.unflatten(-1, (blocks, block)).logsumexp(-1)

        scores = by_query_blocks(estimate, blocks, q.shape[0] * q.shape[1] * grid.video)
        in_place = torch.arange(grid.video, device=q.device)
        queries = Clusters.beside_text((in_place // block)[None, None], blocks, grid)
        keys = Clusters.beside_text(rank.argsort(-1) // block, blocks, grid)
        if grid.tokens > grid.video:
            scores = F.pad(scores, (0, 1, 0, 1), value=torch.inf)
        if self.density is None:
            return ClusterPlan.of(Mass(self.share).keep(scores), queries, keys)
        return ClusterPlan.of(up_to(scores, keys.sizes[..., None, :], self.density * grid.tokens), queries, keys)
