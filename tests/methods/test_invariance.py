"""Laws of attention that corrections and planning obey: offsets, rotations, scaling, permutations within groups."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torch import Tensor

from attention_cases import assert_near, qkv, term_labels
from dit_sparse import Grid, Method, Site
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import METHODS, method

GRID, BLOCK, HEADS, DIM = Grid(5, 7, 3, after=11), 16, 2, 32  # 116 tokens
LENGTHS = torch.tensor([116, 110])
CORRECTIONS = [
    "sol", "sol(budget=above(0.5))", "pooled(svg)", "pooled(svg2)", "pooled(xattention, group=5)",
    "rettention(window)", "rettention(svg2, ramp=0.0)", "cached(pooled(sparge))",
]  # fmt: skip
every_correction = pytest.mark.parametrize("name", CORRECTIONS)
every_padding = pytest.mark.parametrize("lengths", [None, LENGTHS], ids=["", "padded"])


DEPENDS_ON = {  # fraction of the pairs that may differ
    ("subblock", "offset"): 0.2,  # rows compete by unnormalized mass
    ("hip", "offset"): 0.2,  # the best score of several queries, without their log-sum-exp
    ("double_sparsity", "rotation"): 0.2,  # few channels predict the others
    ("sea", "rotation"): 0.2,  # features are random
    ("sale", "rotation"): 0.1,  # channels are rounded
    ("spark", "rotation"): 1.0,  # the first channels predict the others
}


def inputs() -> list[list[Tensor]]:
    """q, k and v of two steps."""
    return [qkv(GRID.tokens, batch=2, dim=DIM, seed=seed) for seed in (0, 1)]


def correct(one: Method, steps: list[list[Tensor]], plan, scale: float | None = None) -> list[tuple[Tensor, Tensor]]:
    """Return output and log-sum-exp of each step, all with one plan."""
    memory, results = {}, []
    one.plan(*steps[0], Site(GRID, BLOCK), memory)
    for step, (q, k, v) in enumerate(steps):
        attend = partial(reference.attend, q, k, v, scale=scale)
        result = AttentionOutput(q, k, v, plan, scale, *attend(plan), partial(attend, plan.full()))
        results.append(one.correct(result, Site(GRID, BLOCK, step=step), memory))
    return results


def method_and_plan(name: str, lengths: Tensor | None):
    one = method(name, **({} if "budget" in name else {"density": 0.3}))
    return one, one.plan(*inputs()[0], Site(GRID, BLOCK), {}).with_lengths(lengths)


def changed(steps: list[list[Tensor]], q=lambda x: x, k=lambda x: x, v=lambda x: x) -> list[list[Tensor]]:
    return [[change(x) for change, x in zip((q, k, v), step, strict=True)] for step in steps]


def assert_equal_rows(actual: Tensor, expected: Tensor, lengths: Tensor | None, tolerance: float = 2e-5) -> None:
    """Assert that the rows without padding are near."""
    real = torch.arange(GRID.tokens) < (torch.tensor([GRID.tokens]) if lengths is None else lengths)[:, None]
    rows = real[:, None].expand(2, HEADS, -1)
    assert_near(actual[rows], expected[rows], tolerance)


@every_correction
@every_padding
@pytest.mark.parametrize("scale", [None, 0.4])
def test_an_offset_of_all_keys_shifts_the_log_sum_exp_alone(name, lengths, scale):
    """q . (k + u) = q . k + q . u, so each row of scores shifts by a constant."""
    (one, plan), steps = method_and_plan(name, lengths), inputs()
    offset = 2 * torch.randn(2, HEADS, 1, DIM, generator=torch.Generator().manual_seed(5))
    plain = correct(one, steps, plan, scale)
    shifted = correct(one, changed(steps, k=lambda k: k + offset), plan, scale)
    for (q, _, _), (out, lse), (other, other_lse) in zip(steps, plain, shifted, strict=True):
        assert_equal_rows(other, out, lengths)
        shift = (q * offset).sum(-1) * (DIM**-0.5 if scale is None else scale)
        assert_equal_rows(other_lse, lse + shift, lengths)


@every_correction
@every_padding
def test_values_enter_linearly(name, lengths):
    """Scaling them scales the output. Weights sum to one, so an offset of all values is one of the output; the ratio of
    rettention grows between refreshes, and so does this sum."""
    (one, plan), steps = method_and_plan(name, lengths), inputs()
    plain = correct(one, steps, plan)
    scaled = correct(one, changed(steps, v=lambda v: -3 * v), plan)
    shifted = correct(one, changed(steps, v=lambda v: v + 2), plan)
    for number, ((out, lse), (other, other_lse), (offset, _)) in enumerate(zip(plain, scaled, shifted, strict=True)):
        assert_equal_rows(other, -3 * out, lengths)
        assert_equal_rows(other_lse, lse, lengths)
        if name != "rettention(window)" or number == 0:
            assert_equal_rows(offset, out + 2, lengths)


@every_correction
@every_padding
def test_keys_of_a_group_are_a_set(name, lengths):
    """Permuting keys with their values within a group, or a pooled term of it, changes nothing."""
    (one, plan), steps = method_and_plan(name, lengths), inputs()
    labels = plan.key_group if plan.tail is None else term_labels(plan, 2, HEADS)
    order = permutation_within(labels, lengths)
    permute = lambda x: torch.take_along_dim(x, order[..., None], 2)
    for actual, expected in zip(
        correct(one, changed(steps, k=permute, v=permute), plan), correct(one, steps, plan), strict=True
    ):
        for x, y in zip(actual, expected, strict=True):
            assert_equal_rows(x, y, lengths)


@every_correction
@every_padding
def test_queries_of_a_group_are_a_set(name, lengths):
    """Permuting queries within a group permutes the output."""
    (one, plan), steps = method_and_plan(name, lengths), inputs()
    order = permutation_within(plan.query_group, lengths)
    permute = lambda x: torch.take_along_dim(x, order[..., None], 2)
    permuted = correct(one, changed(steps, q=permute), plan)
    for (out, lse), (expected, expected_lse) in zip(permuted, correct(one, steps, plan), strict=True):
        assert_equal_rows(out, permute(expected), lengths)
        assert_equal_rows(lse, permute(expected_lse[..., None])[..., 0], lengths)


@every_correction
def test_a_rotation_of_queries_and_keys_changes_nothing(name):
    (one, plan), steps = method_and_plan(name, None), inputs()
    rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=torch.Generator().manual_seed(7)))[0]
    rotated = correct(one, changed(steps, q=lambda q: q @ rotation, k=lambda k: k @ rotation), plan)
    for actual, expected in zip(rotated, correct(one, steps, plan), strict=True):
        for x, y in zip(actual, expected, strict=True):
            assert_equal_rows(x, y, None)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("what", ["offset", "rotation"])
def test_plans_do_not_depend_on_an_offset_or_a_rotation(name, what):
    """Softmax weights do not, and all estimates but those of ``DEPENDS_ON`` are made of them. A few blocks with nearly
    equal scores may differ."""
    one = method(name, density=0.6)
    q, k, v = qkv(GRID.tokens, batch=2, dim=DIM)
    generator = torch.Generator().manual_seed(11)
    if what == "offset":
        others = q, k + torch.randn(2, HEADS, 1, DIM, generator=generator)
    else:
        rotation = torch.linalg.qr(torch.randn(DIM, DIM, generator=generator))[0]
        others = q @ rotation, k @ rotation
    plan, other = (one.plan(*x, v, Site(GRID, BLOCK), {}) for x in ((q, k), others))
    if plan is None:
        return
    tokens = torch.arange(GRID.tokens)
    differs = plan.token_mask(tokens) != other.token_mask(tokens)
    assert differs.double().mean() < DEPENDS_ON.get((name, what), 0.01)


def permutation_within(group: Tensor, lengths: Tensor | None) -> Tensor:
    """Return a random permutation of the tokens of every group, ``[B, H, N]``, that leaves padding in place."""
    group = group.expand(2, HEADS, -1)
    noise = torch.rand(group.shape, generator=torch.Generator().manual_seed(3))
    if lengths is not None:
        padding = (torch.arange(GRID.tokens) >= lengths[:, None])[:, None]
        group = torch.where(padding, group.max() + 1 + torch.arange(GRID.tokens), group)
    by_group = group.argsort(dim=-1, stable=True)
    shuffled = noise.argsort(-1)
    shuffled = shuffled.gather(-1, group.gather(-1, shuffled).argsort(dim=-1, stable=True))
    return torch.empty_like(by_group).scatter_(-1, by_group, shuffled)
