"""Pooled residual: the keys that a plan drops take part in the softmax as means of groups of keys.

Source: H. Ren et al., "Combiner: Full Attention Transformer with Sparse Computation Cost", arXiv:2107.05768, whose
direct and pooled regions share one softmax; the global branch of Video-BLADE (Y. Gu et al., arXiv:2508.10774) is
similar. A dropped group of n keys with mean m joins the softmax of query q with

    logit  q . m / sqrt(D) + log n,        value  the mean of its values.

A group is a key block or cluster of the plan, or with ``group`` at most that many consecutive tokens of one. The
residual is accurate for small groups of similar keys, so the order of the tokens matters as much as the size of the
groups.

The mean of exponentials exceeds the exponential of the mean, so this underestimates the group. The second cumulant,
(q^2 . s) / 2D with the variance s of each channel, would be exact for Gaussian keys but overestimates the concentrated
heads of `shapes-wan`: at density 0.25 `svg` has 28.4 dB, 29.9 dB with pooled blocks, and 19.5 dB with the cumulant
added, so it is left out.

Planning: that of the inner method, and 2 N D additions in every call for the means.

Differs from the authors: nothing is trained, and only dropped groups are pooled (BLADE pools all groups and so counts
kept ones twice).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...clusters import ClusterPlan
from ...composition import Correction
from ...grid import Site
from ...method import Method
from ...notation.settings import within
from ...plan import Plan
from ..patterns.radial import Radial

DEFAULT_INNER = Radial()


@dataclass(frozen=True, kw_only=True)
class Pooled(Correction):
    """Add a pooled tail (`dit_sparse.kernels.tail`) to any plan, of blocks or clusters. The tail costs about 1 / group
    of dense attention.

    Attributes:
        group: greatest number of tokens of a pooled group; None: whole blocks or clusters.
    """

    inner: Method = DEFAULT_INNER
    group: int | None = within("[1, 1000000]", None)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan | ClusterPlan | None:
        plan = super().plan(q, k, v, site, memory)
        return plan if plan is None else plan.with_tail(self.group or plan.tokens)
