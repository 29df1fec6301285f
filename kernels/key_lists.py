"""Lists of the key groups that each query group keeps, made from boolean masks."""

from __future__ import annotations

import torch
from torch import Tensor

MAX_UNTRIMMED_BYTES = 16 << 20  # smaller index lists are not trimmed, because trimming synchronizes with the GPU


def lists_from_mask(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Return the index and count of a boolean mask ``[B|1, H|1, Q, Qk]``. Raises as :func:`check_rows` does."""
    position = keep.cumsum(-1)
    count = position[..., -1].int()
    check_rows(count)
    width = list_width(count, keep.shape[-1])
    index = torch.zeros(*keep.shape[:-1], 1 + width, dtype=torch.int32, device=keep.device)
    number = torch.arange(keep.shape[-1], dtype=torch.int32, device=keep.device).expand(keep.shape)
    index.scatter_(-1, position.mul_(keep), number)  # numbers that are not kept go to position 0, which is cut off
    return index[..., 1:].contiguous(), count


def check_rows(count: Tensor) -> None:
    """Raise ValueError if a row is empty. On a GPU this is a device-side assert, so that nothing synchronizes."""
    message = "a query block keeps no key block; every row must keep at least one"
    if count.is_cuda:
        torch._assert_async((count > 0).all(), message)
    elif (count == 0).any():
        raise ValueError(message)


def list_width(count: Tensor, columns: int) -> int:
    """Return the width of the index lists: the largest count.

    On a GPU the largest count synchronizes with the device, so lists below `MAX_UNTRIMMED_BYTES` keep all ``columns``.
    Larger ones are trimmed: attention over that many blocks takes much longer than the wait.
    """
    if count.is_cuda and count.numel() * columns * torch.int32.itemsize <= MAX_UNTRIMMED_BYTES:
        return columns
    return int(count.max())
