"""VoxelGrid: the layout of a sequence whose tokens are voxels, in any order.

Attention does not depend on the order of the tokens, but plans do, because blocks are cut from it. Voxels are therefore
always computed along the Morton curve (:func:`dit_sparse.order.morton`), on which the voxels of every aligned cell of
4^3, 8^3 or 2^n cubed are consecutive. Callers sort the tokens by :meth:`VoxelGrid.items`; methods and executors get
sorted voxels, so none of them has to reorder anything.
"""

from __future__ import annotations

import hashlib
import operator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..grid import MAX_TOKENS, BaseGrid, short_repr
from ..order import morton_index

MAX_SIDE = 1 << 20  # three coordinates of 20 bits fit in one Morton index in int64


@dataclass(frozen=True, eq=False, repr=False)
class VoxelGrid(BaseGrid):
    """Layout of one self-attention sequence: text tokens, voxels in any order, text tokens.

    Grids are equal if their voxels, in the same order, and their text lengths are equal. The hash is that of a digest,
    so grids can be keys of caches.

    A packed sequence, ``[T, H, D]``, holds the voxels of several batch items, which do not attend to each other. Its
    coordinates have the batch item in a first column, and the items may be mixed in any order. Each item is planned and
    computed separately, whatever its size.

    Attributes:
        voxels: whole coordinates of any sign, ``[V, 3]``, or ``[V, 4]`` with the batch item first. Stored as int64 on
            the CPU.
        before: text tokens, such as the token of a timestep, before the voxels.
        after: text tokens after the voxels.
        item: batch item of each voxel, int64 ``[V]``; None: all voxels belong to one item.
        sides: size of the bounding box along the three axes.

    Raises:
        ValueError: the coordinates have another shape, are not whole, or occur twice; they span more than 1,048,576
            along an axis; a text length is negative; or a packed sequence has text.
    """

    voxels: Tensor
    before: int = 0
    after: int = 0
    item: Tensor | None = field(init=False)
    sides: tuple[int, int, int] = field(init=False)
    _digest: bytes = field(init=False)

    def __post_init__(self) -> None:
        for name in ("before", "after"):
            object.__setattr__(self, name, _text_length(name, getattr(self, name)))
        voxels = _whole_coordinates(self.voxels)
        low, high = (edge.tolist()[-3:] for edge in (voxels.amin(0), voxels.amax(0)))
        item = voxels[:, 0] if voxels.shape[1] == 4 and bool((voxels[:, 0] != voxels[0, 0]).any()) else None
        sides = tuple(last - first + 1 for first, last in zip(low, high, strict=True))
        digest = hashlib.blake2b(voxels.numpy().tobytes() + bytes([voxels.shape[1]]), digest_size=16).digest()
        for name, value in (("voxels", voxels), ("item", item), ("sides", sides), ("_digest", digest)):
            object.__setattr__(self, name, value)
        if max(sides) > MAX_SIDE:
            raise ValueError(f"voxels may span at most {MAX_SIDE} along an axis, got {max(sides)}")
        if item is not None and self.before + self.after:
            raise ValueError("a packed sequence of several batch items has no text: give one grid for each item")
        ordered = voxels[self._sorted_voxels]
        if (ordered[1:] == ordered[:-1]).all(1).any():
            raise ValueError("the same voxel occurs twice; every voxel must be one token")

    @property
    def video(self) -> int:
        """Number of voxels."""
        return len(self.voxels)

    def items(self) -> list[tuple[Tensor | None, VoxelGrid]]:
        return self._items

    @cached_property
    def _items(self) -> list[tuple[Tensor | None, VoxelGrid]]:
        order = self._sorted_voxels
        if self.item is not None:
            sizes = self.item.unique(return_counts=True)[1].tolist()
            return [(own, VoxelGrid(self.voxels[own, 1:])) for own in order.split(sizes)]
        if order.equal(torch.arange(self.video)):
            return [(None, self)]
        tokens = torch.arange(self.tokens)
        tokens[self.before : self.before + self.video] = order + self.before
        return [(tokens, VoxelGrid(self.voxels[order], self.before, self.after))]

    @cached_property
    def _cells(self) -> Tensor:
        """Coordinates from 0 in every item, ``[V, 3]``."""
        cells = self.voxels[:, -3:]
        if self.item is None:
            return cells - cells.amin(0)
        items, number = self.item.unique(return_inverse=True)
        return cells - torch.stack([cells[self.item == item].amin(0) for item in items])[number]

    @cached_property
    def _sorted_voxels(self) -> Tensor:
        """Order of the voxels along the Morton curve, item by item, ``[V]``."""
        order = morton_index(self._cells.unbind(1), max(self.sides).bit_length()).argsort()
        return order if self.item is None else order[self.item[order].argsort(stable=True)]

    def coordinates(self, order: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the three coordinates (int64, from 0) and is-text (bool) of every token in the given order, each
        ``[N]``. Text tokens have the coordinates of the nearest voxel of the sequence.

        Raises:
            ValueError: the sequence is packed, so its items have no common coordinates.
        """
        if self.item is not None:
            raise ValueError("a packed sequence of several batch items is planned item by item, see VoxelGrid.items")
        voxel, text = self._video_index(order)
        return *self._cells[voxel].unbind(1), text

    def __eq__(self, other: object) -> bool:
        return isinstance(other, VoxelGrid) and self._key == other._key

    def __hash__(self) -> int:
        return hash(self._key)

    @property
    def _key(self) -> tuple[bytes, int, int]:
        return self._digest, self.before, self.after

    def __str__(self) -> str:
        before = f"{self.before} text + " if self.before else ""
        after = f" + {self.after} text" if self.after else ""
        items = "" if self.item is None else f" of {len(self.item.unique())} items"
        return f"{before}{self.video} voxels{items} in {'x'.join(map(str, self.sides))}{after}"

    def __repr__(self) -> str:
        return f"VoxelGrid({self})"


def _text_length(name: str, value: Any) -> int:
    try:
        length = -1 if isinstance(value, bool) else operator.index(value)
    except TypeError:
        length = -1
    if not 0 <= length <= MAX_TOKENS:
        raise ValueError(f"{name} must be a number of text tokens, at least 0, got {short_repr(value)}")
    return length


def _whole_coordinates(values: Any) -> Tensor:
    """Return coordinates as int64 ``[V, 3]`` or ``[V, 4]`` on the CPU, a copy of the caller's tensor."""
    try:
        given = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError):
        raise ValueError(f"voxels must be a tensor of coordinates [V, 3] or [V, 4], got {short_repr(values)}") from None
    if given.ndim != 2 or given.shape[1] not in (3, 4) or not len(given):
        raise ValueError(f"voxels must be coordinates [V, 3], or [V, 4] with the batch item, got {list(given.shape)}")
    whole = given.to(torch.int64, copy=True)
    if given.dtype == torch.bool or given.is_complex() or not (whole == given).all():
        raise ValueError("the coordinates of voxels must be whole numbers, in units of the voxel")
    return whole
