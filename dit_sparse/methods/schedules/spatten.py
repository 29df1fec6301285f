"""SpAtten: cascade pruning of keys and heads by the attention and the output accumulated over the layers.

Source: H. Wang, Z. Zhang, S. Han, "SpAtten: Efficient Sparse Attention Architecture with Cascade Token and Head
Pruning", arXiv:2012.09852, sec. 3. A key that receives little attention in all layers so far is dropped for all
queries, in this layer and in all later ones; a head with small outputs so far is skipped in the later ones:

    a_hj(l) = a_hj(l - 1) + sum over queries r of p_hrj(l),      m_h(l) = m_h(l - 1) + sum |O_h(l)|

where the softmax p of head h is over the keys that are left. The fraction of keys falls linearly over the layers; here
from 1 + ``slope`` to 1 - ``slope`` times the density, so that the mean over the sparse layers is the density.

In a video hardly any key is unimportant to all queries, because attention is local. On `shapes-wan` at density
0.25 the kept blocks hold 0.55 of the attention, those of random blocks 0.53, but the error of the output is 0.31 and
0.29, because random blocks drop other keys in every row; the clips are equal to 0.1 dB.

Planning: 64 N D multiply-adds (64 sampled queries).

Differs from the authors:
- Only keys are pruned. Every token needs an output, so queries are never dropped.
- Every head drops keys of its own, because plans may differ by head. Theirs drops a key for all heads, by the sum of
  a over the heads (``share_heads``), which retains slightly less attention on `shapes-wan`.
- Keys are dropped by blocks. Text and the own block of every row are kept.
- p is that of ``samples`` random queries, because executors return no weights. In return a layer knows its own
  attention before it prunes, so that the first sparse layer prunes as well; theirs leaves the first 15 % of the layers
  unpruned, which is ``dense_layers`` of the schedule here.
- Heads are skipped only with ``skipped_heads``, and their pairs go to the other heads. Heads of one number have little
  in common in different layers, and the output projection is not part of their size.
- No progressive quantization, which needs their hardware.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ...density import VideoBlocks, video_blocks
from ...grid import Site
from ...method import AttentionOutput, Method, shared_memory
from ...notation.settings import within
from ...plan import Plan
from ...scoring import attention_received, without_padding


@dataclass(frozen=True, kw_only=True)
class SpAtten(Method):
    """Key blocks with the least accumulated attention are dropped for all rows.

    Attributes:
        density: mean over the sparse layers; 0.25 if None.
        slope: how far the first and the last sparse layer are from the mean; less where a layer would exceed density 1
            or have less than text and its own blocks.
        share_heads: whether all heads drop the same keys.
        skipped_heads: fraction of the heads that the last layer skips, which rises linearly from 0. A skipped head
            computes only text and its own blocks, and its output is zero.
        samples: number of random queries that measure the attention.
        seed: of the sample.
    """

    slope: float = within("[0, 1]", 0.5)
    share_heads: bool = False
    skipped_heads: float = within("[0, 1)", 0.0)
    samples: int = within("[1, 10000]", 64)
    seed: int = within("[0, 4294967296)", 0)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Plan:
        shared, blocks = shared_memory(memory), video_blocks(site.grid, site.block, q.device)
        first = min(site.layer, shared.get("first", site.layer))
        if site.layer <= shared.get("layer", site.layer):  # the first layer of a step
            shared.clear()
        layers_after_first = site.layers - 1 - first
        depth = (site.layer - first) / layers_after_first if layers_after_first else 0.5
        hidden, so_far = (shared[name].to(q.device) if name in shared else None for name in ("hidden", "attention"))
        received = attention_received(q, k, site, self.samples, self.seed, hidden)
        received = received.sum(1, keepdim=True) if self.share_heads else received
        received = received if so_far is None or so_far.shape != received.shape else received + so_far
        pairs, skipped = self._pairs(blocks, depth, q, shared.get("size"))
        heads = received.shape[1] if skipped is None else q.shape[1]
        scores = received[:, :, None].expand(-1, heads, received.shape[-1], -1)
        keep = blocks.choose(scores, lambda scores: blocks.keep_at(scores, pairs))
        shared.update(first=first, layer=site.layer, attention=received, hidden=_dropped(keep, blocks))
        memory["skipped"] = skipped
        return Plan.from_mask(keep, site.grid.tokens, site.block)

    def _pairs(
        self, blocks: VideoBlocks, depth: float, q: Tensor, size: Tensor | None
    ) -> tuple[float | Tensor, Tensor | None]:
        """Return the pairs of the video at a depth from 0, the first sparse layer, to 1, and which heads are skipped,
        bool ``[B, H]`` or None."""
        density, heads = 0.25 if self.density is None else self.density, q.shape[1]
        least, most = blocks.own_pairs, blocks.tokens**2
        slope = min(self.slope, 1 / density - 1, max(0.0, 1 - (1 - (most - least) / blocks.total**2) / density))
        pairs = blocks.pairs(density * (1 + slope * (1 - 2 * depth)))
        skipped = min(int(self.skipped_heads * depth * heads), int(heads * (most - pairs) / max(1, most - least)))
        if size is None or skipped < 1 or size.shape[1] != heads:
            return pairs, None
        is_skipped = size.to(q.device).argsort(dim=-1, stable=True).argsort(-1) < skipped
        others = (heads * pairs - skipped * least) / (heads - skipped)
        return torch.where(is_skipped, float(least), others).double(), is_skipped

    def correct(self, result: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if not self.skipped_heads:
            return result.out, result.lse
        shared, out, skipped = shared_memory(memory), result.out, memory["skipped"]
        if skipped is not None:
            out = out.masked_fill(skipped.repeat(len(out) // len(skipped), 1)[..., None, None], 0.0)
        visible = out if result.plan.lengths is None else without_padding(out, result.plan.lengths)
        size = visible[-len(shared["attention"]) :].float().abs().sum((-2, -1))
        shared["size"] = size + shared["size"].to(size.device) if "size" in shared else size
        return out, result.lse


def _dropped(keep: Tensor, blocks: VideoBlocks) -> Tensor:
    """Return the key blocks that no row of the video keeps except its own, bool ``[B, H, Qb]``."""
    others = keep & ~torch.eye(keep.shape[-1], dtype=torch.bool, device=keep.device)
    rows = others if blocks.index is None else others.index_select(2, blocks.index)
    return ~rows.any(2)
