"""Self-checks and cost models of executors, measured on small problems on this machine.

A self-check compares an executor with the reference once per process. A cost model predicts the seconds of a call. It
is stored in the cache folder for the machine and the versions it was measured with; delete the files ``cost_*.json``
there to measure again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan, Clusters
from dit_sparse.plan import Plan, num_blocks

from .cache import cache_folder, writable_cache_folder
from .executors import executor, reference

TOLERANCE = 0.02  # relative RMS error of an output; bfloat16 stays below 0.01, an ignored mask exceeds 0.5
TIMING_SIZES = {  # (tokens, heads) per device type: small, but not dominated by fixed costs
    "cpu": (2048, 2),
    "cuda": (16384, 8),
}
LOW_DENSITY, HIGH_DENSITY = 0.125, 0.5
REPEATS = 4  # the minimum counts, because interference only adds time

_log = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class CallSignature:
    """Properties of a call that determine its cost per token and per query-key pair.

    Attributes:
        device, dtype, head_dim: of q.
        group_size: tokens in a block; with clusters, their mean size rounded down to a power of 2.
        clusters: whether the plan is a `ClusterPlan`.
        reorders: whether the plan reorders tokens.
    """

    device: torch.device
    dtype: torch.dtype
    head_dim: int
    group_size: int
    clusters: bool
    reorders: bool

    @classmethod
    def from_call(cls, q: Tensor, plan: Plan | ClusterPlan) -> CallSignature:
        """Return the signature of a call with queries ``q [B, H, N, D]``."""
        clusters = isinstance(plan, ClusterPlan)
        mean_size = round(plan.tokens / plan.key_sizes.shape[-1])
        group_size = 1 << mean_size.bit_length() - 1 if clusters else plan.block
        return cls(q.device, q.dtype, q.shape[-1], group_size, clusters, plan.order is not None)

    def __str__(self) -> str:
        groups = f"clusters of about {self.group_size}" if self.clusters else f"blocks of {self.group_size}"
        reordered = ", reordered" if self.reorders and not self.clusters else ""
        return f"{groups}{reordered}, head_dim {self.head_dim}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class CostModel:
    """Predicted seconds of a call: ``fixed + per_token * tokens + per_pair * pairs``.

    Tokens and kept query-key pairs are summed over batch and heads. The cost per token is independent of density:
    tokens are reordered, read and written.
    """

    fixed: float
    per_token: float
    per_pair: float

    def seconds(self, tokens: float, pairs: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_pair * pairs


class Measurement(NamedTuple):
    """Seconds of one call; tokens and kept pairs are summed over heads."""

    tokens: float
    pairs: float
    seconds: float


def self_check(name: str, signature: CallSignature) -> str | None:
    """Return None if the executor agrees with the reference on small problems, with a pooled tail and without,
    otherwise what is wrong."""
    return _self_check(name, replace(signature, reorders=True))


@cache
def _self_check(name: str, signature: CallSignature) -> str | None:
    attend, group_size = executor(name).attend, signature.group_size
    ragged = 3 * group_size + group_size // 2 + 1
    tails = (None, max(1, group_size // 4)) if executor(name).LSE else (None,)
    for tokens, tail in ((4 * group_size, None), *((ragged, tail) for tail in tails)):
        q, k, v, plan = _random_problem(signature, tokens, heads=2, density=0.5)
        plan = plan.with_tail(tail)
        try:
            out, lse = attend(q, k, v, plan)
        except Exception as error:
            message = str(error).strip() or type(error).__name__
            return f"self-check failed: {message.splitlines()[0]}"
        expected, expected_lse = reference.attend(q, k, v, plan)
        error = _relative_rms(out, expected)
        if not error < TOLERANCE:
            return f"self-check failed: the output has a relative RMS error of {error:.0%}, allowed {TOLERANCE:.0%}"
        if lse is not None and not (lse - expected_lse).abs().max() < TOLERANCE:
            return "self-check failed: the log-sum-exp differs from the reference"
    return None


@cache
def cost_model(name: str, signature: CallSignature) -> CostModel:
    """Return the cost model of an executor, or of PyTorch's dense attention if ``name`` is "dense".

    Loads it from the cache folder, or measures it and stores it there.
    """
    key = [name, str(signature), *_machine_key(signature.device)]
    file_name = f"cost_{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}.json"
    stored = _load(cache_folder() / file_name)
    return stored or _store_first(writable_cache_folder() / file_name, key, _measure(name, signature))


def _load(file: Path) -> CostModel | None:
    """Return the cost model in a file, or None if the file is missing or damaged."""
    try:
        return CostModel(**json.loads(file.read_text())["cost_model"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _store_first(file: Path, key: list[str], measured: CostModel) -> CostModel:
    """Store a cost model unless another process has stored one in the meantime, and return the stored one, so that all
    processes choose the same executors."""
    temporary = file.with_suffix(f".{os.getpid()}")
    try:
        temporary.write_text(json.dumps({"key": key, "cost_model": asdict(measured)}, indent=1))
        with suppress(OSError):  # the file exists, or the file system has no hard links
            os.link(temporary, file)
        if _load(file) is None:
            temporary.replace(file)
        temporary.unlink(missing_ok=True)
    except OSError as error:  # such as a full disk
        _log.warning("cannot store the cost model in %s (%s): it is measured again in every process", file, error)
    return _load(file) or measured


def _measure(name: str, signature: CallSignature) -> CostModel:
    _log.info("measuring the cost of %s for %s, once on this machine", name, signature)
    tokens, heads = TIMING_SIZES.get(signature.device.type, TIMING_SIZES["cpu"])
    if name == "dense":
        q, k, v, _ = _random_problem(signature, tokens, heads, 1.0)
        seconds = _fastest_seconds(partial(F.scaled_dot_product_attention, q, k, v))
        return CostModel(0.0, 0.0, seconds / (heads * tokens**2))
    attend = executor(name).attend

    def measure(tokens: int, density: float) -> Measurement:
        q, k, v, plan = _random_problem(signature, tokens, heads, density)
        seconds = _fastest_seconds(partial(attend, q, k, v, plan))
        return Measurement(heads * tokens, heads * tokens**2 * plan.density, seconds)

    return _fit(measure(tokens, LOW_DENSITY), measure(tokens, HIGH_DENSITY), measure(tokens // 4, HIGH_DENSITY))


def _fit(low_density: Measurement, high_density: Measurement, short: Measurement) -> CostModel:
    """Return the cost model through three measurements: two with the same tokens, and one with fewer tokens.
    Coefficients are at least 0 despite noise, and the cost per pair is at least a quarter of the seconds per pair at
    high density."""
    pairs = high_density.pairs - low_density.pairs  # 0 if the groups are so large that both keep all of them
    slope = (high_density.seconds - low_density.seconds) / pairs if pairs else 0.0
    per_pair = max(slope, high_density.seconds / high_density.pairs / 4)
    rest, rest_of_short = (max(one.seconds - per_pair * one.pairs, 0.0) for one in (high_density, short))
    per_token = max(rest - rest_of_short, 0.0) / (high_density.tokens - short.tokens)
    per_token = min(per_token, rest / high_density.tokens)
    return CostModel(rest - per_token * high_density.tokens, per_token, per_pair)


def _fastest_seconds(call: Callable[[], object]) -> float:
    from torch.utils.benchmark import Timer  # imported here because it adds attributes to torch

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(1)  # warm-up: compiles, and fills caches
    return min(timer.timeit(1).mean for _ in range(REPEATS))


def _random_problem(
    signature: CallSignature, tokens: int, heads: int, density: float
) -> tuple[Tensor, Tensor, Tensor, Plan | ClusterPlan]:
    """Return random q, k, v ``[1, heads, tokens, D]`` and a plan with random lists for every head, of shuffled tokens
    if the signature reorders."""
    generator = torch.Generator().manual_seed(0)
    groups = num_blocks(tokens, signature.group_size)
    mask = torch.rand(1, heads, groups, groups, generator=generator) < density
    mask |= torch.eye(groups, dtype=torch.bool)
    if signature.clusters:
        labels = torch.randint(groups, (2, 1, heads, tokens), generator=generator)
        plan = ClusterPlan.from_mask(mask, *(Clusters.from_labels(side, groups) for side in labels))
    else:
        order = torch.randperm(tokens, generator=generator) if signature.reorders else None
        plan = Plan.from_mask(mask, tokens, signature.group_size, order)
    q, k, v = torch.randn(3, 1, heads, tokens, signature.head_dim, generator=generator)
    return *(x.to(signature.device, signature.dtype) for x in (q, k, v)), plan.to(signature.device)


def _relative_rms(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected.float()).norm() / expected.float().norm())


def _machine_key(device: torch.device) -> list[str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}", f"dit-sparse {version('dit-sparse')}"
    tokens, heads = TIMING_SIZES.get(device.type, TIMING_SIZES["cpu"])
    return [name, f"{torch.get_num_threads()} threads", *versions, f"{tokens} tokens, {heads} heads"]
