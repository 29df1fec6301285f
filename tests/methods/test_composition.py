"""Methods made of other methods: unions, names, cached plans, and a method for each head."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import assert_near, plan_of, qkv, token_mask
from dit_sparse import Cached, Grid, Method, PerHead, Plan, Site, attention, enable
from dit_sparse.methods import PARTS, method, name_of
from dit_sparse.methods.corrections.pooled import Pooled
from dit_sparse.methods.corrections.rettention import Rettention
from dit_sparse.methods.patterns.radial import Radial
from dit_sparse.methods.patterns.sink import Sink
from dit_sparse.methods.patterns.window import Window
from tiny_pipelines import ALL

GRID = Grid(5, 7, 3, after=11)  # 116 tokens
BLOCK = 16

# --- unions


@given(st.floats(0.4, 0.9), st.floats(0.5, 2))
def test_a_union_keeps_what_either_pattern_keeps(density, frames):
    first, second = Radial(decay=0.7), Sink(frames=frames)
    masks = [plan_of(pattern, GRID, BLOCK).block_mask() for pattern in (first, second, first | second)]
    assert masks[2].equal(masks[0] | masks[1])
    grid = Grid(9, 8, 10)
    union, sink = plan_of(Radial(density=density) | second, grid, 32), plan_of(second, grid, 32)
    assert (union.block_mask() | ~sink.block_mask()).all()
    pair = (32 / grid.tokens) ** 2
    assert union.density == pytest.approx(max(density, sink.density), abs=pair + 1e-9)


def test_only_patterns_of_one_order_can_be_united():
    with pytest.raises(ValueError, match="only patterns"):
        Radial() | method("svg")
    with pytest.raises(ValueError, match="different token orders"):
        plan_of(Radial() | Window(), GRID, BLOCK)


# --- names and JSON


NAMES = ["radial|sink", "rettention(adaspa)", "pooled(svg2)", "cached(xattention)", "cached(radial|sink)", "pooled"]
NAMES += ["cached(random_blocks)", "pooled(cached(random_blocks))"]


@pytest.mark.parametrize("name", NAMES)
def test_a_composition_has_a_name(name):
    composed = method(name, density=0.4)
    assert composed.density == 0.4 and name_of(composed) == name and method(name_of(composed), density=0.4) == composed
    q, k, v = qkv(GRID.tokens)
    out, lse = attention(q, k, v, grid=GRID, method=name, density=1.0, block=BLOCK, executor="reference")
    assert_near(out, F.scaled_dot_product_attention(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 32**-0.5, -1), 1e-5)


@pytest.mark.parametrize("name", [*PARTS, *NAMES[1:]])
def test_settings_of_a_composition_are_restored_from_json(name):
    settings = dict(methods=(("a", Radial(density=0.3)),), layers=("aa",)) if name == "per_head" else {"density": 0.3}
    settings |= {"inner": method("svg")} if name == "cached" else {}
    composed = method(name, **settings)
    restored = json.loads(json.dumps(composed.settings()))
    assert method(name.split("(")[0], **restored) == composed


@pytest.mark.parametrize(
    "composed, text",
    [
        (Radial() | Sink(frames=2.0), "Union(parts=(Radial(), Sink(frames=2.0)))"),
        (Pooled(density=0.2), "Pooled(density=0.2)"),
        (Pooled(inner=Radial(sink=True)), "Pooled(inner=Radial(sink=True))"),
        (Cached(inner=method("svg2", density=0.2), drift=0.1), "Cached(inner=SVG2(density=0.2), drift=0.1)"),
        (PerHead(methods=(("r", Radial()),), layers=("rr",) * 3), "PerHead(1 methods, 3 layers of 2 heads)"),
    ],
)
def test_repr_of_a_composition_is_short(composed, text):
    assert repr(composed) == text


@pytest.mark.parametrize(
    "name, words",
    [
        ("radial|nope", "no method 'nope'"),
        ("radial(window)", "settings of radial are written NAME=VALUE, got 'window'"),
        ("rettention(pooled)", "would both correct"),
        ("rettention(cached(pooled))", "would both correct"),
        ("window|sink", "different token orders"),
        ("cached", "write cached(METHOD)"),
        ("per_head", "per_head needs methods"),
        ("radial|cached", "write cached(METHOD)"),
    ],
)
def test_impossible_compositions_are_named(name, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        method(name, density=0.3)


@pytest.mark.parametrize(
    "name, settings, words",
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
    ],
)
def test_settings_of_a_wrong_type_are_named(name, settings, words):
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        method(name, **settings)
    assert "\n" not in str(error.value)


# --- cached plans


def test_cached_plans_again_after_the_interval():
    cached, memory = Cached(inner=method("adaspa", search_interval=1, density=0.3), replan_interval=3), {}
    plans = []
    for step in range(2, 9):
        q, k, _ = qkv(GRID.tokens, seed=step)
        plans.append(cached.plan(q, k, k, Site(GRID, BLOCK, step=step), memory))
    assert [later is earlier for earlier, later in pairwise(plans)] == [True, True, False] * 2


def test_cached_plans_again_when_the_queries_drift():
    cached, memory = Cached(inner=method("xattention", stride=4, density=0.3), drift=0.1), {}
    q, k, _ = qkv(GRID.tokens)
    site = Site(GRID, BLOCK)
    first = cached.plan(q, k, k, site, memory)
    assert cached.plan(1.5 * q + 0.01, k, k, site, memory) is first
    assert cached.plan(-q, k, k, site, memory) is first, "the drift of a call takes effect at the next one"
    second = cached.plan(-q, k, k, site, memory)
    assert second is not first
    assert all(cached.plan(-q, k, k, site, memory) is second for _ in range(3))


def test_cached_applies_the_correction_of_the_inner_method():
    q, k, v = qkv(GRID.tokens)
    outs = [
        attention(q, k, v, grid=GRID, method=name, density=0.3, block=BLOCK)[0] for name in ("cached(pooled)", "pooled")
    ]
    assert outs[0].equal(outs[1])


@dataclass(frozen=True, kw_only=True)
class DenseSpy(Method):
    """Plans all pairs and records the steps of its calls."""

    steps: list = field(default_factory=list, compare=False)

    def plan(self, q, k, v, site, memory):
        self.steps.append(site.step)
        return Plan.dense(site.grid.tokens, site.block)


@pytest.mark.parametrize(
    "wrap, expected",
    [
        (lambda spy: Cached(inner=spy, replan_interval=3), [0, 3]),
        (lambda spy: Rettention(inner=spy, refresh_interval=3), [0, 3]),
        (lambda spy: spy, [0, 2, 4]),
    ],
    ids=["cached", "rettention", "schedule"],
)
def test_methods_that_manage_their_plans_ignore_the_schedule(wrap, expected):
    spy, tiny = DenseSpy(), ALL["wan"]()
    with enable(tiny.pipe, wrap(spy), dense_steps=0, min_tokens=0, block=16):
        tiny.pipe(**tiny.kwargs() | {"num_inference_steps": 5})
    assert sorted(set(spy.steps)) == expected


# --- a method for each head


def mixture(**settings) -> PerHead:
    methods = dict(
        r=Radial(density=0.3), x=method("xattention", stride=4, density=0.4), t=method("svg.temporal", density=0.3)
    )
    return PerHead(**({"methods": tuple(methods.items()), "layers": ("rxtx", "tttt")} | settings))


def test_every_head_follows_its_own_method():
    q, k, _ = qkv(GRID.tokens, heads=4, key_heads=2)
    site = Site(GRID, BLOCK, layer=0, layers=2)
    mask = token_mask(mixture().plan(q, k, k, site, {}), 1, 4)
    for head, letter in enumerate("rxtx"):
        alone = dict(mixture().methods)[letter].plan(q, k, k, site, {})
        assert mask[0, head].equal(token_mask(alone, 1, 4)[0, head])
    temporal = mixture().plan(q, k, k, Site(GRID, BLOCK, layer=1, layers=2), {})
    assert temporal.order is not None and token_mask(temporal, 1, 4)[0, 0].equal(mask[0, 2])


def test_every_batch_item_follows_its_own_orders():
    """Sparse VideoGen has one block mask for all, and an order for each item and head."""
    mixed = PerHead(methods=(("s", method("svg", density=0.3)), ("r", Radial(density=0.3))), layers=("srs",))
    q, k, v = qkv(GRID.tokens, batch=3, heads=3)
    batch, _ = attention(q, k, v, grid=GRID, method=mixed, block=BLOCK)
    for b in range(3):
        item = slice(b, b + 1)
        alone, _ = attention(q[item], k[item], v[item], grid=GRID, method=mixed, block=BLOCK)
        assert_near(batch[item], alone, 1e-6)


def test_methods_of_heads_keep_their_own_intervals():
    spy, slow = DenseSpy(), Rettention(inner=DenseSpy(), refresh_interval=3)
    mixed, tiny = PerHead(methods=(("a", spy), ("p", slow)), layers=("ap",) * 2), ALL["wan"]()
    assert mixed.manages_own_plans
    with enable(tiny.pipe, mixed, dense_steps=0, min_tokens=0, block=16):
        tiny.pipe(**tiny.kwargs() | {"num_inference_steps": 5})
    assert sorted(set(spy.steps)) == [0, 2, 4] and sorted(set(slow.inner.steps)) == [0, 3]


def test_corrections_apply_to_their_own_heads():
    methods = (("s", method("vdit.skip")), ("p", Pooled(inner=Radial(density=0.3))), ("r", Radial(density=0.3)))
    mixed = PerHead(methods=methods, layers=("srp",))
    q, k, v = qkv(GRID.tokens, heads=3)
    out, lse = attention(q, k, v, grid=GRID, method=mixed, block=BLOCK)
    radial, _ = attention(q, k, v, grid=GRID, method=Radial(density=0.3), block=BLOCK)
    pooled, pooled_lse = attention(q, k, v, grid=GRID, method=methods[1][1], block=BLOCK)
    assert (out[:, 0] == 0).all() and mixed.needs_lse
    assert_near(out[:, 1], radial[:, 1], 1e-6)
    assert_near(out[:, 2], pooled[:, 2], 1e-6)
    assert_near(lse[:, 2], pooled_lse[:, 2], 1e-6)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"layers": ("rq",)}, r"unknown letters \['q'\]"),
        ({"methods": (("r", Radial()), ("r", Window()))}, "a letter of its own"),
        ({"methods": (("rx", Radial()),), "layers": ()}, "a letter of its own"),
        ({"density": 0.3}, "takes no density"),
    ],
)
def test_impossible_mixtures_are_named(settings, words):
    with pytest.raises(ValueError, match=words):
        mixture(**settings)


@pytest.mark.parametrize(
    "layers, words",
    [
        (("rr",) * 3, "made for 3 layers of self-attention, but the model has 2"),
        (("rrr",) * 2, "made for 3 heads per layer, but the model has 2"),
    ],
)
def test_a_mixture_fits_one_model(layers, words):
    tiny = ALL["wan"]()
    with pytest.raises(ValueError, match=words):
        enable(tiny.pipe, mixture(layers=layers))
    assert not any(hasattr(m, "_sparse") for m in tiny.pipe.transformer.modules())
