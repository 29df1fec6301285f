"""Shared test helpers: comparisons, random inputs and plans, float64 attention, and a small scorer."""

from __future__ import annotations

import os
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise, product

import pytest
import torch
import torch.nn.functional as F
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

# The half precisions to test kernels with. Triton's interpreter multiplies bfloat16 incorrectly.
HALF_DTYPES = (torch.float16, torch.bfloat16) if torch.cuda.is_available() else (torch.float16,)
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
ALL = os.environ.get("DIT_SPARSE_TESTS") == "all"


def skip_or_fail(reason: str) -> None:
    """Skip a test whose requirement is missing; fail it if all tests must run (``DIT_SPARSE_TESTS=all``, as in CI)."""
    (pytest.fail if ALL else pytest.skip)(reason)


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Assert that the relative RMS error is within the tolerance. Infinite entries must be equal."""
    error = relative_rms(actual, expected)
    assert error <= tolerance, f"relative RMS error is {error:.2e}, allowed {tolerance:.0e}"


def relative_rms(actual: Tensor, expected: Tensor) -> float:
    """Return the RMS of the difference relative to the RMS of the expected values, over finite entries."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    actual, expected = actual.double(), expected.double()
    assert not actual.isnan().any(), f"{int(actual.isnan().sum())} of {actual.numel()} entries are NaN"
    infinite = expected.isinf()
    assert torch.equal(actual[infinite], expected[infinite]), "infinite entries differ"
    actual, expected = actual[~infinite], expected[~infinite]
    return float((actual - expected).norm() / expected.norm().clamp(min=1e-300))


def qkv(tokens: int, *, batch=1, heads=2, key_heads=None, dim=32, dtype=torch.float32, seed=0) -> list[Tensor]:
    """Return random q, k, v. A component that varies along the sequence makes the scores of blocks differ."""
    generator = torch.Generator().manual_seed(seed)
    random = lambda heads: torch.randn(batch, heads, tokens, dim, generator=generator)
    drift = torch.linspace(-1, 1, tokens)[:, None] * torch.randn(dim, generator=generator)
    q, k, v = random(heads), random(key_heads or heads), random(key_heads or heads)
    return [x.to(dtype) for x in (q + drift, k + drift, v + 0.5)]


def plan_of(method: Method, grid: Grid, block: int, q: Tensor | None = None, k: Tensor | None = None, **site) -> Plan:
    """Return the method's plan, or the dense plan if it leaves the call dense. Default q and k: two random heads."""
    if q is None:
        q, k, _ = qkv(grid.tokens, dim=8)
    plan = method.plan(q, k, k, Site(grid, block, **site), {})
    return Plan.dense(grid.tokens, block) if plan is None else plan


def random_plan(tokens: int, block: int, *, batch=1, heads=1, density=0.3, seed=0, order=None, lengths=None) -> Plan:
    """Return a plan of random blocks, in which each query block keeps its own key block."""
    blocks = num_blocks(tokens, block)
    generator = torch.Generator().manual_seed(seed)
    keep = torch.rand(batch, heads, blocks, blocks, generator=generator) < density
    plan = Plan.from_mask(keep | torch.eye(blocks, dtype=torch.bool), tokens, block, order)
    return plan.with_lengths(None if lengths is None else torch.tensor(lengths))


