"""MASFormer: full attention in a few layers, local attention in the others.

Source: Q. Zhang et al., "Efficient Long-Range Transformers: You Need to Attend More, but Not Necessarily at Every
Layer", arXiv:2310.12442, sec. 3. Long-range dependencies need full attention in a few layers only; the other layers
attend locally. With F of L layers full and local layers of density d, a call computes on average

    density = (F + (L - F) d) / L

of the pairs; the paper's models have F = 8 of L = 24.

Planning: (N / b)^2 comparisons of positions, once per grid.

Differs from the authors:
- Their models are trained with this pattern; here it is applied to a model trained with full attention.
- Local attention is a 3-D window (`window`) instead of blocks of a text.
- ``density`` is that of all layers together. Full layers, at most a third of all, take at most ``share`` of it, rounded
  down to whole layers, and the windows of the others are narrowed to the rest. A single call therefore has density 1 or
  less than requested, and of a model with few layers none may be full. Outside of a model, in `dit_sparse.attention`,
  there is one layer, and the method is `window`.
- One full layer of the six of `shapes-wan` at density 0.25 leaves 0.1 to the others: PSNR 18.6 dB, with random
  blocks 21.4 and with the same window in all layers 24.0. Therefore ``share`` is a half, at which none is full there.
- The first layers are full: they have the largest errors on `shapes-wan`. If the schedule keeps them dense anyway,
  sparse calls compute less than requested.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...grid import Grid, Site
from ...method import Method
from ...notation.settings import within
from ...plan import Plan
from .window import Window


@dataclass(frozen=True, kw_only=True)
class MASFormer(Method):
    """Mixed attention spans over the layers.

    Attributes:
        full_layers: greatest fraction of the layers with full attention.
        share: greatest fraction of the density that full layers take, with a density.
        radius: half-width of the windows without a density, as in `Window`.
    """

    full_layers: float = within("[0, 1]", 1 / 3)
    share: float = within("[0, 1]", 0.5)
    radius: float = within("(0, 1]", 0.25)

    def order(self, grid: Grid, block: int) -> Tensor:
        return Window().order(grid, block)

    def density_note(self, grid: Grid, block: int, achieved: float) -> str | None:
        if self.density is not None and achieved < self.density - 0.01:
            return "layers with full attention are among those that stay dense"
        return super().density_note(grid, block, achieved)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        full = self.count_full(site.grid, site.block, site.layers)
        if site.layer < full:
            return Plan.dense(site.grid.tokens, site.block, q.device)
        return self._local(full, site.layers).plan(q, k, v, site, memory)

    def count_full(self, grid: Grid, block: int, layers: int) -> int:
        """Return how many of the ``layers`` have full attention, such that the others can keep what every row needs."""
        limits = [self.full_layers]
        if self.density is not None:
            least = self.least_density(grid, block)
            affordable = (self.density - least) / (1 - least) if least < 1 else 0.0
            limits += [self.share * self.density, max(0.0, affordable)]
        return int(min(limits) * layers + 1e-6)

    def _local(self, full: int, layers: int) -> Window:
        """Return the method of the local layers, at the density that the full ones leave."""
        if self.density is None:
            return Window(radius=self.radius)
        return Window(density=(self.density * layers - full) / (layers - full))
