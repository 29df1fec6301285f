"""Methods made of methods, and methods that correct what was computed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    assert_near,
    cluster_token_mask,
    exact,
    plan_of,
    qkv,
    random_cluster_plan,
    random_plan,
    token_mask,
)
from dit_sparse import Cached, ClusterPlan, Grid, Method, PerHead, Plan, Site, attention, enable
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import METHODS, PARTS, method, name_of
from dit_sparse.methods.pooled import Pooled
from dit_sparse.methods.radial import Radial
from dit_sparse.methods.rettention import Rettention
from dit_sparse.methods.sink import Sink
from dit_sparse.methods.vdit import VDiT, Vertical
from dit_sparse.methods.window import Window
from dit_sparse.scoring import merge_attention
from tiny_pipelines import ALL

GRID = Grid(5, 7, 3, after=11)  # 116 tokens
BLOCK = 16


def dense(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=q.shape[1] != k.shape[1])


# --- plans, head by head


def test_by_head_takes_each_head_from_its_plan():
    order = torch.randperm(116, generator=torch.Generator().manual_seed(0))
    plans = [random_plan(116, BLOCK, density=d, seed=i, order=o, heads=h) for i, (d, o, h) in enumerate(
        [(0.2, None, 1), (0.7, order, 1), (0.4, None, 3)]
    )]  # fmt: skip
    choice = torch.tensor([[0, 1, 2], [2, 2, 1]])
    masks = [token_mask(plan, 2, 3) for plan in plans]
    mixed = token_mask(Plan.by_head(plans, choice), 2, 3)
    for b in range(2):
        for h in range(3):
            assert mixed[b, h].equal(masks[choice[b, h]][b, h])


@pytest.mark.parametrize("plan", [random_plan(116, BLOCK, heads=2), random_cluster_plan(116, heads=2)], ids=["b", "c"])
def test_whole_keeps_everything(plan):
    assert plan.full().block_mask().all() and plan.full().density == pytest.approx(1)
    q, k, v = qkv(116, batch=2)
    for lengths in (None, torch.tensor([116, 116])):
        assert_near(reference.attend(q, k, v, plan.full().with_lengths(lengths))[0], dense(q, k, v), 1e-5)


def test_kept_by_is_the_token_mask():
    for plan, mask in (
        (random_plan(116, BLOCK, heads=2), token_mask),
        (random_cluster_plan(116, heads=2), cluster_token_mask),
    ):
        rows = torch.tensor([0, 7, 115, 7])
        assert plan.token_mask(rows).expand(1, 2, -1, -1).equal(mask(plan, 1, 2)[:, :, rows])


# --- union


@given(st.floats(0.4, 0.9), st.floats(0.5, 2))
def test_a_union_keeps_what_either_keeps(density, frames):
    first, second = Radial(density=density), Sink(frames=frames)
    both = plan_of(Radial(decay=0.7) | second, GRID, BLOCK).block_mask()
    assert both.equal(plan_of(Radial(decay=0.7), GRID, BLOCK).block_mask() | plan_of(second, GRID, BLOCK).block_mask())
    sunk, grid = plan_of(second, Grid(9, 8, 10), 32), Grid(9, 8, 10)
    united = plan_of(first | second, grid, 32)
    assert (united.block_mask() | ~sunk.block_mask()).all()
    pair = (32 / grid.tokens) ** 2
    assert united.density == pytest.approx(max(density, sunk.density), abs=pair + 1e-9)


def test_a_union_refuses_what_it_cannot_unite():
    with pytest.raises(ValueError, match="only patterns"):
        Radial() | method("svg")
    with pytest.raises(ValueError, match="different token orders"):
        plan_of(Radial() | Window(), GRID, BLOCK)


# --- names and JSON


NAMES = ["radial|sink", "rettention(adaspa)", "pooled(svg2)", "cached(xattention)", "cached(radial|sink)", "pooled"]


@pytest.mark.parametrize("name", NAMES)
def test_a_composition_has_a_name_that_makes_it(name):
    what = method(name, density=0.4)
    assert what.density == 0.4 and name_of(what) == name and method(name_of(what), density=0.4) == what
    q, k, v = qkv(GRID.tokens)
    out, lse = attention(q, k, v, grid=GRID, method=name, density=1.0, block=BLOCK, executor="reference")
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 32**-0.5, -1), 1e-5)


@pytest.mark.parametrize("name", [*PARTS, *NAMES[1:]])
def test_settings_of_a_composition_travel_as_json(name):
    given = dict(methods=(("a", Radial(density=0.3)),), layers=("aa",)) if name == "per_head" else {"density": 0.3}
    given |= {"inner": method("svg")} if name == "cached" else {}
    what = method(name, **given)
    settings = json.loads(json.dumps(what.settings()))
    assert method(name.split("(")[0], **settings) == what


def test_wrong_compositions_are_named():
    for name, words in (
        ("radial|nope", "no method 'nope'"),
        ("radial(window)", "settings of radial are written NAME=VALUE, got 'window'"),
        ("rettention(pooled)", "would both correct"),
        ("rettention(cached(pooled))", "would both correct"),
        ("window|sink", "different token orders"),
        ("cached", "write cached(METHOD)"),
        ("per_head", "per_head needs methods"),
        ("radial|cached", "write cached(METHOD)"),
    ):
        with pytest.raises(ValueError, match=re.escape(words)):
            method(name, density=0.3)


@pytest.mark.parametrize(
    "name, given, words",
    [
        ("radial", {"static": True}, "radial has no setting 'static'"),
        ("radial", {"density": "x"}, "density of radial must be a number or none, got 'x'"),
        ("pooled", {"inner": {"Foo": {}}}, "neither a method nor a budget"),
        ("pooled", {"inner": {"Radial": 3}}, "neither a method nor a budget"),
        ("pooled", {"inner": {}}, "neither a method nor a budget"),
        ("pooled", {"inner": 3}, "inner of pooled must be a method, got 3"),
        ("sol", {"budget": 3}, "budget of sol must be a budget such as top(0.2) or none, got 3"),
        ("per_head", {"methods": [["a", 3]], "layers": ["a"]}, "methods of per_head must be a tuple"),
        ("per_head", {"methods": [["a", {"SVG2": {}}]], "layers": ["a"]}, "SVG2 makes clusters"),
        ("per_head", {"methods": [], "layers": []}, "at least one layer"),
        ("sink", {"frames": float("nan")}, "greater than 0"),
        ("sparsed", {"queries_per_block": -1}, "queries_per_block must be at least 1"),
        ("vdit.vertical", {"samples": 0}, "at least 1"),
    ],
)
def test_wrong_settings_are_one_sentence(name, given, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        method(name, **given)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["adaspa", "sparsed"])
def test_rows_that_do_not_divide_the_block_are_refused_at_the_beginning(name):
    q, _, _ = qkv(GRID.tokens)
    with pytest.raises(ValueError, match="queries_per_block must divide the block of 16, got 5"):
        method(name, queries_per_block=5).begin_generation(q, Site(GRID, BLOCK))


# --- plans kept over steps


def test_cached_plans_anew_after_so_many_steps():
    what, memory = Cached(inner=method("adaspa", search_interval=1, density=0.3), replan_interval=3), {}
    plans = []
    for step in range(2, 9):
        q, k, _ = qkv(GRID.tokens, seed=step)
        plans.append(what.plan(q, k, Site(GRID, BLOCK, step=step), memory))
    assert [plan is plans[max(0, i - 1)] for i, plan in enumerate(plans)] == [
        True,
        True,
        True,
        False,
        True,
        True,
        False,
    ]


def test_cached_plans_anew_when_the_queries_drift():
    what, memory = Cached(inner=method("xattention", stride=4, density=0.3), drift=0.1), {}
    q, k, _ = qkv(GRID.tokens)
    site = Site(GRID, BLOCK)
    first = what.plan(q, k, site, memory)
    assert what.plan(1.5 * q + 0.01, k, site, memory) is first
    other = what.plan(-q, k, site, memory)
    assert other is not first and what.plan(-q, k, site, memory) is other


def test_cached_lets_the_inner_method_correct():
    q, k, v = qkv(GRID.tokens)
    got, plain = (
        attention(q, k, v, grid=GRID, method=name, density=0.3, block=BLOCK)[0] for name in ("cached(pooled)", "pooled")
    )
    assert got.equal(plain)


# --- a method for every head


def mixture(**given) -> PerHead:
    made = dict(
        r=Radial(density=0.3), x=method("xattention", stride=4, density=0.4), t=method("svg.temporal", density=0.3)
    )
    return PerHead(**({"methods": tuple(made.items()), "layers": ("rxtx", "tttt")} | given))


def test_every_head_follows_its_own_method():
    q, k, _ = qkv(GRID.tokens, heads=4, key_heads=2)
    site = Site(GRID, BLOCK, layer=0, layers=2)
    mixed = token_mask(mixture().plan(q, k, site, {}), 1, 4)
    for head, letter in enumerate("rxtx"):
        alone = dict(mixture().methods)[letter].plan(q, k, site, {})
        assert mixed[0, head].equal(token_mask(alone, 1, 4)[0, head])
    temporal = mixture().plan(q, k, Site(GRID, BLOCK, layer=1, layers=2), {})
    assert temporal.order is not None and token_mask(temporal, 1, 4)[0, 0].equal(mixed[0, 2])


def test_every_item_of_a_batch_follows_its_own_orders():
    """Sparse VideoGen has one list of blocks for all, and an order for every item and head."""
    what = PerHead(methods=(("s", method("svg", density=0.3)), ("r", Radial(density=0.3))), layers=("srs",))
    q, k, v = qkv(GRID.tokens, batch=3, heads=3)
    both, _ = attention(q, k, v, grid=GRID, method=what, block=BLOCK)
    for b in range(3):
        one = slice(b, b + 1)
        assert_near(both[one], attention(q[one], k[one], v[one], grid=GRID, method=what, block=BLOCK)[0], 1e-6)


def test_heads_keep_their_pace_in_a_mixture():
    asked, paced = Asked(), Rettention(inner=Asked(), refresh_interval=3)
    what = PerHead(methods=(("a", asked), ("p", paced)), layers=("ap",) * 2)
    with enable(ALL["wan"]().pipe, what, dense_steps=0, min_tokens=0, block=16) as run:
        assert what.manages_own_plans and run
    tiny = ALL["wan"]()
    with enable(tiny.pipe, what, dense_steps=0, min_tokens=0, block=16):
        tiny.pipe(**tiny.kwargs() | {"num_inference_steps": 5})
    assert sorted(set(asked.steps)) == [0, 2, 4] and sorted(set(paced.inner.steps)) == [0, 3]


def test_only_its_own_heads_are_corrected():
    methods = (("s", method("vdit.skip")), ("p", Pooled(inner=Radial(density=0.3))), ("r", Radial(density=0.3)))
    what = PerHead(methods=methods, layers=("srp",))
    q, k, v = qkv(GRID.tokens, heads=3)
    out, lse = attention(q, k, v, grid=GRID, method=what, block=BLOCK)
    plain, _ = attention(q, k, v, grid=GRID, method=Radial(density=0.3), block=BLOCK)
    pooled, pooled_lse = attention(q, k, v, grid=GRID, method=methods[1][1], block=BLOCK)
    assert (out[:, 0] == 0).all() and what.needs_lse
    assert_near(out[:, 1], plain[:, 1], 1e-6)
    assert_near(out[:, 2], pooled[:, 2], 1e-6)
    assert_near(lse[:, 2], pooled_lse[:, 2], 1e-6)


@pytest.mark.parametrize(
    "given, words",
    [
        ({"layers": ("rq",)}, r"unknown letters \['q'\]"),
        ({"methods": (("r", Radial()), ("r", Window()))}, "needs a letter of its own"),
        ({"methods": (("rx", Radial()),), "layers": ()}, "needs a letter of its own"),
        ({"density": 0.3}, "takes no density"),
    ],
)
def test_wrong_mixtures_are_named(given, words):
    with pytest.raises(ValueError, match=words):
        mixture(**given)


def test_a_mixture_knows_which_model_it_is_for():
    tiny = ALL["wan"]()
    for layers, words in ((("rr",) * 3, "made for 3 layers of self-attention, but the model has 2"),
                          (("rrr",) * 2, "made for 3 heads per layer, but the model has 2")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            enable(tiny.pipe, mixture(layers=layers))
        assert not any(hasattr(m, "_sparse") for m in tiny.pipe.transformer.modules())


# --- Re-ttention


def steps_of(what: Rettention, inputs, grid=GRID):
    """Outputs of several steps with one memory, and what the plan alone gives."""
    memory, outs = {}, []
    for step, (q, k, v) in inputs:
        site = Site(grid, BLOCK, step=step)
        plan = what.plan(q, k, site, memory)
        dense_again = partial(reference.attend, q, k, v, plan.full())
        done = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), dense_again)
        outs.append((done, what.correct(done, site, memory)))
    return outs


@pytest.mark.parametrize("inner", ["window", "svg2", "adaspa"])
@pytest.mark.parametrize("offload", [False, True])
def test_rettention_is_dense_while_nothing_changes(inner, offload):
    q, k, v = qkv(GRID.tokens, batch=2)
    what = Rettention(inner=method(inner, density=0.2), ramp=0.0, offload=offload)
    for _, (out, lse) in steps_of(what, [(step, (q, k, v)) for step in (3, 4, 5)]):
        assert_near(out, dense(q, k, v), 1e-5)
        assert_near(lse, torch.logsumexp(q @ k.mT * 32**-0.5, -1), 1e-5)


def test_rettention_between_refreshes_is_the_formula():
    what, first, other = (
        Rettention(density=0.2, refresh_interval=4, ramp=0.3),
        qkv(GRID.tokens),
        qkv(GRID.tokens, seed=1),
    )
    outs = steps_of(what, [(3, first), (4, other), (5, other), (6, other), (7, other)])
    (at_refresh, _), *later, (_, (last, _)) = outs
    full, full_lse = reference.attend(*first, at_refresh.plan.full())
    ratio = (at_refresh.lse - full_lse).exp()[..., None]
    residual = full - ratio * at_refresh.out
    for number, (done, (out, _)) in enumerate(later):
        assert_near(out, (ratio + 0.3 * number).clamp(max=1) * done.out + residual, 1e-5)
    assert_near(last, dense(*other), 1e-5)  # step 7 refreshes


def test_rettention_says_what_it_keeps_and_refuses_what_does_not_fit(monkeypatch, caplog):
    from dit_sparse.methods import rettention

    q, _, _ = qkv(GRID.tokens)
    need = 4 * 2 * 116 * (32 * 4 + 4)
    with caplog.at_level("INFO", "dit_sparse"):
        Rettention().begin_generation(q, Site(GRID, layers=4))
    assert "4 layers" in caplog.text
    monkeypatch.setattr(rettention, "_free_bytes", lambda device: need)
    Rettention().begin_generation(q, Site(GRID, layers=4))
    monkeypatch.setattr(rettention, "_free_bytes", lambda device: need - 1)
    with pytest.raises(RuntimeError, match="offload=True"):
        Rettention().begin_generation(q, Site(GRID, layers=4))
    monkeypatch.setattr(rettention, "_free_bytes", lambda device: 2 * need - 1)
    assert Rettention().begin_generation(q, Site(GRID, layers=4)) == need
    with pytest.raises(RuntimeError, match="for other branches"):
        Rettention().begin_generation(q, Site(GRID, layers=4), reserved_bytes=need)


def test_rettention_refuses_before_the_dense_steps(monkeypatch):
    from dit_sparse.methods import rettention

    monkeypatch.setattr(rettention, "_free_bytes", lambda device: 0)
    tiny, calls = ALL["wan"](), []
    with enable(tiny.pipe, "rettention", density=0.3, dense_steps=1, min_tokens=0, block=16):
        tiny.pipe.transformer.blocks[0].register_forward_hook(lambda *_: calls.append(1))
        with pytest.raises(RuntimeError, match="are free"):
            tiny.pipe(**tiny.kwargs())
    assert not calls


def test_a_run_counts_the_dense_refreshes():
    tiny = ALL["wan"]()
    with enable(
        tiny.pipe, "rettention", density=0.3, dense_steps=0, min_tokens=0, block=16, refresh_interval=100
    ) as run:
        tiny.pipe(**tiny.kwargs())
        once = run.report().density_achieved
    with enable(tiny.pipe, "window", density=0.3, dense_steps=0, min_tokens=0, block=16) as run:
        tiny.pipe(**tiny.kwargs())
        plain, calls = run.report().density_achieved, run.report().sparse_calls
    steps = calls / (2 * tiny.calls)
    assert once == pytest.approx(plain + 1 / steps)


@dataclass(frozen=True, kw_only=True)
class Asked(Method):
    """Plans everything, and notes when."""

    steps: list = field(default_factory=list, compare=False)

    def plan(self, q, k, site, memory):
        self.steps.append(site.step)
        return Plan.dense(site.grid.tokens, site.block)


@pytest.mark.parametrize("around, expected", [(Cached, [0, 3]), (Rettention, [0, 3]), (None, [0, 2, 4])])
def test_methods_with_a_pace_of_their_own_are_asked_at_every_step(around, expected):
    """Three steps from one plan to the next, which the schedule's two do not divide."""
    asked, tiny = Asked(), ALL["wan"]()
    what = asked if around is None else around(inner=asked, every=3)
    seen = asked.steps if around is None else what.inner.steps
    with enable(tiny.pipe, what, dense_steps=0, min_tokens=0, block=16):
        tiny.pipe(**tiny.kwargs() | {"num_inference_steps": 5})
    assert sorted(set(seen)) == expected


