"""What an executor is worth on this machine, found by trying it on small problems: is it right, and what does it cost?

A verdict holds for the process. A cost holds for the machine and the versions that it was measured with: it is kept in
the cache folder. Delete the folder's cost files to measure again.
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

import torch
import torch.nn.functional as F
from torch import Tensor

from dit_sparse.clusters import ClusterPlan, Clusters
from dit_sparse.plan import Plan, num_blocks

from .cache import cache_folder
from .executors import executor, reference

TOLERANCE = 0.02  # relative RMS error of an output; bfloat16 stays below .01, a mask that is ignored gives more than .5
TIMING_SIZES = {
    "cpu": (2048, 2),
    "cuda": (16384, 8),
}  # (tokens, heads): small, yet not dominated by fixed costs
FEW, SOME = 0.125, 0.5  # densities
REPEATS = 4  # the fastest counts: others only add to a time

_log = logging.getLogger("dit_sparse")


@dataclass(frozen=True)
class CallSignature:
    """Calls that cost the same per token and per pair: of these inputs, with groups of this size, and with tokens that
    are brought into an order or not."""

    device: torch.device
    dtype: torch.dtype
    dim: int
    group: int
    clusters: bool
    ordered: bool

    @classmethod
    def from_call(cls, q: Tensor, plan: Plan | ClusterPlan) -> CallSignature:
        """Of a call with queries ``q [B, H, N, D]``. Clusters count by their mean size, to a power of 2."""
        clusters = isinstance(plan, ClusterPlan)
        mean = plan.tokens / plan.key_sizes.shape[-1]
        group = 1 << round(mean).bit_length() - 1 if clusters else plan.block
        return cls(q.device, q.dtype, q.shape[-1], group, clusters, plan.order is not None)

    def __str__(self) -> str:
        groups = f"clusters of some {self.group}" if self.clusters else f"blocks of {self.group}"
        groups += ", in an order" if self.ordered and not self.clusters else ""
        return f"{groups}, head_dim {self.dim}, {str(self.dtype).removeprefix('torch.')}"


@dataclass(frozen=True)
class Cost:
    """Seconds of a call, its tokens and pairs being those of all heads. A token costs what is done whatever the
    density: it is brought to its place, read and written."""

    fixed: float
    per_token: float
    per_pair: float

    def seconds(self, tokens: float, pairs: float) -> float:
        return self.fixed + self.per_token * tokens + self.per_pair * pairs


def self_check(name: str, kind: CallSignature) -> str | None:
    """None when the executor agrees with the reference on two small problems, else what is wrong, in words."""
    return _self_check(name, replace(kind, ordered=True))


@cache
def _self_check(name: str, kind: CallSignature) -> str | None:
    attend = executor(name).attend
    for tokens in (4 * kind.group, 3 * kind.group + kind.group // 2 + 1):
        q, k, v, plan = _random_problem(kind, tokens, heads=2, density=0.5)
        try:
            out, lse = attend(q, k, v, plan)
        except Exception as error:
            said = str(error).strip() or type(error).__name__
            return f"its self-check failed: {said.splitlines()[0]}"
        expected, expected_lse = reference.attend(q, k, v, plan)
        if not _relative_rms(out, expected) < TOLERANCE:
            return f"its self-check gave outputs {_relative_rms(out, expected):.0%} off the reference"
        if lse is not None and not (lse - expected_lse).abs().max() < TOLERANCE:
            return "its self-check gave a wrong log-sum-exp"
    return None


@cache
def cost_model(name: str, kind: CallSignature) -> Cost:
    """What a call of this kind costs by an executor, or by PyTorch's dense attention when ``name`` is "dense"."""
    key = json.dumps([name, str(kind), *_machine_key(kind.device)])
    file = cache_folder() / f"cost_{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"
    if (known := _read(file)) is not None:
        return known
    measured = _measure(name, kind)
    file.parent.mkdir(parents=True, exist_ok=True)
    aside = file.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps({"measured": json.loads(key), "cost": asdict(measured)}, indent=1))
    with suppress(OSError):  # what another process has kept meanwhile stays, so that all choose alike
        os.link(aside, file)
    if _read(file) is None:  # it is damaged, or there are no links here
        aside.replace(file)
    aside.unlink(missing_ok=True)
    return _read(file) or measured


