"""What several test files need: one way to compare numbers, one independent truth, and a small scorer."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product

import pytest
import torch
from torch import Tensor

from dit_sparse import ClusterPlan, Clusters, Grid, Method, Plan, Scorer, Site, order
from dit_sparse.kernels.executors import executor
from dit_sparse.methods import method
from dit_sparse.plan import num_blocks
from dit_sparse.scoring import pool

os.environ.setdefault("HYPOTHESIS_STORAGE_DIRECTORY", os.path.join(tempfile.gettempdir(), "hypothesis"))
from hypothesis import settings, strategies

settings.register_profile("house", deadline=None, derandomize=True, max_examples=40)
settings.load_profile("house")


# Of the half precisions, those in which kernels are tested: Triton's interpreter multiplies bfloat16 wrongly.
HALF = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ALL = os.environ.get("DIT_SPARSE_TESTS") == "all"


def lacking(reason: str) -> None:
    """Skips a test for what this machine lacks; where all tests have to run, as in CI, fails it."""
    (pytest.fail if ALL else pytest.skip)(reason)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative root mean square of the difference; infinite entries have to agree exactly."""
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"relative RMS {error:.2e}, allowed {tolerance:.0e}"


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    assert actual.shape == expected.shape, f"{list(actual.shape)} is not {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "infinite entries differ"
    actual, expected = actual[~infinite], expected[~infinite]
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def qkv(tokens: int, *, batch=1, heads=2, key_heads=None, dim=32, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Random queries, keys and values with a common direction, so that scores spread and blocks matter."""
    generator = torch.Generator().manual_seed(seed)
    make = lambda heads: torch.randn(batch, heads, tokens, dim, generator=generator)
    drift = torch.linspace(-1, 1, tokens)[:, None] * torch.randn(dim, generator=generator)
    q, k, v = make(heads), make(key_heads or heads), make(key_heads or heads)
    return [x.to(dtype) for x in (q + drift, k + drift, v + 0.5)]


def plan_of(what: Method, grid: Grid, block: int, q: Tensor | None = None, k: Tensor | None = None, **site) -> Plan:
    """The method's plan; the full one where it leaves the call dense. Two random heads unless q and k are given."""
    if q is None:
        q, k, _ = qkv(grid.tokens, dim=8)
    plan = what.plan(q, k, Site(grid, block, **site), {})
    return Plan.dense(grid.tokens, block) if plan is None else plan


def random_plan(tokens: int, block: int, *, batch=1, heads=1, density=0.3, seed=0, order=None, lengths=None) -> Plan:
    """Random blocks; each row keeps its own."""
    blocks = num_blocks(tokens, block)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, blocks, blocks, generator=generator) < density
    plan = Plan.from_mask(keep | torch.eye(blocks, dtype=torch.bool), tokens, block, order)
    return plan.with_lengths(None if lengths is None else torch.tensor(lengths))


def random_clusters(tokens: int, clusters: int, *lead: int, padding: int = 0, seed: int = 0) -> Clusters:
    """Clusters of very different sizes, some empty; the last ``padding`` tokens have the last one to themselves."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(*(lead or (1, 1)), tokens, generator=generator).square() * (clusters - 1)).long()
    labels[labels == 1] = 0
    labels[..., tokens - padding :] = clusters - 1
    return Clusters.from_labels(labels, clusters)


def random_cluster_plan(tokens: int, *, batch=1, heads=1, density=0.3, queries=5, keys=9, lengths=None) -> ClusterPlan:
    """Random clusters on both sides; each row keeps some of the keys that are no padding."""
    padding = 0 if lengths is None else tokens - min(lengths)
    query_side = random_clusters(tokens, queries, batch, heads, seed=1)
    key_side = random_clusters(tokens, keys, batch, heads, padding=padding, seed=2)
    keep = torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(3)) < density
    keep[..., 0] = True
    return ClusterPlan.from_mask(keep, query_side, key_side).with_lengths(
        None if lengths is None else torch.tensor(lengths)
    )


def cluster_token_mask(plan: ClusterPlan, batch: int, heads: int) -> Tensor:
    """As `token_mask`, for clusters."""
    mask = torch.zeros(batch, heads, plan.tokens, plan.tokens, dtype=torch.bool)
    pick = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]
    members = lambda side, c, b, h: pick(side.order, b, h)[pick(side.edges, b, h)[c] : pick(side.edges, b, h)[c + 1]]
    for b, h in product(range(batch), range(heads)):
        for row, (kept, count) in enumerate(zip(pick(plan.index, b, h), pick(plan.count, b, h), strict=True)):
            for column in kept[:count].tolist():
                mask[b, h, members(plan.queries, row, b, h)[:, None], members(plan.keys, column, b, h)] = True
        if plan.lengths is not None:
            mask[b, h, :, int(plan.lengths[b]) :] = False
    return mask


def token_mask(plan: Plan, batch: int, heads: int) -> Tensor:
    """The kept pairs of tokens in their own order, bool ``[B, H, N, N]``, read from the plan entry by entry."""
    mask = torch.zeros(batch, heads, plan.tokens, plan.tokens, dtype=torch.bool)
    pick = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]
    for b in range(batch):
        for h in range(heads):
            place = torch.arange(plan.tokens)
            if plan.order is not None:
                place = plan.order if plan.order.ndim == 1 else pick(plan.order, b, h)
            for row, (index, count) in enumerate(zip(pick(plan.index, b, h), pick(plan.count, b, h), strict=True)):
                queries = place[row * plan.block : (row + 1) * plan.block]
                for column in index[: int(count)].tolist():
                    keys = place[column * plan.block : (column + 1) * plan.block]
                    mask[b, h, queries[:, None], keys] = True
            if plan.lengths is not None:
                mask[b, h, :, int(plan.lengths[b]) :] = False
    return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Masked attention in float64: out and log-sum-exp. A row without a key gives 0 and -inf."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def executor_or_skip(name: str, q: Tensor, k: Tensor, plan: Plan):
    """The executor; a skipped test where it says that it cannot run this."""
    module = executor(name)
    if reason := module.why_not(q, k, plan):
        pytest.skip(f"{name}: {reason}")
    return module


@contextmanager
def poisoned():
    """Inside, memory that torch leaves uninitialised is NaN."""
    deterministic = torch.utils.deterministic
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    fill = deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    deterministic.fill_uninitialized_memory = True
    try:
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(3)).isnan().all()
        yield
    finally:
        deterministic.fill_uninitialized_memory = fill
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


@dataclass(frozen=True, kw_only=True)
class Pooled(Scorer):
    """The plainest scorer: products of block means. ``curve`` cuts the blocks along a Hilbert curve."""

    curve: bool = False

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return order.hilbert(grid) if self.curve else None

    def score(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Tensor:
        return pool(q, site.block) @ pool(k, site.block).mT


def make(name: str, **given) -> Method:
    """A method by its name in METHODS, or ``pooled`` and ``pooled_curve``, which share their laws."""
    if name.startswith("pooled"):
        return Pooled(curve=name.endswith("curve"), **given)
    return method(name, **given)


def grids(most: int = 7, text: int = 20) -> strategies.SearchStrategy[Grid]:
    """Small grids of any shape, with text on either side."""
    side, beside = strategies.integers(1, most), strategies.integers(0, text)
    return strategies.builds(Grid, side, side, side, beside, beside)