def test_a_correction_needs_an_executor_with_a_log_sum_exp(monkeypatch):
    from dit_sparse.kernels.executors import flex

    monkeypatch.setattr(flex, "LSE", False)  # as on a CPU
    q, k, v = qkv(GRID.tokens)
    with pytest.raises(RuntimeError, match="log-sum-exp"):
        attention(q, k, v, grid=GRID, method="pooled", executor="flex", block=BLOCK)


# --- pooled tails


@given(st.integers(0, 1000), st.floats(0.0, 1.0))
def test_two_sets_of_keys_merge_to_all_of_them(seed, share):
    q, k, v = qkv(40, seed=seed)
    mask = torch.rand(1, 2, 40, 40, generator=torch.Generator().manual_seed(seed)) < share
    out, lse = merge_attention(*exact(q, k, v, mask), *exact(q, k, v, ~mask))
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 32**-0.5, -1), 1e-5)


def tail_by_hand(q, k, v, mask, group, lengths, variance):
    """Query by query, group by group: kept keys as they are, every dropped group as one key."""
    batch, heads, tokens, dim = q.shape
    out = torch.zeros_like(q, dtype=torch.float64)
    q, k, v = q.double(), k.double(), v.double()
    for b, h, n in torch.cartesian_prod(torch.arange(batch), torch.arange(heads), torch.arange(tokens)).tolist():
        logits, values = [], []
        for g in group[b, h].unique():
            members = [m for m in (group[b, h] == g).nonzero().flatten().tolist() if m < lengths[b]]
            if not members:
                continue
            each = k[b, h, members] @ q[b, h, n] * dim**-0.5
            if mask[b, h, n, members[0]]:
                logits += each.tolist()
                values += list(v[b, h, members])
            else:
                spread = k[b, h, members].var(0, unbiased=False) @ q[b, h, n].square() / (2 * dim) if variance else 0.0
                logits.append(float(each.mean() + torch.tensor(float(len(members))).log() + spread))
                values.append(v[b, h, members].mean(0))
        out[b, h, n] = torch.tensor(logits, dtype=torch.float64).softmax(-1) @ torch.stack(values)
    return out