def _read(file: Path) -> Cost | None:
    """The cost in a file; None where there is none, or something else."""
    try:
        return Cost(**json.loads(file.read_text())["cost"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measure(name: str, kind: CallSignature) -> Cost:
    _log.info("measuring %s for %s, once on this machine", name, kind)
    tokens, heads = TIMING_SIZES.get(kind.device.type, TIMING_SIZES["cpu"])
    if name == "dense":
        q, k, v, _ = _random_problem(kind, tokens, heads, 1.0)
        return Cost(0.0, 0.0, _seconds(partial(F.scaled_dot_product_attention, q, k, v)) / (heads * tokens**2))
    attend = executor(name).attend

    def tried(tokens: int, density: float) -> tuple[float, float]:
        q, k, v, plan = _random_problem(kind, tokens, heads, density)
        return heads * tokens**2 * plan.density, _seconds(partial(attend, q, k, v, plan))

    few, some, fewer_tokens = tried(tokens, FEW), tried(tokens, SOME), tried(tokens // 4, SOME)
    return _fit_cost(few, some, fewer_tokens, heads * tokens, heads * (tokens // 4))


def _fit_cost(few: tuple, some: tuple, fewer_tokens: tuple, tokens: int, fewer: int) -> Cost:
    """What explains three measurements of pairs and seconds, where noise makes nothing negative and pairs not free: two
    of so many ``tokens``, and one of ``fewer``."""
    (_, short), (pairs, long) = few, some
    per_pair = max((long - short) / (pairs - few[0]), long / pairs / 4)
    rest, rest_of_fewer = (max(seconds - per_pair * pairs, 0.0) for pairs, seconds in (some, fewer_tokens))
    per_token = min(max(rest - rest_of_fewer, 0.0) / (tokens - fewer), rest / tokens)
    return Cost(rest - per_token * tokens, per_token, per_pair)


def _seconds(call: Callable[[], object]) -> float:
    from torch.utils.benchmark import Timer  # here, for it makes some attributes of torch appear

    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(1)  # compiles, and fills caches
    return min(timer.timeit(1).mean for _ in range(REPEATS))


def _random_problem(
    kind: CallSignature, tokens: int, heads: int, density: float
) -> tuple[Tensor, Tensor, Tensor, Plan | ClusterPlan]:
    """Random inputs ``[1, heads, tokens, D]`` and a plan with lists of its own for every head, of shuffled tokens where
    the kind is of an order."""
    generator = torch.Generator().manual_seed(0)
    groups = num_blocks(tokens, kind.group)
    keep = torch.rand(1, heads, groups, groups, generator=generator) < density
    keep |= torch.eye(groups, dtype=torch.bool)
    if kind.clusters:
        labels = torch.randint(groups, (2, 1, heads, tokens), generator=generator)
        plan = ClusterPlan.from_mask(keep, *(Clusters.from_labels(side, groups) for side in labels))
    else:
        order = torch.randperm(tokens, generator=generator) if kind.ordered else None
        plan = Plan.from_mask(keep, tokens, kind.group, order)
    q, k, v = torch.randn(3, 1, heads, tokens, kind.dim, generator=generator).to(kind.device, kind.dtype).unbind()
    return q, k, v, plan.to(kind.device)


def _relative_rms(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected.float()).norm() / expected.float().norm())


def _machine_key(device: torch.device) -> list[str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability()
    versions = f"torch {torch.__version__}", f"dit-sparse {version('dit-sparse')}"
    tokens, heads = TIMING_SIZES.get(device.type, TIMING_SIZES["cpu"])
    return [name, f"{torch.get_num_threads()} threads", *versions, f"{tokens} tokens, {heads} heads"]
