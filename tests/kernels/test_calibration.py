"""Self-checks, cost models, and the choice of executors by ``auto``."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import astuple, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis.strategies import floats

from attention_cases import qkv, random_cluster_plan, random_plan
from dit_sparse.kernels import cache, calibration, executors, pick
from dit_sparse.kernels.calibration import CallSignature, CostModel, Measurement, cost_model
from dit_sparse.kernels.executors import gather, reference

BLOCKS = CallSignature(torch.device("cpu"), torch.float32, 16, 16, clusters=False, reorders=True)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setitem(calibration.TIMING_SIZES, "cpu", (256, 2))
    cached = (calibration.cost_model, calibration._self_check)
    for function in cached:
        function.cache_clear()
    yield
    for function in cached:
        function.cache_clear()


def register_executor(monkeypatch, attend) -> str:
    """Register a function as an executor, and return its name."""
    module = ModuleType("dit_sparse.kernels.executors.custom")
    module.attend, module.why_not = attend, lambda q, k, plan: None
    module.LSE, module.CLUSTERS, module.THIRD_PARTY = True, True, True
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(executors, "EXECUTORS", (*executors.EXECUTORS, "custom"))
    return "custom"


# --- self-check


def raises_error(q, k, v, plan, scale=None):
    raise RuntimeError("CUDA error: out of memory\nCompile with TORCH_USE_CUDA_DSA")


def ignores_plan(q, k, v, plan, scale=None):
    return F.scaled_dot_product_attention(q, k, v), None


def ignores_tail(q, k, v, plan, scale=None):
    return reference.attend(q, k, v, plan.with_tail(None), scale)


def returns_wrong_lse(q, k, v, plan, scale=None):
    out, lse = reference.attend(q, k, v, plan, scale)
    return out, lse * 1.4427


def returns_nan(q, k, v, plan, scale=None):
    out, lse = reference.attend(q, k, v, plan, scale)
    return torch.where(torch.arange(plan.tokens)[:, None] == plan.tokens - 1, torch.nan, out), lse


def ignores_order(q, k, v, plan, scale=None):
    return reference.attend(q, k, v, replace(plan, order=None), scale)


WRONG_EXECUTORS = {
    raises_error: "self-check failed: CUDA error: out of memory$",
    ignores_plan: "the output has a relative RMS error of .*, allowed 2%",
    returns_wrong_lse: "the log-sum-exp differs from the reference",
    returns_nan: "the output has a relative RMS error of nan%",
    ignores_order: "the output has a relative RMS error",
    ignores_tail: "the output has a relative RMS error",
}


@pytest.mark.parametrize("attend", WRONG_EXECUTORS)
def test_self_check_rejects_wrong_executors(attend, monkeypatch):
    name = register_executor(monkeypatch, attend)
    (q, k, _), plan = qkv(75, dim=16), random_plan(75, 16)
    with pytest.raises(RuntimeError, match=WRONG_EXECUTORS[attend]):
        pick.pick(name, q, k, plan)


@pytest.mark.parametrize(
    "signature", [BLOCKS, replace(BLOCKS, clusters=True), replace(BLOCKS, dtype=torch.bfloat16)], ids=str
)
def test_self_check_accepts_correct_executors(signature, monkeypatch):
    without_lse = register_executor(monkeypatch, lambda *arguments: (gather.attend(*arguments)[0], None))
    assert calibration.self_check("gather", signature) is None
    assert calibration.self_check(without_lse, signature) is None


def test_auto_excludes_executors_that_fail_the_self_check(monkeypatch):
    monkeypatch.setitem(pick.AUTO, "cpu", (register_executor(monkeypatch, ignores_plan), "gather"))
    (q, k, _), plan = qkv(75, dim=16), random_plan(75, 16)
    choice = pick.pick("auto", q, k, plan)
    assert (choice.name, choice.reason) == ("gather", "the only executor that supports this call")


# --- cost models


def test_calls_with_the_same_properties_have_the_same_signature():
    (q, _, _), (longer, _, _) = qkv(75, batch=2), qkv(300)
    signature = CallSignature.from_call(q, random_plan(75, 16))
    assert signature == CallSignature.from_call(longer, random_plan(300, 16, density=0.9))
    assert signature != CallSignature.from_call(q, random_plan(75, 32))
    assert signature != CallSignature.from_call(q, random_plan(75, 16, order=torch.arange(75)))
    clusters = CallSignature.from_call(q, random_cluster_plan(75, keys=9))
    assert clusters == CallSignature.from_call(longer, random_cluster_plan(300, keys=36)) and clusters.group_size == 8


@pytest.mark.parametrize("name", ["gather", "reference", "dense"])
@pytest.mark.parametrize("clusters", [False, True])
def test_cost_model_is_measured_once_and_stored(name, clusters, monkeypatch, tmp_path):
    signature = replace(BLOCKS, clusters=clusters)
    cost = cost_model(name, signature)
    assert cost.per_pair > 0 <= min(cost.fixed, cost.per_token) and cost.seconds(9, 2e9) > cost.seconds(9, 1e9)
    cost_model.cache_clear()
    monkeypatch.setattr(calibration, "_measure", None)
    assert cost_model(name, signature) == cost
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["key"][0] == name


@pytest.mark.parametrize("content", ["", "{}", '{"cost_model": {"fixed": 1}}', '{"cost_model": 3}', "[]"])
def test_damaged_cost_file_is_replaced(content, monkeypatch, tmp_path):
    cost_model("dense", BLOCKS)
    (file,) = tmp_path.iterdir()
    file.write_text(content)
    cost_model.cache_clear()
    monkeypatch.setattr(calibration, "_measure", lambda *_: CostModel(1.0, 0.0, 2.0))
    assert cost_model("dense", BLOCKS) == CostModel(1.0, 0.0, 2.0)
    assert json.loads(file.read_text())["cost_model"] == {"fixed": 1.0, "per_token": 0.0, "per_pair": 2.0}


def test_cost_model_stored_by_another_process_is_used(monkeypatch, tmp_path):
    cost_model("dense", BLOCKS)
    (file,) = tmp_path.iterdir()
    content = file.read_text()
    file.unlink()
    cost_model.cache_clear()

    def measure_while_another_process_stores(name, signature):
        file.write_text(content)
        return CostModel(1.0, 0.0, 2.0)

    monkeypatch.setattr(calibration, "_measure", measure_while_another_process_stores)
    assert cost_model("dense", BLOCKS) == CostModel(**json.loads(content)["cost_model"])
    assert file.read_text() == content and list(tmp_path.iterdir()) == [file]


def test_unwritable_cache_folder_causes_one_warning(monkeypatch, tmp_path, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path / "file" / "cache"))
    with caplog.at_level(logging.WARNING, "dit_sparse"):
        for name in ("gather", "dense"):
            assert cost_model(name, BLOCKS).per_pair > 0
    (record,) = caplog.records
    assert "cannot write to the cache folder" in record.message and "set DIT_SPARSE_CACHE" in record.message
    assert len(list(cache.writable_cache_folder().glob("cost_*.json"))) == 2


@given(floats(0, 1e3), floats(0, 10), floats(0, 1e3))
def test_fit_recovers_an_exact_cost_model(fixed, per_token, per_pair):
    exact = CostModel(fixed, per_token, per_pair + 1)
    sizes = (100, 2e3), (100, 8e3), (25, 5e2)
    fitted = calibration._fit(*(Measurement(*size, exact.seconds(*size)) for size in sizes))
    assert astuple(fitted) == pytest.approx(astuple(exact), rel=1e-6, abs=1e-6 * exact.seconds(100, 8e3))


@given(*[floats(1e-9, 1e3)] * 3)
def test_fit_of_noise_has_no_negative_coefficients(low_density, high_density, short):
    fitted = calibration._fit(
        Measurement(100, 2e3, low_density), Measurement(100, 8e3, high_density), Measurement(25, 5e2, short)
    )
    assert fitted.per_pair > 0 <= min(fitted.fixed, fitted.per_token)
    assert fitted.seconds(100, 8e3) == pytest.approx(max(high_density, 8e3 * fitted.per_pair))


def test_fit_of_plans_of_equal_density():
    """If blocks are large, the plans of both densities keep all pairs."""
    high_density = Measurement(256, 256**2, 2e-4)
    fitted = calibration._fit(Measurement(256, 256**2, 3e-4), high_density, Measurement(64, 64**2, 1e-4))
    assert fitted.per_pair > 0 and fitted.seconds(256, 256**2) == pytest.approx(2e-4)


@pytest.mark.parametrize("clusters", [False, True])
def test_measured_costs_count_tokens_and_pairs_of_all_heads(clusters, monkeypatch):
    exact = CostModel(3.0, 0.01, 1e-3)

    def predicted_seconds(call):
        q, *_, plan = call.args
        tokens = q.shape[:3].numel()
        return exact.seconds(tokens, tokens * q.shape[2] * plan.density)

    monkeypatch.setattr(calibration, "_fastest_seconds", predicted_seconds)
    measured = calibration._measure("gather", replace(BLOCKS, clusters=clusters))
    assert astuple(measured) == pytest.approx(astuple(exact), rel=1e-3)


def test_plans_with_and_without_an_order_have_separate_cost_models(tmp_path):
    for reorders in (False, True):
        cost_model("gather", replace(BLOCKS, reorders=reorders))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("reorders", [False, True])
def test_measured_plans_reorder_like_the_signature(reorders, monkeypatch):
    plans = []
    name = register_executor(monkeypatch, lambda q, k, v, plan: plans.append(plan) or (q, None))
    cost_model(name, replace(BLOCKS, reorders=reorders))
    assert {plan.order is not None for plan in plans} == {reorders}


# --- choice


@pytest.fixture
def costs(monkeypatch) -> dict[str, CostModel]:
    """Cost models by name, which a test may change; ``auto`` chooses between gather and reference."""
    costs = {
        "gather": CostModel(0.0, 0.0, 4e-9),
        "reference": CostModel(1e-3, 0.0, 2e-9),
        "dense": CostModel(0.0, 0.0, 1e-9),
    }
    monkeypatch.setattr(pick, "cost_model", lambda name, _: costs[name])
    monkeypatch.setitem(pick.AUTO, "cpu", ("gather", "reference"))
    return costs


def test_auto_chooses_the_lowest_cost_for_the_number_of_pairs(costs):
    (q, k, _), plan = qkv(75), random_plan(75, 16)
    assert pick.pick("auto", q, k, plan).name == "gather", "the fixed cost of reference decides"
    q = q[:1, :1].expand(512, 64, -1, -1)
    choice = pick.pick("auto", q, q, plan)
    assert choice.name == "reference"
    assert choice.reason == "lowest estimated cost at density 0.40 (reference 149 ms, gather 297 ms)"


def test_auto_counts_the_cost_per_token(costs):
    (q, k, _), plan = qkv(75), random_plan(75, 16)
    costs["gather"] = CostModel(0.0, 1e-3, 4e-9)
    assert pick.pick("auto", q, k, plan).name == "reference"


@pytest.mark.parametrize("density, expected", [(0.05, "gather"), (1.0, "dense")])
def test_auto_chooses_dense_attention_if_it_costs_less(costs, density, expected):
    (q, k, _), plan = qkv(300), random_plan(300, 16, density=density)
    assert pick.pick("auto", q, k, plan, or_dense=True).name == expected
    assert pick.pick("auto", q, k, plan).name == "gather"
    assert pick.pick("gather", q, k, plan, or_dense=True).name == "gather"
