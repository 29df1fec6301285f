"""Attention masks: padding of batch items, and parts that are causal by frames."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...grid import Grid, Site
from ..forward import AttentionCall, is_block_mask
from .causal import CausalParts, read_causal

EXCLUDED = -1e4  # additive mask values up to this one exclude a key


@dataclass(frozen=True)
class KeyPadding:
    """The keys that the mask of an attention call excludes, the same for all queries and heads.

    Attributes:
        lengths: tokens of each item before its padding, ``[B]``, in ``order``.
        counts: the same numbers on the host.
        order: order that moves padding to the end, int64 ``[B, N]``: video, other tokens, padding. None: the padding
            is at the end already.
    """

    lengths: Tensor
    counts: tuple[int, ...]
    order: Tensor | None = None

    @cached_property
    def _inverse(self) -> Tensor:
        return self.order.argsort(-1)

    def arrange(self, x: Tensor) -> Tensor:
        """Return ``x [B, H, N, D]`` with its padding at the end."""
        return x if self.order is None else x.gather(2, self.order[:, None, :, None].expand_as(x))

    def restore(self, x: Tensor) -> Tensor:
        """Return ``x [B, H, N, D]`` in the order of the model: the inverse of :meth:`arrange`."""
        return x if self.order is None else x.gather(2, self._inverse[:, None, :, None].expand_as(x))

    def arrange_call(self, call: AttentionCall) -> AttentionCall:
        """Return the call in :attr:`order`; its ``stock`` computes the output in this order, too."""
        q, k, v = (self.arrange(x) for x in (call.q, call.k, call.v))
        return replace(call, q=q, k=k, v=v, stock=lambda: self.arrange(call.stock()))

    def arrange_site(self, site: Site) -> Site:
        """Return the site with the token grid in :attr:`order`."""
        grid = site.grid
        return replace(site, grid=replace(grid, before=0, after=grid.before + grid.after))

    def attend_without_padding(self, call: AttentionCall) -> Tensor:
        """Compute a call densely, without its padding and mask, which lets PyTorch choose its fastest kernel."""
        keys, values = self.arrange(call.k), self.arrange(call.v)
        options = {"scale": call.scale, "enable_gqa": call.q.shape[1] != keys.shape[1]}
        if len(set(self.counts)) == 1:
            length = self.counts[0]
            return F.scaled_dot_product_attention(call.q, keys[:, :, :length], values[:, :, :length], **options)
        items = zip(call.q.split(1), keys.split(1), values.split(1), self.counts, strict=True)
        return torch.cat(
            [F.scaled_dot_product_attention(q, k[:, :, :n], v[:, :, :n], **options) for q, k, v, n in items]
        )


def read_padding(mask: Tensor, batch: int, grid: Grid, packed_text: bool = False) -> KeyPadding | str | None:
    """Return the padding that a mask describes, None if it excludes nothing, or why it is not a padding mask.

    Args:
        mask: attention mask of the call: which keys are valid, ``[..., N]``, or which pairs, ``[..., N, N]``; boolean,
            or additive with values of 0 and at most `EXCLUDED`.
        batch: B.
        grid: token grid of the call, for items without padding.
        packed_text: as in ``Family``: the text of an item with padding is shorter, and its video starts earlier.
    """
    keys = _valid_keys(mask, batch, grid.tokens)
    if isinstance(keys, str):
        return keys
    position, lengths = torch.arange(grid.tokens, device=mask.device), keys.sum(-1)
    counts = tuple(lengths.tolist())
    if min(counts) == grid.tokens:
        return None
    is_at_end = bool((keys == (position < lengths[:, None])).all())
    is_shifted = packed_text and is_at_end and min(counts) >= grid.video + grid.after
    start = lengths[:, None] - grid.video - grid.after if is_shifted else grid.before
    is_video = (position >= start) & (position < start + grid.video)
    if (~keys & is_video).any():
        return "the attention mask excludes video tokens"
    order = None
    if is_shifted or not is_at_end:
        order = torch.where(keys, (~is_video).int(), 2).argsort(dim=-1, stable=True)
    expand = lambda x: x if x is None else x.expand(batch, *x.shape[1:])
    return KeyPadding(expand(lengths), counts * (batch // len(counts)), expand(order))


def _valid_keys(mask: Tensor, batch: int, tokens: int) -> Tensor | str:
    """Return which keys are valid, bool ``[B|1, N]``, or why the mask depends on more than the key."""
    if mask.dtype != torch.bool:
        if not ((mask == 0) | (mask <= EXCLUDED)).all():
            return "the attention mask adds a bias to the scores"
        mask = mask == 0
    shape = f"the attention mask {list(mask.shape)}"
    if mask.shape[-1] != tokens:
        return f"{shape} is not a padding mask over {tokens} keys"
    if mask.numel() in (tokens, batch * tokens):
        return mask.reshape(-1, tokens)
    if mask.ndim < 2 or mask.shape[-2] != tokens or mask.numel() not in (tokens**2, batch * tokens**2):
        return f"{shape} is not a padding mask over {tokens} keys"
    pairs = mask.reshape(-1, tokens, tokens)
    keys = pairs.any(1)
    # Rows of padding may be excluded, too: their outputs are not used.
    if not (pairs == keys[:, None]).all() and not (pairs == keys[:, None] & keys[..., None]).all():
        return f"{shape} allows different keys for different queries"
    return keys


def read_mask(mask: Any, batch: int, grid: Grid, packed_text: bool = False) -> KeyPadding | CausalParts | str | None:
    """Return what a mask describes: padding as `read_padding` does, the parts of a causal mask, or why neither."""
    padding = "a BlockMask" if is_block_mask(mask) else read_padding(mask, batch, grid, packed_text)
    if not isinstance(padding, str):
        return padding
    if not is_block_mask(mask) and (mask.ndim < 2 or mask.shape[-2] != grid.tokens or "bias" in padding):
        return padding
    return read_causal(mask, grid)


class MaskCache:
    """What masks describe, cached for one transformer call because reading a mask synchronizes with the GPU."""

    def __init__(self) -> None:
        self._cache: dict[tuple, tuple] = {}  # holds the masks: their ids stay unique

    def read(self, call: AttentionCall, grid: Grid) -> KeyPadding | CausalParts | str | None:
        """Return what the mask of a call describes, as `read_mask` does; None without a mask."""
        if call.mask is None:
            return None
        source = call.mask if call.mask_source is None else call.mask_source
        key = id(source), call.mask.shape, grid
        if key not in self._cache:
            self._cache[key] = source, read_mask(call.mask, call.q.shape[0], grid, call.packed_text)
        return self._cache[key][1]

    def clear(self) -> None:
        self._cache.clear()
