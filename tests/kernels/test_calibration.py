"""What `auto` knows of executors: whether they are right here, and what they cost."""

from __future__ import annotations

import json
import sys
from dataclasses import astuple, replace
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis.strategies import floats

from attention_cases import qkv, random_cluster_plan, random_plan
from dit_sparse.kernels import calibration as trial
from dit_sparse.kernels import executors, pick
from dit_sparse.kernels.calibration import CallSignature, Cost
from dit_sparse.kernels.executors import gather, reference

BLOCKS = CallSignature(torch.device("cpu"), torch.float32, 16, 16, clusters=False, ordered=True)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, tmp_path):
    monkeypatch.setenv("DIT_SPARSE_CACHE", str(tmp_path))
    monkeypatch.setitem(trial.TIMING_SIZES, "cpu", (256, 2))
    for function in (trial.cost_model, trial._self_check):
        function.cache_clear()
    yield
    for function in (trial.cost_model, trial._self_check):
        function.cache_clear()


def executor(monkeypatch, attend) -> str:
    """An executor of this function, under the name "newcomer"."""
    module = ModuleType("dit_sparse.kernels.executors.newcomer")
    module.attend, module.why_not = attend, lambda q, k, plan: None
    module.LSE, module.CLUSTERS, module.THIRD_PARTY = True, True, True
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(executors, "EXECUTORS", (*executors.EXECUTORS, "newcomer"))
    return "newcomer"


# --- is it right?


def broken(q, k, v, plan, scale=None):
    raise RuntimeError("CUDA error: the moon is full\nCompile with TORCH_USE_CUDA_DSA")


def dense(q, k, v, plan, scale=None):
    return F.scaled_dot_product_attention(q, k, v), None


def slipped(q, k, v, plan, scale=None):
    out, lse = reference.attend(q, k, v, plan, scale)
    return out, lse * 1.4427


def poisoned(q, k, v, plan, scale=None):
    out, lse = reference.attend(q, k, v, plan, scale)
    return torch.where(torch.arange(plan.tokens)[:, None] == plan.tokens - 1, torch.nan, out), lse


def unordered(q, k, v, plan, scale=None):
    return reference.attend(q, k, v, replace(plan, order=None), scale)


WRONG = {
    broken: "its self-check failed: CUDA error: the moon is full$",
    dense: "off the reference",
    slipped: "wrong log-sum-exp",
    poisoned: "off the reference",
    unordered: "off the reference",
}


@pytest.mark.parametrize("attend", WRONG)
def test_a_self_check_finds_what_is_wrong(attend, monkeypatch):
    name = executor(monkeypatch, attend)
    (q, k, _), plan = qkv(75, dim=16), random_plan(75, 16)
    with pytest.raises(RuntimeError, match=WRONG[attend]):
        pick.pick(name, q, k, plan)


@pytest.mark.parametrize(
    "kind", [BLOCKS, replace(BLOCKS, clusters=True), replace(BLOCKS, dtype=torch.bfloat16)], ids=str
)
def test_a_self_check_lets_the_right_ones_pass(kind, monkeypatch):
    name = executor(monkeypatch, lambda *call: (gather.attend(*call)[0], None))
    assert trial.self_check("gather", kind) is trial.self_check(name, kind) is None


def test_auto_leaves_out_who_is_wrong(monkeypatch):
    monkeypatch.setitem(pick.AUTO, "cpu", (executor(monkeypatch, dense), "gather"))
    (q, k, _), plan = qkv(75, dim=16), random_plan(75, 16)
    assert pick.pick("auto", q, k, plan).name == "gather"


# --- what does it cost?


def test_calls_of_a_kind_share_their_trial():
    (q, _, _), (longer, _, _) = qkv(75, batch=2), qkv(300)
    assert CallSignature.from_call(q, random_plan(75, 16)) == CallSignature.from_call(
        longer, random_plan(300, 16, density=0.9)
    )
    assert CallSignature.from_call(q, random_plan(75, 16)) != CallSignature.from_call(q, random_plan(75, 32))
    assert CallSignature.from_call(q, random_plan(75, 16)) != CallSignature.from_call(
        q, random_plan(75, 16, order=torch.arange(75))
    )
    clusters = CallSignature.from_call(q, random_cluster_plan(75, keys=9))
    assert clusters == CallSignature.from_call(longer, random_cluster_plan(300, keys=36)) and clusters.group == 8


@pytest.mark.parametrize("name", ["gather", "reference", "dense"])
@pytest.mark.parametrize("clusters", [False, True])
def test_a_cost_is_measured_once_and_kept(name, clusters, monkeypatch, tmp_path):
    kind = replace(BLOCKS, clusters=clusters)
    cost = trial.cost_model(name, kind)
    assert cost.per_pair > 0 <= min(cost.fixed, cost.per_token) and cost.seconds(9, 2e9) > cost.seconds(9, 1e9)
    trial.cost_model.cache_clear()
    monkeypatch.setattr(trial, "_measure", None)
    assert trial.cost_model(name, kind) == cost
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["measured"][0] == name


