"""TokenSelect: heads vote for keys, and a selection is reused while the queries stay similar.

Source: W. Wu et al., "TokenSelect: Efficient Long-Context Inference and Length Extrapolation for LLMs via Dynamic
Token-Level KV Cache Selection", arXiv:2411.02886. Every head votes for a key with its attention weight, so that a head
with large scores does not outvote the others:

    score_j = sum over heads h of softmax_j(q_h . k_hj / sqrt(D))

All heads attend to the keys with the highest scores. The selection is reused as long as the cosine similarity of the
queries to those that it was made for stays above a threshold.

Planning: N^2 D / 16 multiply-adds (every 16th query), when the queries have changed.

Differs from the authors:
- Each block of queries has a selection of key blocks, by the votes of a few of its queries; theirs is one of tokens,
  for the new token of a decoding step. The own block is kept and counts in the budget.
- A call is the same layer at the next denoising step, not the next token. The similarity is that of block means,
  averaged over blocks and heads.
- A fall of the similarity takes effect at the next call: comparing it in the same call would wait for the device.
- Without a density, 25 % of the pairs are kept; their budget is a number of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ...density import video_blocks
from ...grid import Site
from ...kernels.planning.block_mass import block_mass_and_lse
from ...method import Method
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan
from ...scoring import QueryDrift, pool


@dataclass(frozen=True, kw_only=True)
class TokenSelect(Method):
    """Votes of heads, reused while queries are similar.

    Attributes:
        density: without one, 0.25.
        similarity: least cosine similarity at which a selection is reused.
        queries_per_block: queries of each block that vote: a power of two that divides the block. None, or more than
            the block holds: all.
    """

    manages_own_plans: ClassVar[bool] = True

    similarity: float = within("[-1, 1]", 0.9)
    queries_per_block: int | None = within(POWER_OF_TWO, 2)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if site.block % min(self.queries_per_block or 1, site.block):
            raise ValueError(f"queries_per_block must divide the block of {site.block}, got {self.queries_per_block}")
        return 0

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        means = pool(q, site.block)
        if "plan" not in memory or memory["drift"].exceeds(1 - self.similarity, means):
            memory.update(plan=self._select(q, k, site), drift=QueryDrift(means))
        return memory["plan"]

    def _select(self, q: Tensor, k: Tensor, site: Site) -> Plan:
        rows = min(self.queries_per_block or site.block, site.block)
        votes = block_mass_and_lse(q, k, site.block, rows=rows)[0].sum(1, keepdim=True)
        blocks = video_blocks(site.grid, site.block, q.device)
        pairs = blocks.pairs(0.25 if self.density is None else self.density)
        keep = blocks.choose(votes, lambda votes: blocks.keep_at(votes, pairs))
        return Plan.from_mask(keep, site.grid.tokens, site.block)
