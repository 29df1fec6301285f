"""Grid, blocks, orders, plans, budgets and schedules: their laws."""

from __future__ import annotations

from itertools import product

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from attention_cases import assert_near, grids, random_plan, token_mask
from dit_sparse import Above, Grid, Mass, Plan, Schedule, Site, Top, order
from dit_sparse.budget import check_density
from dit_sparse.grid import Blocks, Span
from dit_sparse.methods import method
from dit_sparse.plan import num_blocks

ORDERS = {
    "row_major": order.row_major,
    "frame_last": order.frame_last,
    "tiles 2x3x2": lambda grid: order.tiles(grid, 2, 3, 2),
    "hilbert": order.hilbert,
    "gilbert": order.gilbert,
}
every_order = pytest.mark.parametrize("cut", ORDERS.values(), ids=ORDERS)


# --- grid


@given(grids())
def test_grid_parses_what_is_written(grid):
    shape = f"{grid.frames}x{grid.height}x{grid.width}"
    assert Grid.parse(f"{grid.before}+{shape}+{grid.after}") == grid
    assert Grid.parse(f" {grid.before} + {shape} + {grid.after}") == grid
    assert Grid.parse(shape) == Grid(grid.frames, grid.height, grid.width)
    assert shape in str(grid)
    assert [f"{n} text" in str(grid) for n in (grid.before, grid.after) if n] == [True] * sum(
        n > 0 for n in (grid.before, grid.after)
    )


@pytest.mark.parametrize("text", ["", "21x45", "21x45x80x2", "axbxc", "1x2x3-4", "0x4x4", "1x2x3+", "1.5x2x3"])
def test_grid_refuses_to_guess(text):
    with pytest.raises(ValueError, match="grid"):
        Grid.parse(text)


@pytest.mark.parametrize("shape", [(0, 1, 1), (1, -1, 1), (1, 1, 1, -1), (1, 1, 1, 0, -1)])
def test_grid_needs_tokens(shape):
    with pytest.raises(ValueError, match="at least 1x1x1"):
        Grid(*shape)


@given(grids())
def test_coordinates_count_the_tokens(grid):
    frame, row, column, text = (axis.tolist() for axis in grid.coordinates())
    places = [(f, r, c) for f in range(grid.frames) for r in range(grid.height) for c in range(grid.width)]
    inside = slice(grid.before, grid.before + grid.video)
    assert list(zip(frame, row, column, strict=True))[inside] == places
    assert text == [True] * grid.before + [False] * grid.video + [True] * grid.after
    assert len(frame) == grid.tokens
    nearest = [places[0]] * grid.before, [places[-1]] * grid.after
    assert (list(zip(frame, row, column, strict=True))[: grid.before], places[-1:] * grid.after) == nearest


@given(grids(), st.sampled_from(["before", "after"]), st.integers(0, 30))
def test_with_text_makes_the_length(grid, side, text):
    fitted = grid.with_text(grid.video + text, side)
    assert fitted.tokens == grid.video + text and getattr(fitted, side) == text
    assert grid.with_text(grid.video - 1, side) is None
    assert (grid.with_text(grid.video + text, None) is None) == (text > 0)


# --- blocks


@given(grids(), st.integers(1, 40), st.sampled_from(list(ORDERS.values())))
def test_blocks_span_their_tokens(grid, block, cut):
    sequence = cut(grid)
    blocks = Blocks.from_grid(grid, block, sequence)
    *axes, text = grid.coordinates()
    members = sequence.split(block)
    assert blocks.text.tolist() == [bool(text[tokens].any()) for tokens in members]
    for span, axis in zip((blocks.frame, blocks.row, blocks.column), axes, strict=True):
        assert span.low.tolist() == [int(axis[tokens].min()) for tokens in members]
        assert span.high.tolist() == [int(axis[tokens].max()) for tokens in members]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 6)), min_size=1, max_size=6))
def test_gap_is_the_smallest_distance(spans):
    span = Span(torch.tensor([low for low, _ in spans]), torch.tensor([low + more for low, more in spans]))
    covered = [range(low, low + more + 1) for low, more in spans]
    assert span.gap().tolist() == [[min(abs(a - b) for a in x for b in y) for y in covered] for x in covered]


# --- orders