def random_order(*lead: int, tokens: int, fixed: int = 0) -> Tensor:
    """Return a random order ``[*lead, N]`` that keeps the last ``fixed`` tokens, which may be padding, in place."""
    order = torch.rand(*lead, tokens - fixed, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return torch.cat([order, torch.arange(tokens - fixed, tokens).expand(*lead, -1)], -1)


def random_clusters(tokens: int, clusters: int, *lead: int, padding: int = 0, seed: int = 0) -> Clusters:
    """Return clusters of very different sizes, some empty. The last ``padding`` tokens form the last cluster."""
    generator = torch.Generator().manual_seed(seed)
    labels = (torch.rand(*(lead or (1, 1)), tokens, generator=generator).square() * (clusters - 1)).long()
    labels[labels == 1] = 0
    labels[..., tokens - padding :] = clusters - 1
    return Clusters.from_labels(labels, clusters)


def random_cluster_plan(tokens: int, *, batch=1, heads=1, density=0.3, queries=5, keys=9, lengths=None) -> ClusterPlan:
    """Return a plan of random clusters. Each query cluster keeps at least one key cluster without padding."""
    padding = 0 if lengths is None else tokens - min(lengths)
    query_side = random_clusters(tokens, queries, batch, heads, seed=1)
    key_side = random_clusters(tokens, keys, batch, heads, padding=padding, seed=2)
    keep = torch.rand(batch, heads, queries, keys, generator=torch.Generator().manual_seed(3)) < density
    keep[..., 0] = True
    return ClusterPlan.from_mask(keep, query_side, key_side).with_lengths(
        None if lengths is None else torch.tensor(lengths)
    )


def cluster_token_mask(plan: ClusterPlan, batch: int, heads: int) -> Tensor:
    """Return the mask of kept token pairs of a cluster plan, bool ``[B, H, N, N]``, entry by entry."""
    mask = torch.zeros(batch, heads, plan.tokens, plan.tokens, dtype=torch.bool)
    entry = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]
    members = lambda side, c, b, h: entry(side.order, b, h)[entry(side.edges, b, h)[c] : entry(side.edges, b, h)[c + 1]]
    for b, h in product(range(batch), range(heads)):
        for row, (kept, count) in enumerate(zip(entry(plan.index, b, h), entry(plan.count, b, h), strict=True)):
            for column in kept[:count].tolist():
                mask[b, h, members(plan.queries, row, b, h)[:, None], members(plan.keys, column, b, h)] = True
        if plan.lengths is not None:
            mask[b, h, :, int(plan.lengths[b]) :] = False
    return mask


def token_mask(plan: Plan, batch: int, heads: int) -> Tensor:
    """Return the mask of kept token pairs, bool ``[B, H, N, N]``, read from the plan entry by entry."""
    mask = torch.zeros(batch, heads, plan.tokens, plan.tokens, dtype=torch.bool)
    entry = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)]
    for b in range(batch):
        for h in range(heads):
            order = torch.arange(plan.tokens)
            if plan.order is not None:
                order = plan.order if plan.order.ndim == 1 else entry(plan.order, b, h)
            for row, (index, count) in enumerate(zip(entry(plan.index, b, h), entry(plan.count, b, h), strict=True)):
                queries = order[row * plan.block : (row + 1) * plan.block]
                for column in index[: int(count)].tolist():
                    keys = order[column * plan.block : (column + 1) * plan.block]
                    mask[b, h, queries[:, None], keys] = True
            if plan.lengths is not None:
                mask[b, h, :, int(plan.lengths[b]) :] = False
    return mask


def exact(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float | None = None) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of masked attention in float64. Rows without keys get 0 and -inf."""
    q, k, v = q.double(), *(x.double().repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    scores = (q @ k.mT * (q.shape[-1] ** -0.5 if scale is None else scale)).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, torch.logsumexp(scores, -1)


def term_labels(plan: Plan | ClusterPlan, batch: int, heads: int) -> Tensor:
    """Return the pooled term of the plan's tail that each token belongs to, int64 ``[B, H, N]``, token by token."""
    entry = lambda x, b, h: x[min(b, x.shape[0] - 1), min(h, x.shape[1] - 1)].tolist()
    labels = torch.zeros(batch, heads, plan.tokens, dtype=torch.long)
    for b, h in product(range(batch), range(heads)):
        if isinstance(plan, ClusterPlan):
            order, edges = entry(plan.keys.order, b, h), entry(plan.keys.edges, b, h)
        else:
            one_order = torch.arange(plan.tokens) if plan.order is None else plan.order
            order = entry(one_order if one_order.ndim == 3 else one_order[None, None], b, h)
            edges = [*range(0, plan.tokens, plan.block), plan.tokens]
        starts = ((at, end) for first, end in pairwise(edges) for at in range(first, end, plan.tail))
        terms = (range(at, min(at + plan.tail, end)) for at, end in starts)
        for number, term in enumerate(terms):
            labels[b, h, [order[position] for position in term]] = number
    return labels


