"""Plans of clusters, and every executor that supports them, against float64 attention."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from attention_cases import (
    HALF_DTYPES,
    TOLERANCE,
    assert_near,
    cluster_token_mask,
    exact,
    executor_or_skip,
    nan_filled_memory,
    qkv,
    random_cluster_plan,
    random_clusters,
    random_plan,
)
from dit_sparse import ClusterPlan, Clusters, Plan
from dit_sparse.kernels.executors import EXECUTORS, block_ragged, block_sparse, executor, gather
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.pick import pick

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CLUSTER_EXECUTORS = [name for name in EXECUTORS if executor(name).CLUSTERS]
CASES = {
    "one head": (dict(tokens=300), dict()),
    "few tokens": (dict(tokens=37), dict(queries=3, keys=4)),
    "separate items and heads": (dict(tokens=300, batch=2, heads=2), dict(batch=2, heads=2)),
    "every cluster": (dict(tokens=200), dict(density=1.0)),
    "large clusters": (dict(tokens=700, heads=1), dict(queries=2, keys=3)),
    "more clusters than tokens": (dict(tokens=20), dict(queries=30, keys=40)),
    "lengths": (dict(tokens=300, batch=3, heads=1), dict(lengths=[300, 251, 200])),
    "grouped heads, lists and orders per query head": (dict(tokens=300, heads=4, key_heads=2), dict(heads=4, batch=1)),
    "one order, lists per head": (dict(tokens=300, heads=2), dict(heads=1)),
    "grouped heads": (dict(tokens=150, heads=4, key_heads=2), dict(heads=4)),
    "head_dim 80": (dict(tokens=150, dim=80), dict()),
    "head_dim 96": (dict(tokens=150, dim=96), dict()),
    "head_dim 128": (dict(tokens=150, dim=128), dict()),
    "large clusters, grouped heads in a batch": (
        dict(tokens=700, batch=2, heads=2, key_heads=1, dim=128),
        dict(batch=2, heads=2, queries=2, keys=3, lengths=[700, 600]),
    ),
    "head_dim 256": (dict(tokens=150, heads=1, dim=256), dict()),
}


def case(name: str, dtype: torch.dtype = torch.float32) -> tuple[list[torch.Tensor], ClusterPlan]:
    tensors, plan = CASES[name]
    q, k, v = qkv(**{"dim": 64} | tensors, dtype=dtype)
    plan = random_cluster_plan(tensors["tokens"], **plan)
    if name == "grouped heads":  # one order of the keys for all heads
        plan = replace(plan, keys=random_clusters(tensors["tokens"], 9))
    return [q, k, v], plan


# --- plans


@given(tokens=st.integers(1, 60), clusters=st.integers(1, 80), seed=st.integers(0, 99))
def test_clusters_hold_every_token_once_in_stable_order(tokens, clusters, seed):
    labels = torch.randint(clusters, (2, 3, tokens), generator=torch.Generator().manual_seed(seed))
    found = Clusters.from_labels(labels, clusters)
    assert torch.equal(found.labels, labels)
    assert torch.equal(found.order.sort(-1).values, torch.arange(tokens).expand(2, 3, -1))
    assert torch.equal(found.sizes, torch.nn.functional.one_hot(labels, clusters).sum(-2))
    same_cluster = found.labels.gather(-1, found.order).diff(dim=-1) == 0
    assert (found.order.diff(dim=-1)[same_cluster] > 0).all(), "tokens of one cluster keep their order"


@pytest.mark.parametrize("clusters", [2**15 - 1, 2**15, 40_000])
def test_many_clusters(clusters):
    labels = torch.arange(clusters - 1, -1, -1)[None, None]
    found = Clusters.from_labels(labels, clusters)
    assert found.labels.equal(labels) and (found.sizes == 1).all()


@given(seed=st.integers(0, 99), density=st.floats(0.05, 1))
def test_density_counts_token_pairs(seed, density):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(2, 3, 5, 9, generator=generator) < density
    keep[..., 0] = True
    plan = ClusterPlan.from_mask(
        keep, random_clusters(50, 5, 2, 3, seed=seed), random_clusters(50, 9, 1, 3, seed=seed + 1)
    )
    assert torch.equal(plan.block_mask(), keep)
    assert plan.density == pytest.approx(cluster_token_mask(plan, 2, 3).double().mean().item(), abs=1e-9)


def test_mask_that_does_not_match_the_clusters_raises():
    queries, keys = random_clusters(50, 5), random_clusters(50, 9)
    with pytest.raises(ValueError, match=r"these clusters need a mask \[B, H, 5, 9\], got \[1, 1, 9, 5\]"):
        ClusterPlan.from_mask(torch.ones(1, 1, 9, 5, dtype=torch.bool), queries, keys)
    with pytest.raises(ValueError, match="every row must keep at least one"):
        ClusterPlan.from_mask(torch.zeros(1, 1, 5, 9, dtype=torch.bool), queries, keys)


def test_plan_of_blocks_equals_the_same_plan_of_clusters():
    blocks = random_plan(100, 16, heads=2, order=torch.randperm(100, generator=torch.Generator().manual_seed(1)))
    side = Clusters.from_labels(blocks.query_group, blocks.blocks)
    clusters = ClusterPlan.from_mask(blocks.block_mask(), side, side)
    assert clusters.density == pytest.approx(blocks.density)
    q, k, v = qkv(100, dim=64)
    for expected, actual in zip(gather.attend(q, k, v, blocks), gather.attend(q, k, v, clusters), strict=True):
        assert_near(actual, expected, 1e-6)


# --- executors


@pytest.mark.parametrize("name", CLUSTER_EXECUTORS)
@pytest.mark.parametrize("shape", CASES)
def test_agrees_with_float64(shape, name):
    dtype = torch.float16 if DEVICE == "cuda" and name == "block_ragged" else torch.float32
    (q, k, v), plan = case(shape, dtype)
    expected, log_sum_exp = exact(q, k, v, cluster_token_mask(plan, *q.shape[:2]))
    q, k, v, plan = (x.to(DEVICE) for x in (q, k, v, plan))
    run = executor_or_skip(name, q, k, plan)
    with nan_filled_memory():
        out, lse = run.attend(q, k, v, plan)
    assert_near(out.cpu(), expected, TOLERANCE[dtype])
    assert_near(lse.cpu(), log_sum_exp, TOLERANCE[dtype])


@pytest.mark.parametrize("name", CLUSTER_EXECUTORS)
def test_padding_does_not_affect_the_result(name):
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    (q, k, v), plan = case("lengths", dtype)
    q, k, v, plan = *(x.to(DEVICE) for x in (q, k, v)), plan.to(DEVICE)
    clean, _ = executor_or_skip(name, q, k, plan).attend(q, k, v, plan)
    for item, length in enumerate(plan.lengths.tolist()):
        k[item, :, length:] = torch.nan
        v[item, :, length:] = 0.0 if name == "reference" else torch.nan  # reference multiplies values by 0
    assert torch.equal(executor(name).attend(q, k, v, plan)[0], clean)


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_block_ragged_in_half_precision(dtype):
    (q, k, v), plan = case("separate items and heads", dtype)
    expected, _ = exact(q, k, v, cluster_token_mask(plan, *q.shape[:2]), 0.2)
    q, k, v, plan = (x.to(DEVICE) for x in (q, k, v, plan))
    assert_near(block_ragged.attend(q, k, v, plan, 0.2)[0].cpu(), expected, TOLERANCE[dtype])


def test_block_ragged_output_has_the_memory_layout_of_the_queries():
    (q, k, v), plan = case("one head")
    token_major = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v)]
    dtype = torch.float16 if DEVICE == "cuda" else torch.float32
    out, _ = block_ragged.attend(*(x.to(DEVICE, dtype) for x in token_major), plan.to(DEVICE))
    assert out.stride() == token_major[0].stride()


# --- launch arguments of block_ragged


@given(seed=st.integers(0, 200), density=st.floats(0.05, 1), keys=st.sampled_from([4, 16]))
def test_key_tiles_cover_every_kept_key_once(seed, density, keys):
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(1, 1, 4, 12, generator=generator) < density
    keep[..., int(torch.randint(12, (1,), generator=generator))] = True
    plan = ClusterPlan.from_mask(keep, random_clusters(90, 4, seed=seed), random_clusters(90, 12, seed=seed + 1))
    run_starts, run_ends = block_ragged.key_runs(plan)
    tile_starts, tile_counts, tail_starts = block_ragged.key_tiles(run_starts, run_ends, keys, 90)
    for row in range(4):
        visited = torch.zeros(90, dtype=torch.int)
        for start in tile_starts[0, 0, row, : tile_counts[0, 0, row]].tolist():
            visited[start : start + keys] += 1
        for start, end in zip(tail_starts[0, 0, row].tolist(), run_ends[0, 0, row].tolist(), strict=True):
            assert end - start < keys
            visited[start:end] += 1
        kept = keep[0, 0, row].repeat_interleave(plan.keys.sizes[0, 0])
        assert torch.equal(visited, kept.int())
        is_used = run_ends[0, 0, row] > run_starts[0, 0, row]
        assert is_used.sum() == (kept.int().diff(prepend=torch.zeros(1)) == 1).sum(), "adjacent clusters form one run"


@given(seed=st.integers(0, 200), tokens=st.integers(1, 90), rows=st.sampled_from([4, 16]))
def test_query_tiles_cover_every_query_once(seed, tokens, rows):
    edges = random_clusters(tokens, 6, 2, 1, seed=seed).edges
    clusters, starts = block_ragged.query_tiles(edges, rows, tokens)
    for item in range(2):
        covered = torch.zeros(tokens, dtype=torch.int)
        for cluster, start in zip(clusters[item, 0].tolist(), starts[item, 0].tolist(), strict=True):
            covered[start : min(start + rows, int(edges[item, 0, cluster + 1]))] += start < tokens
        assert (covered == 1).all()


# --- supported plans


def test_executors_require_blocks_or_clusters():
    (q, k, _), plan = case("one head")
    for name in set(EXECUTORS) - set(CLUSTER_EXECUTORS):
        with pytest.raises(RuntimeError, match="requires equal blocks, got clusters"):
            pick(name, q, k, plan)
    assert pick("auto", q, k, plan).name in CLUSTER_EXECUTORS
    assert "use block_sparse" in block_ragged.why_not(q, k, Plan.dense(300, 64))
    assert block_sparse.why_not(q, k, Plan.dense(300, 64)) == launching.why_not(q, k)
