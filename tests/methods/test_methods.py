"""Laws that every method obeys on every grid, and the rules of some against a literal drawing of them."""

from __future__ import annotations

import json
import pickle

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import Pooled, assert_near, cluster_token_mask, grids, make, plan_of, qkv
from dit_sparse import METHODS, Above, ClusterPlan, Grid, Mass, Method, Pattern, Plan, Site, Top, attention, order
from dit_sparse.grid import Blocks
from dit_sparse.method import required_blocks
from dit_sparse.methods import method, name_of
from dit_sparse.methods.radial import Radial
from dit_sparse.methods.window import Window

GRIDS = [Grid(5, 7, 3, after=11), Grid(4, 6, 5, before=3), Grid(9, 8, 10), Grid(1, 9, 7), Grid(2, 16, 16)]
DENSITIES = [0.03, 0.1, 0.17, 0.25, 0.4, 0.55, 0.8, 1.0]
NAMES = [*METHODS, "pooled", "pooled_curve"]
SPARSE = [name for name in NAMES if name != "dense"]

every_method = pytest.mark.parametrize("name", NAMES)
every_sparse_method = pytest.mark.parametrize("name", SPARSE)
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
every_block = pytest.mark.parametrize("block", [16, 32])


def forced(what: Method, grid: Grid, block: int) -> torch.Tensor:
    """What no method may drop, written out: blocks that hold text, as rows and columns, and the block itself."""
    sequence = what.order(grid, block)
    text = grid.coordinates(sequence)[3]
    holds = torch.tensor([bool(part.any()) for part in text.split(block)])
    return holds[:, None] | holds | torch.eye(len(holds), dtype=torch.bool)


def density_of(keep: torch.Tensor, grid: Grid, block: int) -> float:
    return Plan.from_mask(keep[None, None], grid.tokens, block).density


# --- laws


@every_method
@every_grid
@every_block
@pytest.mark.parametrize("density", [0.05, 0.4])
def test_text_and_own_block_are_kept(name, grid, block, density):
    what = make(name, density=density)
    plan = plan_of(what, grid, block)
    assert plan.tokens == grid.tokens and (plan.count >= 1).all()
    if isinstance(plan, ClusterPlan):
        mask, text = cluster_token_mask(plan, 1, 2), grid.coordinates()[3]
        assert mask[..., text, :].all() and mask[..., text].all() and mask.any(-1).all()
        return
    assert plan.block == block
    assert (plan.block_mask() | ~forced(what, grid, block)).all()
    assert required_blocks(Blocks.from_grid(grid, block, what.order(grid, block))).equal(forced(what, grid, block))
    if what.order(grid, block) is not None:
        assert plan.order.equal(what.order(grid, block))


@every_method
@every_grid
@every_block
def test_density_one_is_dense(name, grid, block):
    q, k, v = qkv(grid.tokens, batch=2, dim=16)
    what = make(name, density=1.0)
    assert plan_of(what, grid, block, q, k).block_mask().all()
    out, lse = attention(q, k, v, grid=grid, method=what, block=block, executor="gather")
    assert_near(out, F.scaled_dot_product_attention(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 0.25, -1), 1e-5)


@every_grid
@every_block
@pytest.mark.parametrize("name", [name for name in METHODS if issubclass(METHODS[name], Pattern)])
def test_patterns_meet_the_density_within_one_block_pair(name, grid, block):
    least = density_of(forced(make(name), grid, block), grid, block)
    pair = (min(block, grid.tokens) / grid.tokens) ** 2
    achieved = []
    for density in DENSITIES:
        achieved.append(plan_of(make(name, density=density), grid, block).density)
        if density >= least:
            assert density - pair < achieved[-1] <= density + 1e-9
        else:
            assert achieved[-1] == least, "below it only what is always kept remains"
    assert achieved == sorted(achieved)


@every_grid
@every_block
@pytest.mark.parametrize("name", ["random_blocks", "pooled", "pooled_curve"])
def test_top_meets_the_density_in_every_row(name, grid, block):
    must = forced(make(name, density=0.5), grid, block).sum(-1)
    achieved = []
    for density in DENSITIES:
        plan = plan_of(make(name, density=density), grid, block)
        blocks = max(1, round(density * plan.blocks))
        assert (plan.count == must.clamp(min=blocks)).all()
        achieved.append(plan.count.sum())
    assert achieved == sorted(achieved)


