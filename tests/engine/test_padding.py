"""Masks that describe padding, wherever the padding is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import dit_sparse as ds
from dit_sparse.engine.forward import AttentionCall
from dit_sparse.engine.masks.padding import KeyPadding, MaskCache, read_padding
from dit_sparse.kernels.executors import executor
from dit_sparse.methods import method

GRIDS = {
    "text before": ds.Grid(3, 3, 4, before=11),
    "text after": ds.Grid(3, 3, 4, after=11),
    "both sides": ds.Grid(3, 3, 4, before=5, after=6),
}
TEXT = {
    "right": [[1] * 7 + [0] * 4, [1] * 11],
    "left": [[0] * 4 + [1] * 7, [0] * 10 + [1]],
    "holes": [[1, 0] * 5 + [1], [0, 1, 1] * 3 + [0, 0]],
}
FORMS = {
    "keys": lambda keys: keys[:, None, None],
    "one row": lambda keys: keys[:, None, None].expand(-1, 1, keys.shape[1], -1),
    "both valid": lambda keys: keys[:, None, :, None] & keys[:, None, None],
    "additive": lambda keys: torch.zeros(keys.shape).masked_fill(~keys, -torch.inf)[:, None, None],
    "finite": lambda keys: torch.zeros(keys.shape).masked_fill(~keys, torch.finfo(torch.float32).min)[:, None, None],
}


def valid_keys(grid: ds.Grid, text: list[list[int]]) -> Tensor:
    text = torch.tensor(text, dtype=torch.bool)
    video = torch.ones(len(text), grid.video, dtype=torch.bool)
    return torch.cat([text[:, : grid.before], video, text[:, grid.before :]], 1)


def masked_call(grid: ds.Grid, mask: Tensor, heads: int = 4) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, h, grid.tokens, 16, generator=generator) for h in (heads, 2, 2))
    stock = lambda: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    return AttentionCall(q, k, v, mask, False, 0.0, None, stock)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("text", TEXT)
@pytest.mark.parametrize("grid", GRIDS)
def test_padding_is_read_from_every_form_of_a_mask(grid, text, form):
    grid, keys = GRIDS[grid], valid_keys(GRIDS[grid], TEXT[text])
    call = masked_call(grid, FORMS[form](keys))
    padding = read_padding(call.mask, 2, grid)
    assert padding.lengths.tolist() == list(padding.counts) == keys.sum(-1).tolist()
    arranged = padding.arrange(keys[:, None, :, None].float())[:, 0, :, 0].bool()
    assert (arranged == (torch.arange(grid.tokens) < keys.sum(-1, keepdim=True))).all()
    stock, rows = call.stock(), keys[:, None, :, None]
    torch.testing.assert_close(padding.attend_without_padding(call) * rows, stock * rows)

    site = padding.arrange_site(ds.Site(grid, block=16)) if padding.order is not None else ds.Site(grid, block=16)
    moved = padding.arrange_call(call)
    plan = method("svg2", density=1.0).plan(moved.q, moved.k, moved.k, site, {}).with_lengths(padding.lengths)
    assert site.grid.tokens == grid.tokens and site.grid.video == grid.video
    out = executor("reference").attend(moved.q, moved.k, moved.v, plan)[0]
    torch.testing.assert_close(padding.restore(out) * rows, stock * rows)
    torch.testing.assert_close(padding.restore(moved.stock()), stock)


@pytest.mark.parametrize("grid", GRIDS.values(), ids=GRIDS)
def test_arranging_keeps_the_video_in_its_order(grid):
    keys = valid_keys(grid, TEXT["holes"])
    padding = read_padding(keys[:, None, None], 2, grid)
    order = torch.arange(grid.tokens).expand(2, -1) if padding.order is None else padding.order
    start = padding.arrange_site(ds.Site(grid)).grid.before if padding.order is not None else grid.before
    assert (order[:, start : start + grid.video] == torch.arange(grid.video) + grid.before).all()


def test_packed_text_moves_the_video_of_each_item_to_the_same_place():
    """The texts of the items have 4 and 11 tokens, and the videos follow them."""
    grid = GRIDS["text before"]
    keys = torch.arange(grid.tokens) < torch.tensor([[4], [11]]) + grid.video
    assert "excludes video tokens" in read_padding(keys[:, None, None], 2, grid)
    padding = read_padding(keys[:, None, None], 2, grid, packed_text=True)
    assert padding.arrange_site(ds.Site(grid)).grid == ds.Grid(3, 3, 4, after=11)
    video = torch.arange(grid.video)
    expected = [torch.cat([video + text, torch.arange(text), torch.arange(text + 36, 47)]) for text in (4, 11)]
    assert padding.order.equal(torch.stack(expected)) and padding.counts == (40, 47)
    assert read_padding(torch.ones(2, 47, dtype=torch.bool), 2, grid, packed_text=True) is None
    no_video = (torch.arange(47) < 30).expand(2, -1)
    assert "excludes video tokens" in read_padding(no_video, 2, grid, packed_text=True)


@pytest.mark.parametrize(
    "mask, words",
    [
        (torch.ones(1, 1, 47, 47, dtype=torch.bool).tril(), "allows different keys for different queries"),
        (torch.full((1, 1, 1, 47), -1.0), "adds a bias"),
        (torch.full((1, 1, 1, 47), torch.nan), "adds a bias"),
        (torch.ones(1, 1, 1, 46, dtype=torch.bool), "not a padding mask over 47 keys"),
        (torch.ones(2, 4, 47, 47, dtype=torch.bool), "not a padding mask over 47 keys"),
        (torch.arange(47)[None, None, None] != 20, "excludes video tokens"),
        (torch.zeros(1, 1, 1, 47, dtype=torch.bool), "excludes video tokens"),
    ],
)
def test_other_masks_are_named(mask, words):
    assert words in read_padding(mask, 2, GRIDS["text before"])


def test_a_mask_that_excludes_nothing_is_no_padding():
    for form in FORMS.values():
        assert read_padding(form(torch.ones(2, 47, dtype=torch.bool)), 2, GRIDS["text before"]) is None


def test_masks_of_one_source_are_read_once():
    grid, cache = GRIDS["text before"], MaskCache()
    keys = valid_keys(grid, TEXT["right"])
    first = masked_call(grid, keys[:, None, None])
    second = masked_call(grid, torch.ones_like(first.mask))
    with_source = [replace(call, mask_source=keys) for call in (first, second)]
    assert cache.read(with_source[0], grid) is cache.read(with_source[1], grid)
    assert isinstance(cache.read(first, grid), KeyPadding) and cache.read(second, grid) is None