@pytest.mark.parametrize("kind", ["blocks", "clusters"])
@pytest.mark.parametrize("variance", [True, False])
def test_pooled_sees_dropped_groups_as_one_key(kind, variance):
    q, k, v = qkv(50, batch=2, dim=8)
    lengths = [50, 41]
    make, mask = random_cluster_plan, cluster_token_mask
    if kind == "blocks":
        make, mask = partial(random_plan, block=8), token_mask
    plan = make(50, batch=2, heads=2, lengths=lengths)
    done = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), lambda: None)
    out, _ = Pooled(variance=variance).correct(done, Site(Grid(1, 5, 10), 8), {})
    group = plan.key_group.expand(2, 2, -1)
    assert_near(out, tail_by_hand(q, k, v, mask(plan, 2, 2), group, lengths, variance), 1e-5)
    assert isinstance(plan, ClusterPlan if kind == "clusters" else Plan)


def test_pooled_is_dense_where_keys_of_a_group_are_equal():
    q, k, v = qkv(96)
    k = k.unflatten(2, (-1, 16)).mean(3).repeat_interleave(16, 2)
    out, lse = attention(q, k, v, grid=Grid(4, 4, 6), method="pooled", density=0.2, block=16)
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 32**-0.5, -1), 1e-5)


def test_sol_is_pooled_by_block_means_of_queries():
    """Where all queries of a block are equal, the two tails are one."""
    q, k, v = qkv(90)
    q = F.pad(q, (0, 0, 0, 6)).unflatten(2, (-1, 16))[:, :, :, :1].expand(-1, -1, -1, 16, -1).flatten(2, 3)[:, :, :90]
    sol, site = method("sol", density=0.5), Site(Grid(3, 5, 6), 16)
    for lengths in (None, torch.tensor([85])):
        plan = sol.plan(q, k, site, {}).with_lengths(lengths)
        done = AttentionOutput(q, k, v, plan, None, *reference.attend(q, k, v, plan), lambda: None)
        for got, expected in zip(
            sol.correct(done, site, {}), Pooled(variance=False).correct(done, site, {}), strict=True
        ):
            assert_near(got, expected, 1e-5)