@every_method
@every_grid
def test_same_inputs_same_plan(name, grid):
    first, again = (plan_of(make(name, density=0.3), grid, 16) for _ in range(2))
    assert first.block_mask().equal(again.block_mask()) and first.index.equal(again.index)


@every_sparse_method
def test_other_grid_other_plan(name):
    what = make(name, density=0.3)
    first, other = Grid(4, 8, 6), Grid(6, 4, 8)
    q, k, _ = qkv(first.tokens, dim=8)
    plans = [plan_of(what, grid, 16, q, k) for grid in (first, other)]
    same = plans[0].block_mask().equal(plans[1].block_mask())
    reordered = plans[0].order is not None and not plans[0].order.equal(plans[1].order)
    looks_at_the_grid = isinstance(what, Pattern) or what.order(first, 16) is not None
    looks_at_the_grid &= name != "sink"  # the first third of the keys is the same on any grid
    assert (not same or reordered) == looks_at_the_grid
    assert plan_of(what, Grid(4, 8, 7), 16).tokens == 224
    assert len(plan_of(what, first, 32, q, k).query_sizes[0, 0]) == (15 if name == "svg2" else 6)


@every_method
def test_methods_are_values(name):
    what, same, other = make(name, density=0.3), make(name, density=0.3), make(name, density=0.4)
    assert what == same and hash(what) == hash(same) and what != other
    assert pickle.loads(pickle.dumps(what)) == what
    assert what.settings()["density"] == 0.3
    with pytest.raises(AttributeError):
        what.density = 0.5


@pytest.mark.parametrize("name", METHODS)
def test_settings_travel_as_json(name):
    for what in (method(name, density=0.3), method(name, density=0.7)):
        assert name_of(what) == name
        assert method(name, **json.loads(json.dumps(what.settings()))) == what


def test_settings_of_a_scorer_travel_as_json():
    settings = json.loads(json.dumps(Pooled(budget=Mass(0.9)).settings()))
    budget = {"Mass": {"top_p": 0.9, "min_ratio": 0.0, "max_ratio": 1.0}}
    assert settings == {"density": None, "budget": budget, "curve": False}


def test_a_scorer_takes_a_density_or_a_budget():
    refuses(lambda: Pooled(density=0.5, budget=Mass(0.9)), "not both")


@every_method
@pytest.mark.parametrize("density", [0, -0.5, 1.5, float("nan")])
def test_density_is_a_fraction(name, density):
    refuses(lambda: make(name, density=density), "density must be in")


@every_method
def test_without_a_density_a_method_decides_or_says_why_not(name):
    grid = Grid(3, 5, 4)
    try:
        what = make(name, density=None)
    except ValueError as error:
        assert "density" in str(error)
    else:
        assert plan_of(what, grid, 16).tokens == grid.tokens


@pytest.mark.parametrize("name", METHODS)
def test_unknown_settings_are_named(name):
    refuses(lambda: method(name, wdith=3), f"{name} has no setting 'wdith'")


def test_unknown_method_is_named():
    refuses(lambda: method("radail"), "no method 'radail'; did you mean 'radial'?")


@pytest.mark.parametrize(
    "name, bad",
    [
        ("radial", {"decay": 0.0}),
        ("radial", {"dense_distance": -2}),
        ("radial", {"min_width": -1.0}),
        ("window", {"radius": 0.0}),
        ("window", {"radius": 1.5}),
    ],
    ids=lambda value: str(value),
)
def test_values_out_of_range_are_named(name, bad):
    refuses(lambda: method(name, **bad), next(iter(bad)))


def refuses(call, words: str) -> None:
    """A ValueError of one clear sentence."""
    with pytest.raises(ValueError) as error:
        call()
    message = str(error.value)
    assert words in message and "\n" not in message and 20 < len(message) < 200


# --- radial: the released rule drawn token by token (facts: radial_attn/attn_mask.py)