def exact_with_tail(
    q: Tensor, k: Tensor, v: Tensor, plan: Plan | ClusterPlan, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp in float64 of attention over the kept keys and the pooled terms of the others."""
    batch, heads, tokens, dim = q.shape
    q, k, v = q.double(), *(x.double().repeat_interleave(heads // k.shape[1], 1) for x in (k, v))
    scale = dim**-0.5 if scale is None else scale
    mask = (cluster_token_mask if isinstance(plan, ClusterPlan) else token_mask)(plan.with_lengths(None), batch, heads)
    valid = torch.arange(tokens) < (torch.tensor([tokens]) if plan.lengths is None else plan.lengths)[:, None]
    k, v = (torch.where(valid[:, None, :, None], x, 0.0) for x in (k, v))
    labels = term_labels(plan, batch, heads)
    member = F.one_hot(labels).double()
    is_kept = mask.double() @ member > 0
    member = member * valid[:, None, :, None]
    size = member.sum(2)
    keys, values = (member.mT @ x / size.clamp(min=1)[..., None] for x in (k, v))
    logits = (q @ keys.mT * scale + size.log()[:, :, None]).masked_fill(is_kept, -torch.inf)
    scores = (q @ k.mT * scale).masked_fill(~(mask & valid[:, None, None]), -torch.inf)
    scores = torch.cat([scores, logits], -1)
    return scores.softmax(-1).nan_to_num(0.0) @ torch.cat([v, values], 2), torch.logsumexp(scores, -1)


def softmax_map(q: Tensor, k: Tensor) -> Tensor:
    """Return the attention map in float64, ``[B, H, N, N]``."""
    return (q.double() @ k.double().mT * q.shape[-1] ** -0.5).softmax(-1)


def block_sums(table: Tensor, block: int) -> Tensor:
    """Return the sums over blocks of the last two dimensions, ``[..., N, N] -> [..., Qb, Qb]``."""
    table = F.pad(table, (0, -table.shape[-1] % block) * 2)
    return table.unflatten(-1, (-1, block)).sum(-1).unflatten(-2, (-1, block)).sum(-2)


def executor_or_skip(name: str, q: Tensor, k: Tensor, plan: Plan):
    """Return the executor, or skip the test if it does not support the call."""
    module = executor(name)
    if reason := module.why_not(q, k, plan):
        pytest.skip(f"{name}: {reason}")
    return module


@contextmanager
def nan_filled_memory():
    """Fill uninitialized memory that PyTorch allocates with NaN."""
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
class BlockMeans(Scorer):
    """Score blocks by the dot product of their means. ``hilbert`` orders tokens along a Hilbert curve."""

    hilbert: bool = False

    def order(self, grid: Grid, block: int) -> Tensor | None:
        return order.hilbert(grid) if self.hilbert else None

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        return pool(q, site.block) @ pool(k, site.block).mT


def make(name: str, **options) -> Method:
    """Return a method by its name, or the scorer `BlockMeans` for ``block_means`` and ``block_means_hilbert``."""
    if name.startswith("block_means"):
        return BlockMeans(hilbert=name.endswith("hilbert"), **options)
    return method(name, **options)


def grids(max_side: int = 7, max_text: int = 20) -> strategies.SearchStrategy[Grid]:
    """Generate small grids with text before and after the video."""
    side, text = strategies.integers(1, max_side), strategies.integers(0, max_text)
    return strategies.builds(Grid, side, side, side, text, text)