@every_order
@given(grid=grids())
def test_orders_are_permutations_that_leave_text_alone(cut, grid):
    sequence = cut(grid)
    assert sequence.sort().values.equal(torch.arange(grid.tokens))
    text = grid.coordinates()[3]
    assert sequence[text].equal(torch.arange(grid.tokens)[text])


@given(grids())
def test_frame_last_puts_the_frames_of_a_place_side_by_side(grid):
    frame, row, column, text = grid.coordinates(order.frame_last(grid))
    video = list(zip(*(axis[~text].tolist() for axis in (row, column, frame)), strict=True))
    assert video == sorted(video)


@given(grids(), st.tuples(*[st.integers(1, 4)] * 3))
def test_tiles_are_boxes(grid, box):
    frame, row, column, text = grid.coordinates(order.tiles(grid, *box))
    boxes = [(f // box[0], r // box[1], c // box[2]) for f, r, c in zip(frame, row, column, strict=True)]
    video = [b for b, is_text in zip(boxes, text, strict=True) if not is_text]
    assert video == sorted(video), "the tokens of a box stand side by side"


@pytest.mark.parametrize("side", [1, 2, 4, 8, 16])
def test_hilbert_moves_one_step_at_a_time(side):
    path = torch.stack(Grid(side, side, side).coordinates(order.hilbert(Grid(side, side, side)))[:3])
    assert (path.diff().abs().sum(0) == 1).all()


@pytest.mark.parametrize("frames", range(1, 8))
def test_gilbert_fills_any_box_without_jumps(frames):
    for height, width in product(range(1, 8), repeat=2):
        grid = Grid(frames, height, width)
        steps = torch.stack(grid.coordinates(order.gilbert(grid))[:3]).diff(dim=1).abs()
        assert (steps <= 1).all() and steps.any(0).all()
        if frames % 2 == height % 2 == width % 2 == 0:
            assert (steps.sum(0) == 1).all()


def test_hilbert_blocks_are_smaller_than_row_major_ones():
    grid = Grid(9, 11, 13, after=7)
    extent = lambda blocks: sum((s.high - s.low + 1).double().mean() for s in (blocks.frame, blocks.row, blocks.column))
    assert extent(Blocks.from_grid(grid, 64, order.hilbert(grid))) < 0.75 * extent(Blocks.from_grid(grid, 64))


# --- plans


@st.composite
def maps(draw):
    """A block map with no empty row, and the ragged length it stands for."""
    block, blocks = draw(st.integers(1, 20)), draw(st.integers(1, 12))
    tokens = block * (blocks - 1) + draw(st.integers(1, block))
    shape = draw(st.sampled_from([(1, 1), (1, 3), (2, 1), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    keep = torch.rand(*shape, blocks, blocks, generator=generator) < draw(st.sampled_from([0.0, 0.3, 0.9, 1.0]))
    one = torch.randint(blocks, (*shape, blocks, 1), generator=generator)
    return keep.scatter(-1, one, True), tokens, block


@given(maps())
def test_plan_is_the_map(case):
    keep, tokens, block = case
    plan = Plan.from_mask(keep, tokens, block)
    assert plan.block_mask().equal(keep)
    assert plan.blocks == keep.shape[-1] == num_blocks(tokens, block)
    assert plan.query_sizes.sum() == tokens
    assert (plan.index.dtype, plan.count.dtype) == (torch.int32, torch.int32)
    assert plan.index.shape[-1] == plan.count.max(), "no wider than the fullest row"
    assert plan.index.min() >= 0 and plan.index.max() < plan.blocks, "spare entries are legal numbers"
    rows = zip(plan.index.flatten(0, -2), plan.count.flatten(), keep.flatten(0, -2), strict=True)
    for index, count, row in rows:
        assert index[: int(count)].tolist() == row.nonzero().flatten().tolist()


@given(maps())
def test_density_counts_token_pairs(case):
    keep, tokens, block = case
    plan = Plan.from_mask(keep, tokens, block)
    counted = token_mask(plan, *keep.shape[:2]).double().mean()
    assert plan.density == pytest.approx(float(counted), abs=1e-12)
    assert Plan.dense(tokens, block).density == 1


def test_plan_refuses_an_empty_row_and_a_wrong_map():
    keep = torch.eye(3, dtype=torch.bool)[None, None]
    assert Plan.from_mask(keep, 33, 16).blocks == 3
    with pytest.raises(ValueError, match="keeps no key block"):
        Plan.from_mask(keep & (torch.arange(3) < 2), 33, 16)
    for tokens, block, shape in [(32, 16, keep), (49, 16, keep), (33, 16, keep[0])]:
        with pytest.raises(ValueError, match="need a mask"):
            Plan.from_mask(shape, tokens, block)


@pytest.mark.parametrize("lead", [(), (1, 1), (1, 3), (2, 1), (2, 3)], ids=str)
def test_arrange_and_restore_undo_each_other(lead):
    orders = torch.rand(*lead, 37).argsort(-1)
    plan = random_plan(37, 8, order=orders)
    for x in (torch.randn(2, 3, 37, 5), torch.randn(2, 3, 37)):
        rearranged = plan.arrange(x)
        assert plan.restore(rearranged).equal(x)
        for b in range(2):
            for h in range(3):
                own = orders if not lead else orders[min(b, lead[0] - 1), min(h, lead[1] - 1)]
                assert rearranged[b, h].equal(x[b, h, own])


def test_plan_without_order_touches_nothing():
    plan, x = random_plan(37, 8), torch.randn(1, 1, 37, 5)
    assert plan.arrange(x) is x and plan.restore(x) is x


def test_padded_notes_the_lengths():
    plan = random_plan(37, 8)
    assert plan.with_lengths(None) is plan
    padded = plan.with_lengths(torch.tensor([30, 37]))
    assert padded.lengths.dtype == torch.int32 and padded.lengths.tolist() == [30, 37]
    assert padded.index is plan.index and padded.to("cpu").lengths.equal(padded.lengths)


@pytest.mark.parametrize("name", ["radial", "random_blocks"])
def test_plan_of_a_long_video_stays_small(name):
    """33 x 45 x 80 tokens: a mask of all pairs would take 14 GB."""
    grid = Grid(33, 45, 80)
    plan = method(name, density=0.1).plan(torch.empty(1, 2, 1), None, Site(grid, 128), {})
    held = [x for x in (plan.index, plan.count, plan.order) if x is not None]
    assert grid.tokens == plan.tokens == 118_800
    assert sum(x.numel() * x.element_size() for x in held) < 20e6
    assert plan.density == pytest.approx(0.1, rel=0.02)


# --- budgets


def scores_with_forced(seed: int, forced: float = 0.2) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randn(2, 3, 7, 11, generator=generator, dtype=torch.float64) * 3
    must = torch.rand(scores.shape, generator=generator) < forced
    return scores.masked_fill(must, torch.inf), must


@given(st.integers(0, 999), st.floats(0.01, 1))
def test_top_keeps_the_best_of_every_row(seed, density):
    scores, must = scores_with_forced(seed)
    keep = Top(density).keep(scores)
    counts, forced = keep.sum(-1), must.sum(-1)
    plain = counts > forced
    assert ((counts - density * 11).abs() <= 0.5)[plain & (counts > 1)].all(), "density of a row, rounded"
    assert (counts >= max(1, round(density * 11 - 1e-9) - 1)).all() and (keep | ~must).all()
    assert len(counts[plain].unique()) <= 1, "exactly as many in every row that is not forced to more"
    worst_kept = scores.masked_fill(~keep, torch.inf).amin(-1)
    assert (scores.masked_fill(keep, -torch.inf).amax(-1) <= worst_kept).all()


@given(st.integers(0, 999), st.floats(0.01, 0.999))
def test_mass_keeps_the_fewest_that_reach_the_share(seed, share):
    scores, must = scores_with_forced(seed)
    keep = Mass(share).keep(scores)
    assert (keep | ~must).all()
    mass = scores.masked_fill(must, -torch.inf).softmax(-1).nan_to_num(0.0)
    free = keep & ~must
    reached = (mass * free).sum(-1)
    least = mass.masked_fill(~free, torch.inf).amin(-1)
    some = (~must).any(-1)
    assert (reached[some] >= share - 1e-12).all()
    assert (reached - least < share + 1e-12)[some].all(), "without the least of them the share is missed"
    assert (mass.masked_fill(keep, 0).amax(-1) <= least)[some].all()


@given(
    st.integers(0, 999), st.sampled_from([0.3, 0.9]), st.sampled_from([(0, 0.04), (0.2, 0.4), (0.11, 0.6), (0.5, 1)])
)
def test_mass_keeps_no_fewer_and_no_more_than_it_may(seed, share, bounds):
    """Row by row: of what is not forced, and weighs something."""
    (scores, must), (least, most) = scores_with_forced(seed), bounds
    scores[..., 3] = torch.where(must[..., 3], torch.inf, -torch.inf)
    keep = Mass(share, min_ratio=least, max_ratio=most).keep(scores)
    for row, forced, kept in zip(scores.flatten(0, 2), must.flatten(0, 2), keep.flatten(0, 2), strict=True):
        free = row.masked_fill(forced, -torch.inf)
        wanted, before = forced.tolist(), 0.0
        for rank, place in enumerate(free.argsort(descending=True).tolist()):
            reached = before >= share or rank >= max(1, round(most * 11))
            if free[place] > -torch.inf and (not reached or rank < least * 11):
                wanted[place] = True
                before += float((free[place] - free.logsumexp(0)).exp())
        assert kept.tolist() == wanted


@given(st.integers(0, 999), st.floats(-8, 8))
def test_above_keeps_what_exceeds_and_the_best(seed, threshold):
    scores, must = scores_with_forced(seed)
    keep = Above(threshold).keep(scores)
    assert (keep | ~must).all() and keep.any(-1).all()
    best = scores == scores.amax(-1, keepdim=True)
    assert keep[scores > threshold].all() and (keep <= ((scores > threshold) | best)).all()


@pytest.mark.parametrize("budget", [Top(0.01), Mass(1e-6), Above(1e9)], ids=repr)
def test_every_row_keeps_a_block(budget):
    scores, _ = scores_with_forced(0, forced=0)
    assert (budget.keep(scores).sum(-1) == 1).all()


@pytest.mark.parametrize("budget", [Top(1.0), Mass(1.0), Above(-1e9)], ids=repr)
def test_everything_may_be_kept(budget):
    assert budget.keep(scores_with_forced(0)[0]).all()


@pytest.mark.parametrize("value", [0, -0.1, 1.01, float("nan"), float("inf")])
def test_budgets_are_fractions(value):
    for refuse in (check_density, Top, Mass):
        with pytest.raises(ValueError, match="must be in"):
            refuse(value)


# --- schedule


@given(st.integers(1, 100), st.data())
def test_fractions_of_the_steps_are_floored(steps, data):
    count = data.draw(st.integers(0, steps))
    assert Schedule(dense_steps=count / steps).first_sparse_step(steps) == count
    assert Schedule(dense_steps=count).first_sparse_step(steps) == count
    assume(count < steps)
    assert Schedule(dense_steps=(count + 0.5) / steps).first_sparse_step(steps) == count


def test_schedule_is_dense_first_and_in_the_first_layers():
    schedule = Schedule(dense_steps=0.3, dense_layers=0.25, replan_interval=2)
    site = lambda step, layer: Site(Grid(1, 1, 1), layer=layer, layers=8, step=step, steps=10)
    dense = [[schedule.is_dense(site(step, layer)) for layer in range(8)] for step in range(10)]
    assert dense == [[step < 3 or layer < 2 for layer in range(8)] for step in range(10)]
    assert [schedule.needs_plan(site(step, 3)) for step in range(3, 10)] == [True, False] * 3 + [True]


@pytest.mark.parametrize("dense_steps", [0, 3, 0.0])
def test_counts_need_no_number_of_steps(dense_steps):
    schedule = Schedule(dense_steps=dense_steps)
    assert [schedule.is_dense(Site(Grid(1, 1, 1), step=step)) for step in (2, 3)] == [dense_steps == 3, False]


def test_fraction_of_unknown_steps_is_an_error():
    with pytest.raises(ValueError, match=r"steps is unknown.*pass steps="):
        Schedule(dense_steps=0.2).is_dense(Site(Grid(1, 1, 1), step=0, steps=None))


@pytest.mark.parametrize(
    "bad", [{"dense_steps": -1}, {"dense_steps": 1.5}, {"dense_layers": -0.1}, {"replan_interval": 0}]
)
def test_schedule_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Schedule(**bad)


def test_comparison_of_numbers_is_no_rubber_stamp():
    """assert_near itself: every other file leans on it."""
    x = torch.tensor([1.0, 2.0, -torch.inf])
    assert_near(x, x, 0)
    assert_near(x + 1e-4, x, 1e-4)
    for wrong in (x * 1.01, x.nan_to_num(neginf=0.0), torch.tensor([1.0, torch.nan, -torch.inf]), x[:2]):
        with pytest.raises(AssertionError):
            assert_near(wrong, x, 1e-3)
