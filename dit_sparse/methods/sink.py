"""Attention sink: every query keeps the first frames.

Source: G. Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv:2309.17453, who keep the first
tokens of a text; Radial Attention (arXiv:2506.19852) keeps the first frame of Wan's videos, whose first latent frame
stands for one frame of pixels while the others stand for four. Meant for unions: ``Radial() | Sink()``, or
``radial|sink`` where a name is asked for.

Differs from the authors: the sink is measured in frames; alone, with only its own block beside it, it is a baseline.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from ..grid import Grid
from ..method import Pattern
from ..plan import num_blocks


@dataclass(frozen=True, kw_only=True)
class Sink(Pattern):
    """The first frames, as keys of every query.

    Attributes:
        frames: how many; fractions of a frame are allowed.
    """

    knob: ClassVar[str] = "frames"
    knob_range: ClassVar[tuple[float, float]] = (1e-6, 1e6)

    frames: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.frames > 0:
            raise ValueError(f"the sink holds more than 0 frames, not {self.frames}")

    def keep(self, grid: Grid, block: int) -> Tensor:
        starts = torch.arange(num_blocks(grid.tokens, block)) * block
        kept = (starts + block > grid.before) & (starts < grid.before + self.frames * grid.frame)
        return kept.expand(len(starts), -1).clone()
