"""TidalDecode: a few layers select key blocks by exact attention, and the layers after them reuse the selection.

Source: L. Yang et al., "TidalDecode: Fast and Accurate LLM Decoding with Position Persistent Sparse Attention",
arXiv:2410.05076, sec. 3. The keys with the most attention are mostly the same in consecutive layers. So only few layers
select: with exact attention weights p and the layer s(l) of the last selection before layer l, a row i of layer l keeps

    K_i(l) = top-k over j of  sum over r in block i, c in block j of p_rc(s(l))

The authors compute layers 0 and 1 of 32 densely and select at layers 2 and 13. Here dense layers are a setting of the
schedule (``dense_layers``), the first sparse layer selects, and so does every layer that is ``selection_interval``
layers after a selection.

Planning: N^2 D / 4 multiply-adds (every 4th query), in three layers of a model.

Differs from the authors:
- Blocks of queries select blocks of keys; they select single keys for the one query of a decoding step.
- A layer that selects computes its own selection, so that it meets the density; theirs computes all pairs.
- A selection uses every fourth query (``queries_per_block``).
- Text and the own block of every row are kept.
- A head reuses the selection of the head with the same number, as theirs does, though heads of different layers need
  not be alike. ``average_heads`` selects by the mean over the heads instead, of a rank under context parallelism. On
  the bundled model at density 0.25, two prompts, where every second layer selects, the mean gives clips of 23.5 dB and
  single heads 21.9 dB (random blocks: 20.7 dB).
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ...density import video_blocks
from ...grid import Site
from ...kernels.planning.block_mass import block_mass_and_lse
from ...method import Method, shared_memory
from ...notation.settings import POWER_OF_TWO, within
from ...plan import Plan
from ...scoring import check_queries_per_block


@dataclass(frozen=True, kw_only=True)
class Tidal(Method):
    """Selection by exact block mass, shared by consecutive layers.

    Attributes:
        density: 0.25 if None; the authors keep 256 keys.
        selection_interval: layers from one selection to the next: a count (int) or a fraction of all layers (float).
        average_heads: whether all heads of a layer have the same selection.
        queries_per_block: queries of each block that a selection uses: a power of two that divides the block. None, or
            more than the block holds: all.
    """

    selection_interval: int | float = within("[1, 10000]", 0.35, float="(0, 1]")
    average_heads: bool = False
    queries_per_block: int | None = within(POWER_OF_TWO, 16)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        check_queries_per_block(self.queries_per_block, site.block)
        return 0

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        last, interval = shared_memory(memory), self.selection_interval
        interval = max(1, round(interval * site.layers)) if isinstance(interval, float) else interval
        if "plan" not in last or not 0 < site.layer - last["layer"] < interval:
            last.update(plan=self._select(q, k, site), layer=site.layer, key=(self.density, q.shape[1]))
        elif last["key"] != (self.density, q.shape[1]):  # the guard raises the density of single layers
            return self._select(q, k, site)
        return last["plan"].to(q.device)

    def _select(self, q: Tensor, k: Tensor, site: Site) -> Plan:
        mass, _ = block_mass_and_lse(q, k, site.block, rows=min(self.queries_per_block or site.block, site.block))
        mass = mass.mean(1, keepdim=True) if self.average_heads else mass
        blocks = video_blocks(site.grid, site.block, q.device)
        pairs = blocks.pairs(0.25 if self.density is None else self.density)
        keep = blocks.choose(mass, lambda mass: blocks.keep_at(mass, pairs))
        return Plan.from_mask(keep, site.grid.tokens, site.block)
