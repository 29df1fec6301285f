"""Rotary embeddings of some frames of a clip, so that a training step can leave out the others."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


class FrameSelection(torch.nn.Module):
    """Computes the rotary embeddings of selected frames, at the positions that they have in the whole clip.

    Args:
        rope: the rotary embedding of a Wan transformer, whose place this module takes.
    """

    def __init__(self, rope: torch.nn.Module):
        super().__init__()
        self.rope, self.selected = rope, threading.local()

    @contextmanager
    def select(self, frames: tuple[int, ...]) -> Iterator[None]:
        """Use the numbers of ``frames`` in the calls of this thread."""
        self.selected.frames = frames
        try:
            yield
        finally:
            self.selected.frames = None

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosines and sines ``[1, tokens, 1, D]``, as the rotary embedding does."""
        frames = getattr(self.selected, "frames", None)
        if frames is None:
            return self.rope(hidden_states)
        batch, channels, _, height, width = hidden_states.shape
        embeddings = self.rope(hidden_states.new_empty(()).expand(batch, channels, frames[-1] + 1, height, width))
        return tuple(table.unflatten(1, (frames[-1] + 1, -1))[:, list(frames)].flatten(1, 2) for table in embeddings)
