"""MoA: every head attends to a span that grows with the length of the video, alpha + beta F.

Source: T. Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
arXiv:2406.14909, sec. 4. Of a video of F frames, a head keeps the keys in a window around the query and a sink:

    span(F) = alpha + beta F        frames, half of them on either side of the query

alpha and beta differ between heads. The authors measure the influence of every span of a grid on each head, at several
lengths, and solve for the spans with the least loss whose mean density stays below a budget at each of these lengths.
Here that search is ``dit-sparse profile MODEL --candidates moa --lengths 9,21``; the profile then serves other lengths.

Planning: (N / b)^2 comparisons of positions, once per grid.

Differs from the authors:
- The length is counted in frames, so that alpha and beta keep their meaning at another resolution.
- Spans are two-sided.
- The sink is the first frame instead of the first 64 tokens. On `shapes-wan` at density 0.25, with one span in all
  heads, the relative error of the output is 0.229 with a frame and 0.245 with a tenth of it (random blocks: 0.232).
- The search minimizes the measured error of the heads' outputs instead of a first-order estimate of the loss, by a
  Lagrangian instead of a mixed-integer program, and does not limit the number of different spans in a layer.
- This method has one span for all heads, which ``density`` solves for by beta, then alpha. Heads differ in a profile:
  with spans chosen for each head, on the calls that they were chosen on, the error above is 0.155.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ...grid import Grid
from ...notation.settings import within
from ...pattern import Pattern
from ...plan import num_blocks


@dataclass(frozen=True, kw_only=True)
class MoA(Pattern):
    """Window whose span is linear in the number of frames.

    Attributes:
        alpha: constant part of the span, in frames; may be negative.
        beta: part of the span that grows with the video, as a fraction of its frames; the span covers all frames of
            every query at 2.
        sink: whether every query attends to the first frame.
    """

    needs_raster: ClassVar[bool] = True
    knob: ClassVar[str] = "beta"
    knob_range: ClassVar[tuple[float, float]] = (0.0, 2.0)
    narrowing: ClassVar[tuple[tuple[str, float], ...]] = (("alpha", 0.0),)

    alpha: float = within("[-10000, 10000]", 1.0)
    beta: float = within("[0, 2]", 0.25)
    sink: bool = True

    def keep(self, grid: Grid, block: int) -> Tensor:
        start = torch.arange(num_blocks(grid.tokens, block)) * block
        span = (self.alpha + self.beta * grid.frames) * grid.frame
        keep = (start[:, None] - start).abs() <= span / 2
        return keep | (start < grid.before + grid.frame) if self.sink else keep
