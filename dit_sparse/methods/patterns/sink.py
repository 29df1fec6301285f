"""Attention sink: every query attends to the first frames.

Source: G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, who keep the first
tokens of a text. Radial Attention (arXiv:2506.19852) keeps the first frame of Wan's videos. There the first latent
frame corresponds to one pixel frame, and each other latent frame to four.

Meant for unions: ``Radial() | Sink()``, or ``radial|sink`` as a name.

Planning: N / b comparisons, once per grid.

Differs from the authors: the sink is measured in frames instead of tokens, and no window is added. Without a union it
keeps only the sink, the text and the diagonal, and is a baseline that random blocks beat.
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
class Sink(Pattern):
    """The first frames as keys of every query.

    Attributes:
        frames: size of the sink in frames; fractions are allowed.
    """

    needs_raster: ClassVar[bool] = True
    depends_on_shape: ClassVar[bool] = False
    knob: ClassVar[str] = "frames"
    knob_range: ClassVar[tuple[float, float]] = (1e-6, 1e6)

    frames: float = within("(0, 1000000]", 1.0)

    def keep(self, grid: Grid, block: int) -> Tensor:
        starts = torch.arange(num_blocks(grid.tokens, block)) * block
        sink = (starts + block > grid.before) & (starts < grid.before + self.frames * grid.frame)
        return sink.expand(len(starts), -1).clone()
