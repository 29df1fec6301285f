"""The tokens of a plain module: one grid for each batch item, and packed sequences of several items.

An attention call of such a module is split into calls of single items, each with its tokens in the order of the item's
grid. An item has plans, a schedule and a choice of executor of its own, whatever its size.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from ..grid import BaseGrid, short_repr
from .forward import AttentionCall
from .interception.parallel import arrange

SAMPLES = 32  # queries of each item that compare a model's attention function with plain attention
MAX_ERROR = 0.02  # relative error of their outputs; bfloat16 rounds by 0.004


@dataclass(frozen=True)
class ItemLayout:
    """The tokens of a transformer call: the grid of every batch item, or one grid for all of them."""

    grids: tuple[BaseGrid, ...]
    references: ClassVar[int] = 0

    @classmethod
    def from_grids(cls, value: Any) -> ItemLayout:
        """Return the layout of a grid or a sequence of grids. Equal grids become one, so that items share a plan.

        Raises:
            ValueError: the value is something else.
        """
        grids = tuple(value) if isinstance(value, Sequence) else (value,)
        if not grids or not all(isinstance(grid, BaseGrid) for grid in grids):
            raise ValueError(f"grid must return a Grid, a VoxelGrid or a sequence of them, got {short_repr(value)}")
        return cls(grids[:1] if all(grid == grids[0] for grid in grids) else grids)

    @property
    def items(self) -> int:
        """Number of items that are computed separately."""
        return sum(len(grid.items()) for grid in self.grids)

    def split(self, call: AttentionCall) -> list[tuple[AttentionCall, BaseGrid]] | str:
        """Return the call of every item and its grid, or why the call cannot be split."""
        tokens, batch = call.q.shape[2], len(call.q)
        if wrong := next((grid for grid in self.grids if grid.tokens != tokens), None):
            return f"{tokens} queries and {call.k.shape[2]} keys do not fit the grid {wrong}"
        if len(self.grids) not in (1, batch):
            return f"there are {len(self.grids)} grids for {batch} batch items"
        parts = []
        for number, grid in enumerate(self.grids):
            own = call if len(self.grids) == 1 else _select(call, lambda x, number=number: x[number : number + 1])
            for tokens, item in grid.items():
                if tokens is None:
                    parts.append((own, item))
                elif len(tokens) == grid.tokens:
                    parts.append((arrange(own, tokens.to(call.q.device)), item))
                else:
                    index = tokens.to(call.q.device)
                    parts.append((_select(own, lambda x, index=index: x.index_select(2, index)), item))
        if len(parts) > 1 and call.mask is not None:
            return "the attention mask belongs to several items of different sizes"
        return parts

    def merge(self, outputs: Sequence[Tensor]) -> Tensor:
        """Return the output of a call from those of the items, in the order of :meth:`split`."""
        outputs, merged = list(outputs), []
        for grid in self.grids:
            items = grid.items()
            own, outputs = outputs[: len(items)], outputs[len(items) :]
            if items[0][0] is not None:
                order = torch.cat([tokens for tokens, _ in items]).argsort()
                own = [torch.cat(own, 2).index_select(2, order.to(own[0].device))]
            merged += own
        return torch.cat(merged)


def _select(call: AttentionCall, take: Callable[[Tensor], Tensor]) -> AttentionCall:
    """Return a call with a part of its tokens or items, which its ``stock`` computes by PyTorch's attention."""
    q, k, v = (take(x) for x in (call.q, call.k, call.v))
    options = {"scale": call.scale, "enable_gqa": q.shape[1] != k.shape[1]}
    return replace(call, q=q, k=k, v=v, stock=lambda: F.scaled_dot_product_attention(q, k, v, **options))


def check_attention(call: AttentionCall, parts: Sequence[tuple[AttentionCall, BaseGrid]], layout: ItemLayout) -> None:
    """Raise ValueError unless the model's attention function computes plain attention within every item.

    Args:
        call: a call of it, before it is split into ``parts``.
    """
    expected, is_sample = [], []
    for part, _ in parts:
        tokens = part.q.shape[2]
        index = torch.arange(0, tokens, max(1, tokens // SAMPLES), device=part.q.device)
        rows = part.q[:, :, index].float()
        k, v = (x.repeat_interleave(rows.shape[1] // x.shape[1], 1).float() for x in (part.k, part.v))
        scale = rows.shape[-1] ** -0.5 if part.scale is None else part.scale
        out = (rows @ k.mT * scale).softmax(-1) @ v
        expected.append(torch.zeros(part.q.shape, device=out.device).index_copy_(2, index, out))
        sampled = torch.zeros(len(out), 1, tokens, 1, device=out.device)
        is_sample.append(sampled.index_fill_(2, index, 1.0))
    expected = layout.merge(expected)
    error = (call.stock().float() - expected) * layout.merge(is_sample)
    relative = float(error.norm() / expected.norm().clamp(min=1e-12))
    if not relative <= MAX_ERROR:
        raise ValueError(
            f"the model's attention function does not compute the attention of its arguments within each item: its "
            f"relative error is {relative:.2f}; check call=, heads_first= and grid="
        )