def drawn(grid: Grid, block: int, decay: float, dense_distance: int, min_width: float, sink: bool) -> torch.Tensor:
    """Every frame pair as an s x s mask, pasted into a canvas of whole blocks, each block rounded, all or-ed."""
    size, blocks = grid.frame, -(-grid.tokens // block)
    power, place = 2 ** size.bit_length(), torch.arange(size)
    apart = (place[:, None] - place).abs()
    result = torch.zeros(blocks, blocks, dtype=torch.bool)
    for i in range(grid.frames):
        for j in range(grid.frames):
            distance = abs(i - j)
            length = power / 2 ** distance.bit_length()
            width = size if distance <= dense_distance else max(decay * length, min_width * block)
            thinned = length < block and distance % int(block / length)
            mask = torch.ones_like(apart, dtype=torch.bool) if sink and j == 0 else (apart <= width) & (not thinned)
            (top, y), (left, x) = divmod(grid.before + i * size, block), divmod(grid.before + j * size, block)
            mask = F.pad(mask, (x, -(x + size) % block, y, -(y + size) % block))
            rows = mask.unflatten(1, (-1, block)).unflatten(0, (-1, block)).sum(1)  # of each column: [Qb, Kb, block]
            high, touched = (3 * rows > block).sum(-1), (rows > 0).sum(-1)
            kept = 5 * high > 3 * touched
            result[top : top + len(kept), left : left + kept.shape[1]] |= kept
    return result


def video_blocks(grid: Grid, block: int, frames: int) -> torch.Tensor:
    """Which blocks hold a token of the first frames."""
    token = torch.arange(grid.tokens)
    inside = (token >= grid.before) & (token < grid.before + frames * grid.frame)
    return torch.tensor([bool(part.any()) for part in inside.split(block)])


RADIAL_GRIDS = [
    *GRIDS,
    Grid(7, 10, 13, after=20),
    Grid(6, 9, 15, before=37),
    Grid(20, 5, 5),
    Grid(12, 8, 16),
    Grid(5, 17, 19, before=5, after=50),
]


@pytest.mark.parametrize("grid", RADIAL_GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
@every_block
@pytest.mark.parametrize("sink", [True, False], ids=["sink", "no_sink"])
@pytest.mark.parametrize("decay, near, floor", [(0.95, 1, 1.0), (0.2, 1, 1.0), (0.8, 0, 0.5), (3.0, -1, 0.0)])
def test_radial_is_the_released_rule(grid, block, sink, decay, near, floor):
    settings = dict(decay=decay, dense_distance=near, min_width=floor, sink=sink)
    expected = drawn(grid, block, **settings)
    if sink:  # every query keeps frame 0, also where rounding a small frame to blocks would lose it
        expected |= video_blocks(grid, block, grid.frames)[:, None] & video_blocks(grid, block, 1)
    assert Radial(**settings).keep(grid, block).equal(expected)


@given(
    grids(most=9, text=40),
    st.sampled_from([8, 16, 24]),
    st.floats(0.01, 20),
    st.integers(-1, 3),
    st.floats(0, 2),
)
def test_radial_is_the_released_rule_anywhere(grid, block, decay, near, floor):
    assert (
        Radial(decay=decay, dense_distance=near, min_width=floor, sink=False)
        .keep(grid, block)
        .equal(drawn(grid, block, decay, near, floor, sink=False))
    )


@pytest.mark.parametrize("grid", [Grid(12, 8, 16), Grid(7, 10, 13, after=20), Grid(5, 17, 19)], ids=str)
def test_sink_needs_no_help_where_frames_fill_blocks(grid):
    block = 32
    rule = dict(decay=0.5, dense_distance=1, min_width=1.0, sink=True)
    ragged = torch.arange(-(-grid.tokens // block)) < grid.tokens // block  # the tail may hold too few rows
    assert Radial(**rule).keep(grid, block)[ragged].equal(drawn(grid, block, **rule)[ragged])


# --- window


@given(grids(), st.sampled_from([8, 16]), st.floats(0.01, 1) | st.sampled_from([0.25, 0.5, 1.0]))
def test_window_is_a_box_around_every_block(grid, block, size):
    """Kept is what the boxes around two blocks allow: never less than the distances of their tokens do."""
    what = Window(radius=size)
    *axes, _ = (part.split(block) for part in grid.coordinates(what.order(grid, block)))
    limits = [size * length for length in (grid.frames, grid.height, grid.width)]
    blocks = range(len(axes[0]))
    boxes, tokens = (torch.zeros(len(blocks), len(blocks), dtype=torch.bool) for _ in range(2))
    for i in blocks:
        for j in blocks:
            apart = [(axis[i][:, None] - axis[j]).abs() for axis in axes]
            tokens[i, j] = torch.stack([a <= limit for a, limit in zip(apart, limits, strict=True)]).all(0).any()
            spans = [[range(int(a[n].min()), int(a[n].max()) + 1) for n in (i, j)] for a in axes]
            least = [max(0, x.start - y.stop + 1, y.start - x.stop + 1) for x, y in spans]
            boxes[i, j] = all(gap <= limit for gap, limit in zip(least, limits, strict=True))
    keep = what.keep(grid, block)
    assert keep.equal(boxes) and (keep | ~tokens).all()


@pytest.mark.parametrize("size", [0.05, 0.125, 0.5, 1.0])
def test_window_is_exact_where_blocks_are_cubes(size):
    grid, block = Grid(8, 8, 8), 64
    what = Window(radius=size)
    places = torch.stack(grid.coordinates(what.order(grid, block))[:3], -1).split(block)
    near = lambda a, b: ((a[:, None] - b).abs() <= size * 8).all(-1).any()
    assert what.keep(grid, block).equal(torch.tensor([[near(a, b) for b in places] for a in places]))


# --- random blocks


def test_random_blocks_differ_by_layer_head_and_seed_only():
    grid = Grid(6, 8, 8)
    keep = lambda layer=0, step=0, seed=0: plan_of(
        make("random_blocks", density=0.3, seed=seed), grid, 16, layer=layer, step=step
    ).block_mask()
    first = keep()
    assert first.shape[:2] == (1, 2) and not first[0, 0].equal(first[0, 1])
    assert first.equal(keep(step=7))
    assert not first.equal(keep(layer=1)) and not first.equal(keep(seed=1))


# --- scorers


@pytest.mark.parametrize("curve", [False, True], ids=["row_major", "curve"])
def test_scorer_treats_every_batch_item_alone(curve):
    grid, what = Grid(5, 7, 3, after=11), Pooled(density=0.6, curve=curve)
    q, k = torch.randn(2, 2, 2, grid.tokens, 8, generator=torch.Generator().manual_seed(0))
    both = plan_of(what, grid, 16, q, k).block_mask()
    alone = [plan_of(what, grid, 16, q[b : b + 1], k[b : b + 1]).block_mask() for b in range(2)]
    assert both.equal(torch.cat(alone)) and not alone[0].equal(alone[1])


@pytest.mark.parametrize("budget", [Top(0.3), Mass(0.7), Above(0.0)], ids=repr)
def test_scorer_keeps_its_budget_of_the_best(budget):
    grid, block = Grid(9, 8, 10), 32
    q, k, _ = qkv(grid.tokens, heads=4, key_heads=2)
    what = Pooled(budget=budget)
    blocks = range(-(-grid.tokens // block))
    mean = lambda x: torch.stack([x[:, :, i * block : (i + 1) * block].mean(2) for i in blocks], 2)
    scores = mean(q) @ mean(k).repeat_interleave(2, 1).mT
    expected = budget.keep(scores.masked_fill(torch.eye(len(blocks), dtype=torch.bool), torch.inf))
    assert plan_of(what, grid, block, q, k).block_mask().equal(expected)


def test_scorer_scores_in_the_order_its_blocks_are_cut_from():
    grid = Grid(4, 8, 8)
    q, k, _ = qkv(grid.tokens)
    sequence = order.hilbert(grid)
    curved = Pooled(density=0.3, curve=True).plan(q, k, Site(grid, 32), {})
    plain = Pooled(density=0.3).plan(q[:, :, sequence], k[:, :, sequence], Site(grid, 32), {})
    assert curved.block_mask().equal(plain.block_mask()) and curved.order.equal(sequence)


def test_density_is_short_for_top():
    grid = Grid(4, 8, 8)
    q, k, _ = qkv(grid.tokens)
    kept = lambda **given: Pooled(**given).plan(q, k, Site(grid, 32), {}).block_mask()
    assert kept(density=0.3).equal(kept(budget=Top(0.3)))
    assert kept().equal(kept(budget=Top(0.25)))