@pytest.mark.parametrize("damage", ["", "{}", '{"cost": {"fixed": 1}}', '{"cost": 3}', "[]"])
def test_a_damaged_cost_is_measured_again(damage, monkeypatch, tmp_path):
    trial.cost_model("dense", BLOCKS)
    (file,) = tmp_path.iterdir()
    file.write_text(damage)
    trial.cost_model.cache_clear()
    monkeypatch.setattr(trial, "_measure", lambda name, kind: Cost(1.0, 0.0, 2.0))
    assert trial.cost_model("dense", BLOCKS) == Cost(1.0, 0.0, 2.0)
    assert json.loads(file.read_text())["cost"] == {"fixed": 1.0, "per_token": 0.0, "per_pair": 2.0}


def test_the_cost_that_another_process_kept_first_counts(monkeypatch, tmp_path):
    trial.cost_model("dense", BLOCKS)
    (file,) = tmp_path.iterdir()
    theirs = file.read_text()
    file.unlink()
    trial.cost_model.cache_clear()

    def measured_meanwhile(name, kind):
        file.write_text(theirs)
        return Cost(1.0, 0.0, 2.0)

    monkeypatch.setattr(trial, "_measure", measured_meanwhile)
    assert trial.cost_model("dense", BLOCKS) == Cost(**json.loads(theirs)["cost"]) and file.read_text() == theirs
    assert list(tmp_path.iterdir()) == [file]


@given(floats(0, 1e3), floats(0, 10), floats(0, 1e3))
def test_a_cost_explains_what_was_measured(fixed, per_token, per_pair):
    law = Cost(fixed, per_token, per_pair + 1)
    found = trial._fit_cost(
        (2e3, law.seconds(100, 2e3)), (8e3, law.seconds(100, 8e3)), (5e2, law.seconds(25, 5e2)), 100, 25
    )
    assert astuple(found) == pytest.approx(astuple(law), rel=1e-6, abs=1e-6 * law.seconds(100, 8e3))


@given(*[floats(1e-9, 1e3)] * 3)
def test_noise_never_makes_pairs_free_or_anything_negative(few, some, fewer_tokens):
    found = trial._fit_cost((2e3, few), (8e3, some), (5e2, fewer_tokens), 100, 25)
    assert found.per_pair > 0 <= min(found.fixed, found.per_token)
    assert found.seconds(100, 8e3) == pytest.approx(max(some, 8e3 * found.per_pair)), "the longest one is met"


@pytest.mark.parametrize("clusters", [False, True])
def test_a_trial_finds_what_tokens_and_pairs_of_all_heads_cost(clusters, monkeypatch):
    law = Cost(3.0, 0.01, 1e-3)

    def takes(call):
        q, *_, plan = call.args
        tokens = q.shape[:3].numel()
        return law.seconds(tokens, tokens * q.shape[2] * plan.density)

    monkeypatch.setattr(trial, "_seconds", takes)
    found = trial._measure("gather", replace(BLOCKS, clusters=clusters))
    assert astuple(found) == pytest.approx(astuple(law), rel=1e-3)


def test_calls_with_and_without_an_order_are_kept_apart(tmp_path):
    for ordered in (False, True):
        trial.cost_model("gather", replace(BLOCKS, ordered=ordered))
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("ordered", [False, True])
def test_a_trial_brings_tokens_into_an_order_where_the_calls_do(ordered, monkeypatch):
    seen = []
    name = executor(monkeypatch, lambda q, k, v, plan: seen.append(plan.order is not None) or (q, None))
    trial.cost_model(name, replace(BLOCKS, ordered=ordered))
    assert set(seen) == {ordered}


# --- who is taken?


@pytest.fixture
def costs(monkeypatch) -> dict[str, Cost]:
    table = {"cpu": Cost(0.0, 0.0, 3e-9), "gather": Cost(0.0, 0.0, 4e-9), "dense": Cost(0.0, 0.0, 1e-9)}
    monkeypatch.setattr(pick, "cost_model", lambda name, kind: table[name])
    monkeypatch.setitem(pick.AUTO, "cpu", ("gather", "reference"))
    table["reference"] = Cost(1e-3, 0.0, 2e-9)
    return table


def test_auto_takes_the_cheapest_for_this_many_pairs(costs):
    (q, k, _), small, large = qkv(75), random_plan(75, 16), random_plan(75, 16, batch=1)
    assert pick.pick("auto", q, k, small).name == "gather", "the fixed cost of the other decides"
    q = q[:1, :1].expand(512, 64, -1, -1)
    choice = pick.pick("auto", q, q, large)
    assert choice.name == "reference" and "reference" in choice.reason and "gather" in choice.reason


def test_auto_counts_what_a_token_costs(costs):
    (q, k, _), plan = qkv(75), random_plan(75, 16)
    costs["gather"] = Cost(0.0, 1e-3, 4e-9)
    assert pick.pick("auto", q, k, plan).name == "reference"


@pytest.mark.parametrize("density, expected", [(0.05, "gather"), (1.0, "dense")])
def test_auto_takes_dense_where_sparse_does_not_pay(costs, density, expected):
    (q, k, _), plan = qkv(300), random_plan(300, 16, density=density)
    assert pick.pick("auto", q, k, plan, or_dense=True).name == expected
    assert pick.pick("auto", q, k, plan).name == "gather"
    assert pick.pick("gather", q, k, plan, or_dense=True).name == "gather", "who is named runs"
