"""What padding holds changes no other row, and every finite scale gives masked softmax attention."""

from __future__ import annotations

import pytest
import torch

from attention_cases import (
    assert_near,
    cluster_token_mask,
    exact,
    executor_or_skip,
    qkv,
    random_cluster_plan,
    random_order,
    random_plan,
    token_mask,
)
from dit_sparse import ClusterPlan
from dit_sparse.kernels.gpu import launching

OWN = ["reference", "gather", "cpu"] + ["block_sparse", "block_ragged"] * launching.is_interpreted()
LENGTHS = [75, 40]
PLANS = {
    "blocks": random_plan(75, 16, heads=2, lengths=LENGTHS),
    "ordered blocks": random_plan(75, 16, batch=2, order=random_order(tokens=75, fixed=35), lengths=LENGTHS),
    "all pairs": random_plan(75, 16, density=1.0, lengths=LENGTHS),
    "clusters": random_cluster_plan(75, batch=2, heads=2, lengths=LENGTHS),
}
for_every_executor = pytest.mark.parametrize("name", OWN)
for_every_plan = pytest.mark.parametrize("kind", PLANS)


def supported(name: str, kind: str, tensors: list[torch.Tensor]):
    """Return the executor, or skip the test if it does not support the plan."""
    if name == ("block_sparse" if isinstance(PLANS[kind], ClusterPlan) else "block_ragged"):
        pytest.skip(f"{name} does not compute {kind}")
    return executor_or_skip(name, *tensors[:2], PLANS[kind])


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # of NumPy in Triton's interpreter
@for_every_executor
@for_every_plan
def test_padding_does_not_reach_other_rows(name, kind):
    """Padded queries, keys and values may hold anything."""
    anything = torch.tensor([torch.nan, torch.inf, -torch.inf]).repeat(25)[:, None]
    clean, plan = qkv(75, batch=2, dim=16), PLANS[kind]
    run = supported(name, kind, clean)
    padding = (torch.arange(75) >= torch.tensor(LENGTHS)[:, None])[:, None, :, None]
    expected, actual = (run.attend(*x, plan) for x in (clean, [anything.where(padding, x) for x in clean]))
    real = ~padding[..., 0].expand(2, 2, -1)
    for one, other in zip(actual, expected, strict=True):
        assert one[real].equal(other[real])


@for_every_executor
@for_every_plan
@pytest.mark.parametrize(
    ("scale", "dtype"), [(0.0, torch.float32), (-0.2, torch.float16), (-1.5, torch.float32)], ids=str
)
def test_any_scale(name, kind, scale, dtype):
    (q, k, v), plan = qkv(75, batch=2, dim=16, dtype=dtype), PLANS[kind]
    out, lse = supported(name, kind, [q, k, v]).attend(q, k, v, plan, scale)
    mask = (cluster_token_mask if isinstance(plan, ClusterPlan) else token_mask)(plan, 2, 2)
    expected, log_sum_exp = exact(q, k, v, mask, scale)
    assert_near(out, expected, 5e-6 if dtype == torch.float32 else 2e-3)
    assert_near(lse, log_sum_exp, 5e-6 if dtype == torch.float32 else 1e-3)
