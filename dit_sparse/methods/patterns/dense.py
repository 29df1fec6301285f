"""Dense attention: all query-key pairs, the baseline of every comparison.

Source: scaled dot-product attention; A. Vaswani et al., "Attention Is All You Need", arXiv:1706.03762, eq. 1.

Planning: none.

Differs from the authors: no differences. The model's own attention call runs unchanged, so results are equal bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ...method import Method


@dataclass(frozen=True, kw_only=True)
class Dense(Method):
    """Computes all pairs. Accepts a density and ignores it, so that loops over methods need no special case."""

    density_exception: ClassVar[str] = "all pairs are computed"
    static: ClassVar[bool] = True
    keeps_model_attention: ClassVar[bool] = True

    def plan(self, q, k, v, site, memory) -> None:
        return None
