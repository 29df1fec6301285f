"""Methods, benchmarks and transformers on a fake GPU: devices, dtypes, kernel launches, and no synchronization."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from dit_sparse import METHODS, ClusterPlan, Grid, Pattern, Site
from dit_sparse import plan as plan_module
from dit_sparse.composition import PerHead
from dit_sparse.engine import tracking
from dit_sparse.engine.masks import padding
from dit_sparse.engine.masks.padding import KeyPadding
from dit_sparse.engine.plans import Plans
from dit_sparse.engine.report import RunCounters
from dit_sparse.eval.bench import attention as attention_bench
from dit_sparse.eval.bench import transformer as transformer_bench
from dit_sparse.kernels import key_lists, pick
from dit_sparse.kernels.calibration import CostModel
from dit_sparse.kernels.executors import block_ragged, block_sparse
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import method
from fake_gpu import fake_gpu

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the tests run on the real GPU instead")

HEAD_METHODS = ("radial", "svg", "adaspa", "pooled(sparge)")
TESTED_METHODS = {
    name: method(name, density=0.25)
    for name in [
        *METHODS,
        "radial|sink",
        "rettention(adaspa)",
        "cached(svg2)",
        "pooled(subblock)",
        "cached(asa, drift=0.1)",
    ]
    if name != "dense"
}
TESTED_METHODS["per head"] = PerHead(
    methods=tuple((letter, method(name, density=0.25)) for letter, name in zip("rsap", HEAD_METHODS, strict=True)),
    layers=("rsap",) * 4,
)

EXPECTED_KERNELS = {
    "svg2": {"nearest_centroid_kernel", "cluster_mean_kernel", "select_top_kernel", "permute_rows_kernel"},
    "pbs": {"select_top_kernel", "permute_rows_kernel"},
    "routing": {"nearest_centroid_kernel", "cluster_mean_kernel", "select_top_kernel", "permute_rows_kernel"},
    "routed": {"mass_and_spread_kernel", "pooling_error_kernel", "select_top_kernel", "permute_rows_kernel"},
    **{key: {"block_mass_kernel", "select_top_kernel"} for key in ("adaspa", "sparsed", "rettention(adaspa)")},
    "per head": {"block_mass_kernel", "select_top_kernel", "permute_rows_kernel"},
    **{key: {"permute_rows_kernel"} for key in ("window", "neighborhood", "svg")},
    **{
        key: {"select_top_kernel"}
        for key in (
            *("asa", "sparge", "subblock", "xattention", "vdit", "sol", "pooled(subblock)"),
            *("flexprefill", "anchor", "sale", "hip", "infllm_v2", "spark"),
        )
    },
}
PATTERNS = tuple(name for name, one in TESTED_METHODS.items() if isinstance(one, Pattern))
PLANNED_ON_CPU = (*PATTERNS, "masformer", "random_blocks", "svg", "pooled", "rettention")
ATTENTION_KERNELS = ("block_sparse_kernel", "block_ragged_kernel")


def gpu_tensor(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


@pytest.mark.parametrize(
    ("name", "grid", "both_branches"),
    [(name, Grid(5, 16, 16, after=30), True) for name in TESTED_METHODS]
    + [(name, Grid(5, 16, 16), False) for name in ("radial", "svg", "svg2", "adaspa", "routed", "per head")],
    ids=lambda value: {True: "both branches in one batch", False: "one branch"}.get(value, str(value)),
)
def test_methods_plan_and_attend_without_synchronization(name, grid, both_branches, monkeypatch):
    """Every method with text and both branches of guidance, one of each kind without."""
    plans = Plans(TESTED_METHODS[name])
    with fake_gpu(monkeypatch) as calls:
        q, k, v = (gpu_tensor(2, 4, grid.tokens, 64) for _ in range(3))
        for step in (3, 4):
            site = Site(grid, 64, layer=1, layers=4, step=step, steps=10, both_branches=both_branches)
            plan = plans.plan(q, k, site, v=v)
            attend = (block_ragged if isinstance(plan, ClusterPlan) else block_sparse).attend
            dense = lambda plan=plan, attend=attend: attend(q, k, v, plan.full())
            done = AttentionOutput(q, k, v, plan, None, *attend(q, k, v, plan), dense)
            out, lse = plans.method.correct(done, site, plans.memory(q, site))
        assert out.is_cuda and out.shape == q.shape and out.dtype == q.dtype
        assert lse is None or (lse.is_cuda and lse.shape == q.shape[:3] and lse.dtype == torch.float32)
    assert sum(calls[kernel] for kernel in ATTENTION_KERNELS) >= 2
    assert EXPECTED_KERNELS.get(name, set()) <= set(calls)
    assert calls["_assert_async"] or name in PLANNED_ON_CPU, "rows that keep nothing are detected"


def trim_lists_on_gpu(monkeypatch) -> None:
    """Return a third of the columns as the width of lists, which cannot be read from a fake tensor."""
    list_width = key_lists.list_width
    trimmed = lambda count, columns: columns // 3 if count.is_cuda else list_width(count, columns)
    monkeypatch.setattr(key_lists, "list_width", trimmed)


def test_only_long_lists_are_trimmed(monkeypatch):
    """At 720p with 40 heads, lists of 56 MB per layer are trimmed, which synchronizes; with 12 heads they are not."""
    grid = Grid(21, 45, 80)
    methods = [TESTED_METHODS[name] for name in ("sparge", "adaspa", "svg2")]

    def make_plan(one, heads):
        q = gpu_tensor(1, heads, grid.tokens, 128)
        return one.plan(q, q, q, Site(grid, 128, step=3, steps=10), {})

    with fake_gpu(monkeypatch):
        for one in methods:
            plan = make_plan(one, 12)
            assert plan.index.shape[-1] == plan.key_sizes.shape[-1]
            with pytest.raises(DataDependentOutputException):
                make_plan(one, 40)
    trim_lists_on_gpu(monkeypatch)
    with fake_gpu(monkeypatch):
        for one in methods:
            index = make_plan(one, 40).index
            assert index.shape[-1] in (591 // 3, 1000 // 3) and index.is_contiguous(), "a view would keep the full list"


@pytest.mark.parametrize("heads", [4, 2], ids=["one order per head", "orders for grouped heads"])
def test_tensors_are_permuted_in_one_launch(heads, monkeypatch):
    with fake_gpu(monkeypatch) as calls:
        q = gpu_tensor(2, heads, 300, 64)
        order = gpu_tensor(2, 4, 300, dtype=torch.int64)
        assert [x.shape for x in permute_tokens(order, q, q, q)] == [(2, 4, 300, 64)] * 3
    assert calls["permute_rows_kernel"] == 1


@pytest.fixture
def known_values(monkeypatch):
    """Replace the values that a run may read from the GPU: measured costs, densities, the width of long lists, the
    noise level of a step, padding. Every other synchronization fails."""
    costs = {"block_sparse": 1e-12, "block_ragged": 1e-12}
    monkeypatch.setattr(pick, "cost_model", lambda name, _: CostModel(0.0, 0.0, costs.get(name, 1.0)))
    monkeypatch.setattr(pick, "self_check", lambda name, _: None)
    trim_lists_on_gpu(monkeypatch)
    monkeypatch.setattr(plan_module.BasePlan, "density", 0.25)
    monkeypatch.setattr(plan_module.BasePlan, "tail_density", 0.0)
    monkeypatch.setattr(RunCounters, "density_achieved", 0.25)
    monkeypatch.setattr(RunCounters, "density_run", 0.25)
    monkeypatch.setattr(RunCounters, "tail_density", 0.0)
    monkeypatch.setattr(tracking, "_largest", lambda timestep: 500.0)
    lengths = lambda mask, batch, grid, *_: KeyPadding(
        mask.reshape(-1, grid.tokens).sum(-1).expand(batch), (1,) * batch
    )
    monkeypatch.setattr(padding, "read_padding", lengths)


@pytest.mark.parametrize(
    ("model", "method"), [*((model, "radial") for model in transformer_bench.MODELS), ("hunyuan-video", "svg2")]
)
def test_bench_transformer_at_full_size(model, method, known_values, monkeypatch):
    """Run `dit-sparse bench transformer` at 720p with two layers of each kind."""
    published = transformer_bench.MODELS[model]
    monkeypatch.setitem(transformer_bench.MODELS, model, replace(published, full=replace(published.full, layers=2)))
    with fake_gpu(monkeypatch) as calls:
        (row,) = transformer_bench.measure_model(model, "cuda", (0.25,), method, rounds=1)
    assert row["layers"] == 2 and row["dtype"] == "bfloat16" and row["tokens"] > 40_000
    assert row["executor"] == ("block_ragged" if method == "svg2" else "block_sparse")
    layers = 4 if model == "hunyuan-video" else 2
    assert sum(calls[kernel] for kernel in ATTENTION_KERNELS) == 2 * layers, "one pass to plan, one to measure"


@pytest.mark.parametrize("pattern", attention_bench.PATTERNS)
def test_bench_attention(pattern, known_values, monkeypatch):
    """Run every case of `dit-sparse bench attention` without the check of its outputs."""
    memory = SimpleNamespace(reset_peak_memory_stats=None, memory_allocated=0, max_memory_allocated=7)
    for name, value in vars(memory).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(attention_bench, "check_output", lambda *_: None)
    executors, cases = (
        ["block_sparse", "block_ragged"],
        attention_bench.cases("cuda", densities=[0.25], patterns=[pattern]),
    )
    with fake_gpu(monkeypatch):
        for case in cases:
            rows = list(attention_bench.measure_case(case, executors, 0.0))
            assert [row["executor"] for row in rows if "why_not" not in row] == [executors[pattern == "clusters"]]
            assert all(row["peak_bytes"] == 7 for row in rows if "why_not" not in row)
    assert {case.grid.tokens for case in cases} == {16_384, 32_760, 75_600, 118_800}
