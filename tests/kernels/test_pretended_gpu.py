"""The way to the kernels on a GPU, without one: devices, types, launches, and that nobody waits for a number."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from dit_sparse import METHODS, ClusterPlan, Grid, Site
from dit_sparse import plan as plan_file
from dit_sparse.composition import PerHead
from dit_sparse.engine import padding, tracking
from dit_sparse.engine.plans import Plans
from dit_sparse.engine.report import RunCounters
from dit_sparse.eval.bench import attention as bench
from dit_sparse.eval.bench import transformer as bench_transformer
from dit_sparse.kernels import pick
from dit_sparse.kernels.calibration import Cost
from dit_sparse.kernels.executors import block_ragged, block_sparse
from dit_sparse.kernels.permute import permuted
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import method
from pretended_gpu import pretended_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU, and it is tested itself")

HEADS = ("radial", "svg", "adaspa", "pooled(sparge)")
METHODS_HERE = {
    name: method(name, density=0.25)
    for name in [*METHODS, "radial|sink", "rettention(adaspa)", "cached(svg2)", "pooled(subblock)"]
    if name != "dense"
}
METHODS_HERE["a method a head"] = PerHead(
    methods=tuple((letter, method(name, density=0.25)) for letter, name in zip("rsap", HEADS, strict=True)),
    layers=("rsap",) * 4,
)


LAUNCHES = {
    "svg2": {"assign", "means", "select", "permute"},
    "pbs": {"select", "permute"},
    **{key: {"mass", "select"} for key in ("adaspa", "sparsed", "rettention(adaspa)")},
    "a method a head": {"mass", "select", "permute"},
    **{key: {"permute"} for key in ("window", "neighborhood", "svg")},
    **{key: {"select"} for key in ("asa", "sparge", "subblock", "xattention", "vdit", "sol", "pooled(subblock)")},
}
PATTERNS = ("window", "neighborhood", "radial", "sink", "radial|sink")
MADE_ON_THE_CPU = (*PATTERNS, "random_blocks", "svg", "pooled", "rettention")


def on_gpu(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize("both", [False, True], ids=["", "both branches in one batch"])
@pytest.mark.parametrize("grid", [Grid(5, 16, 16), Grid(5, 16, 16, after=30)], ids=str)
@pytest.mark.parametrize("name", METHODS_HERE)
def test_every_method_plans_and_attends_without_waiting(name, grid, both, monkeypatch):
    plans = Plans(METHODS_HERE[name])
    with pretended_gpu(monkeypatch) as launched:
        q, k, v = (on_gpu(2, 4, grid.tokens, 64) for _ in range(3))
        for step in (3, 4):
            site = Site(grid, 64, layer=1, layers=4, step=step, steps=10, both=both)
            plan = plans.plan(q, k, site)
            attend = (block_ragged if isinstance(plan, ClusterPlan) else block_sparse).attend
            dense = lambda plan=plan, attend=attend: attend(q, k, v, plan.full())
            done = AttentionOutput(q, k, v, plan, None, *attend(q, k, v, plan), dense)
            out, lse = plans.method.correct(done, site, plans.memory(q, site))
        assert out.is_cuda and out.shape == q.shape and out.dtype == q.dtype
        assert lse is None or (lse.is_cuda and lse.shape == q.shape[:3] and lse.dtype == torch.float32)
    assert launched["forward"] >= 2
    assert LAUNCHES.get(name, set()) <= set(launched), "a method has a program for what it asks"
    assert launched["_assert_async"] or name in MADE_ON_THE_CPU, "whether every row keeps something is looked at"


def shorten_lists_of_a_gpu(monkeypatch) -> None:
    true_width = plan_file.list_width
    third = lambda count, columns: columns // 3 if count.is_cuda else true_width(count, columns)
    monkeypatch.setattr(plan_file, "width_of", third)


def test_long_lists_are_shortened(monkeypatch):
    """At 720p with 40 heads nobody keeps 56 MB a layer; with 12 heads nobody waits."""
    grid = Grid(21, 45, 80)
    adaptive = [METHODS_HERE[name] for name in ("asa", "adaspa", "svg2")]

    def plan_of(one, heads):
        q = on_gpu(1, heads, grid.tokens, 128)
        return one.plan(q, q, Site(grid, 128, step=3, steps=10), {})

    with pretended_gpu(monkeypatch):
        for one in adaptive:
            lists = plan_of(one, 12)
            assert lists.index.shape[-1] == lists.key_sizes.shape[-1]
            with pytest.raises(DataDependentOutputException):
                plan_of(one, 40)
    shorten_lists_of_a_gpu(monkeypatch)
    with pretended_gpu(monkeypatch):
        for one in adaptive:
            index = plan_of(one, 40).index
            assert index.shape[-1] in (591 // 3, 1000 // 3) and index.is_contiguous(), "the rest is freed"


@pytest.mark.parametrize("heads", [4, 2], ids=["an order for every head", "for all, grouped queries"])
def test_tensors_are_permuted_by_one_launch(heads, monkeypatch):
    with pretended_gpu(monkeypatch) as launched:
        q = on_gpu(2, heads, 300, 64)
        order = on_gpu(2, 4, 300, dtype=torch.int64)
        assert [x.shape for x in permuted(order, q, q, q)] == [(2, 4, 300, 64)] * 3
    assert launched["permute"] == 1


@pytest.fixture
def known(monkeypatch):
    """What a run may wait for is given here: what trials measured, how dense a plan is, how wide long lists are, the
    noise level of a step, what is padding. Whatever else waits, fails."""
    costs = {"block_sparse": 1e-12, "block_ragged": 1e-12}
    monkeypatch.setattr(pick, "cost_model", lambda name, kind: Cost(0.0, 0.0, costs.get(name, 1.0)))
    monkeypatch.setattr(pick, "verdict", lambda name, kind: None)
    shorten_lists_of_a_gpu(monkeypatch)
    monkeypatch.setattr(plan_file.BasePlan, "density", 0.25)
    monkeypatch.setattr(RunCounters, "density_achieved", 0.25)
    monkeypatch.setattr(RunCounters, "density_run", 0.25)
    monkeypatch.setattr(tracking, "_scalar", lambda timestep: 500.0)
    lengths = lambda mask, batch, grid: mask.reshape(-1, grid.tokens).sum(-1).expand(batch)
    monkeypatch.setattr(padding, "read_padding", lengths)


@pytest.mark.parametrize("method", ["radial", "svg2"])
@pytest.mark.parametrize("model", bench_transformer.MODELS)
def test_whole_transformers_of_full_size(model, method, known, monkeypatch):
    """As `dit-sparse bench transformer` runs them on a GPU, at 720p, with two layers of each kind."""
    published = bench_transformer.MODELS[model]
    monkeypatch.setitem(bench_transformer.MODELS, model, replace(published, full=replace(published.full, layers=2)))
    with pretended_gpu(monkeypatch) as launched:
        (row,) = bench_transformer.measure_model(model, "cuda", (0.25,), method, rounds=1)
    assert row["layers"] == 2 and row["dtype"] == "bfloat16" and row["tokens"] > 40_000
    assert row["executor"] == ("block_ragged" if method == "svg2" else "block_sparse")
    assert launched["forward"] == 2 * (4 if model == "hunyuan-video" else 2), "once to make plans, once for the clock"


@pytest.mark.parametrize("pattern", bench.PATTERNS)
def test_the_bench_of_attention(pattern, known, monkeypatch):
    """Every case of `dit-sparse bench attention` on a GPU, but for whether the numbers are right."""
    memory = SimpleNamespace(reset_peak_memory_stats=None, memory_allocated=0, max_memory_allocated=7)
    for name, value in vars(memory).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(bench, "check_output", lambda *_: None)
    executors, cases = ["block_sparse", "block_ragged"], bench.cases("cuda", densities=[0.25], patterns=[pattern])
    with pretended_gpu(monkeypatch):
        for case in cases:
            rows = list(bench.measure_case(case, executors, 0.0))
            assert [row["executor"] for row in rows if "why_not" not in row] == [executors[pattern == "clusters"]]
            assert all(row["peak_bytes"] == 7 for row in rows if "why_not" not in row)
    assert {case.grid.tokens for case in cases} == {16_384, 32_760, 75_600, 118_800}