def test_sol_keeps_what_stands_out():
    q, k, _ = qkv(96 * 4)
    keep = plan_of(method("sol"), Grid(4, 8, 12), 16, q, k).block_mask()
    mean = lambda x: x.double().unflatten(2, (-1, 16)).mean(3)
    queries, keys = mean(q), mean(k)
    keys = keys - keys.mean(2, keepdim=True)
    deviation = torch.einsum("bhqd,bhd->bhq", queries**2, (keys**2).mean(2)).sqrt()[..., None]
    place = torch.arange(24)
    expected = (queries @ keys.mT > 1.3 * deviation) | ((place[:, None] - place).abs() <= 1)
    assert keep.equal(expected) and not keep.all()


# --- the shapes of Sparse-vDiT


def test_vdit_finds_the_shape_of_every_head_and_stays_with_it():
    """One head looks at its own frame, one at its own place, one at three columns of blocks."""
    grid = Grid(8, 8, 8)
    frame, row, column, _ = grid.coordinates()
    frames, places = F.one_hot(frame, 64).float(), F.one_hot(row * 8 + column, 64).float()
    asked = torch.zeros(512, 64).index_fill(1, torch.tensor([0]), 1.0)
    stripe = torch.zeros(512, 64)
    stripe[64:80], stripe[256:272] = asked[:16], asked[:16]
    q, k = torch.stack([frames, places, asked])[None] * 40, torch.stack([frames, places, stripe])[None]
    memory, what = {}, VDiT(density=0.25)
    plan = what.plan(q, k, Site(grid, 16), memory)
    mask = token_mask(plan, 1, 3)[0]
    assert mask[0][frame[:, None] == frame].all()
    same = (row * 8 + column)[:, None] == row * 8 + column
    assert mask[1][same].all() and not mask[0][same].all()
    assert mask[2][:, 64:80].all() and mask[2][:, 256:272].all()
    assert what.plan(k, q, Site(grid, 16, step=5), memory) is plan


def test_vertical_keeps_the_same_columns_for_all():
    q, k, _ = qkv(512, batch=2)
    keep = plan_of(Vertical(density=0.25), Grid(8, 8, 8), 16, q, k).block_mask()
    own = torch.eye(32, dtype=torch.bool)
    columns = (keep & ~own).sum(-2)
    assert ((columns == 31).sum(-1) == 7).all() and (keep.sum(-1) == 8).all()  # and its own block, or one more


def test_every_method_has_a_name_that_makes_it():
    for name in METHODS:
        assert name_of(method(name, density=0.3)) == name
