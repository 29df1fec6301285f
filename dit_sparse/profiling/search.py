"""Which method for which head: candidates are measured while a pipeline runs densely, then chosen under a budget.

Measured is the relative error of a head's output, ``|O_m - O| / |O|``, for attention mass explains only a part of it.
Where all heads have one density, each takes the candidate with the least error. Where densities may differ, choosing is
a Lagrangian: with a price on density every head takes the candidate with the least ``error^2 + price * density``, and
the price is bisected until the mean meets the target. Sparse-vDiT (arXiv:2506.03065) fixes the price and an absolute
error instead; here both follow from what is asked for.

One density is the default, for errors of different heads do not weigh the same in the video: on the bundled model at
density .25, moving density to where errors are large makes the mean error smaller (.11 for .16) and the video worse
(28.6 for 30.1 dB, eight prompts, with a plan for each branch of guidance; dividing by the mean energy of the layer's
heads instead of each head's own: 29.0).
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ..clusters import ClusterPlan
from ..composition import PerHead, nested_methods
from ..engine.enable import enable
from ..engine.plans import Plans
from ..grid import Site
from ..kernels.calibration import CallSignature, cost_model
from ..kernels.pick import pick
from ..method import AttentionOutput, Method
from ..methods import method
from ..methods.dense import Dense
from ..methods.rettention import Rettention
from ..plan import Plan
from ..schedule import Schedule

VDIT = ("svg.spatial", "svg.temporal", "vdit.vertical", "vdit.skip")
SPREAD = (0.4, 0.7, 1.0, 1.5, 2.5)  # densities to try where they may differ, as multiples of the target
STEPS_MEASURED = 3
LETTERS = string.ascii_lowercase + string.ascii_uppercase + string.digits


@dataclass(frozen=True)
class Candidate:
    """A method by its name, as it is tried."""

    name: str
    method: Method


@dataclass
class Measured:
    """What was seen, ``[candidates, layers, heads]`` each: squared relative error, density, and seconds a call by the
    cost that was measured for the executor; and where."""

    error: Tensor
    density: Tensor
    seconds: Tensor
    grids: set[str] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)


def candidates(names: str, density: float, spread: Sequence[float] = SPREAD) -> list[Candidate]:
    """All methods named, separated by commas, at the target density times each of ``spread``; dense attention before
    them.

    Raises:
        ValueError: an unknown name, a method that cannot be judged by single calls or share a launch, or no density
            left below 1.
    """
    if not spread or not all(factor * density > 0 for factor in spread) or min(spread) * density >= 1:
        raise ValueError(f"the spread is multiples of the density {density} below 1, such as 0.5,1,2, not {spread}")
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    wanted = [part for name in wanted for part in (VDIT if name == "vdit" else (name,))]
    tried = [Candidate("dense", Dense())]
    for name in dict.fromkeys(wanted):
        if any(isinstance(part, Rettention | PerHead) for part in nested_methods(method(name))):
            raise ValueError(f"{name} cannot be a candidate: it is not judged by single calls")
        if method(name).clusters:
            raise ValueError(f"{name} cannot be a candidate: clusters cannot share a launch with blocks")
        if name in ("dense", "vdit.skip"):
            tried += [Candidate(name, method(name))] if name == "vdit.skip" else []
            continue
        tried += [Candidate(name, method(name, density=f * density)) for f in spread if f * density < 1]
    if len(tried) > len(LETTERS):
        raise ValueError(f"{len(tried)} candidates are more than the {len(LETTERS)} letters of a profile: name fewer")
    return tried


def measure(
    pipe: Any, generate: Callable[[], None], tried: Sequence[Candidate], schedule: Schedule, block: int | None = None
) -> Measured:
    """Run ``generate()``, which makes clips with ``pipe``, densely, and try the candidates on some of its calls.

    Args:
        pipe: a pipeline, as for ``enable``.
        generate: makes one clip or several.
        tried: the candidates.
        schedule: steps that it keeps dense are not looked at; of the others the first, the last and one between are.
        block: tokens in a block.

    Raises:
        ValueError: no step is sparse, or no call can be.
    """
    sums: dict[int, list] = {}
    seen = Measured(torch.empty(0), torch.empty(0), torch.empty(0))

    def note(site: Site, rows: tuple[Tensor, Tensor, Tensor]) -> None:
        seen.grids.add(str(site.grid))
        seen.steps.add(site.step)
        sums.setdefault(site.layer, []).append(torch.stack(rows))

    probe = _Probe(tried=tuple(one.method for one in tried), note=note, schedule=schedule)
    run = enable(pipe, probe, dense_steps=0, min_tokens=0, block=block)
    try:
        generate()
    finally:
        run.disable()
    if not sums:
        raise ValueError("no call of this pipeline could be made sparse, so there is nothing to choose")
    layers = [torch.stack(sums[layer]).mean(0) for layer in sorted(sums)]  # [3, candidates, heads]
    seen.error, seen.density, seen.seconds = torch.stack(layers, 2).unbind(0)
    return seen


def measured_steps(schedule: Schedule, steps: int | None, looks: int) -> list[int]:
    """Steps at which methods are tried: the first sparse one, the last, and evenly spread between. Where nobody knows
    how many steps there are, the first alone.

    Raises:
        ValueError: the schedule keeps every step dense.
    """
    first = schedule.first_sparse_step(steps)
    if steps is not None and first >= steps:
        raise ValueError(
            f"dense_steps={schedule.dense_steps} keeps all {steps} steps dense, so no step is left to try methods at"
        )
    return torch.linspace(first, first if steps is None else steps - 1, looks).round().int().tolist()


def trial_plans(tried: Sequence[Method], memory: dict, schedule: Schedule) -> list[Plans]:
    """The plans of each method that is tried beside another one, kept in that one's memory; for all methods and layers
    they are too many for a GPU."""
    return [memory.setdefault(i, Plans(one, schedule.per_branch, offload=True)) for i, one in enumerate(tried)]


def squared_error(
    one: Method, done: AttentionOutput, plan: Plan | ClusterPlan, attend: Callable, site: Site, memory: dict
) -> Tensor:
    """``|O_s - O|^2 / |O|^2`` of every head's output, float64 ``[H]``; what padding would have said does not count."""
    out, lse = attend(done.q, done.k, done.v, plan, scale=done.scale)
    dense = lambda: (done.out, done.lse)
    out, _ = one.correct(AttentionOutput(done.q, done.k, done.v, plan, done.scale, out, lse, dense), site, memory)
    out, exact = out.double(), done.out.double()
    if plan.lengths is not None:
        padding = torch.arange(plan.tokens, device=out.device) >= plan.lengths.to(out.device)[:, None]
        out, exact = (x.masked_fill(padding[:, None, :, None], 0) for x in (out, exact))
    energy = lambda x: x.square().sum((0, 2, 3))
    return energy(out - exact) / energy(exact).clamp(min=1e-30)


def best(error: Tensor) -> Tensor:
    """The number of the candidate with the least error for every layer and head, int64 ``[L, H]``, of errors
    ``[candidates, L, H]`` the first of which are dense attention's and do not run."""
    return 1 + error[1:].argmin(0)


def choose(
    error: Tensor, density: Tensor, target_density: float | None = None, max_error: float | None = None
) -> Tensor:
    """Number of the candidate for every layer and head, int64 ``[L, H]``.

    Args:
        error: squared relative errors, ``[candidates, L, H]``.
        density: of every candidate, likewise; one of them is dense, with density 1 and error 0.
        target_density: the mean density may not exceed it; or
        max_error: the root of the mean squared error may not exceed it.

    Raises:
        ValueError: not exactly one of the two is given, or no choice meets it.
    """
    if (target_density is None) == (max_error is None):
        raise ValueError("give a target density or a maximal error, one of the two")
    at = lambda price: (error + price * density).argmin(0)
    taken = lambda table, choice: table.gather(0, choice[None])[0].mean()
    fits = (
        (lambda choice: taken(density, choice) <= target_density + 1e-6)
        if max_error is None
        else lambda choice: taken(error, choice) > max_error**2
    )
    low, high = 1e-9, 1e9  # cheap: everything is dense; dear: everything is as sparse as can be
    if max_error is None and not fits(at(high)):
        raise ValueError(f"no candidate is sparse enough for a mean density of {target_density}")
    for _ in range(80):
        middle = (low * high) ** 0.5
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    return _filled(error, density, at(high), target_density) if max_error is None else at(low)


def _filled(error: Tensor, density: Tensor, choice: Tensor, target: float) -> Tensor:
    """Spend what the Lagrangian left: head by head the change that removes most error for its density."""
    choice, (layers, heads) = choice.clone(), choice.shape
    while True:
        here = choice[None]
        gain, price = error.gather(0, here) - error, (density - density.gather(0, here)) / (layers * heads)
        room = target + 1e-6 - density.gather(0, here).mean()
        worth = torch.where((gain > 0) & (price <= room), gain / price.clamp(min=1e-9), -1.0)
        best = int(worth.argmax())
        if worth.flatten()[best] <= 0:
            return choice
        candidate, place = divmod(best, layers * heads)
        choice.view(-1)[place] = candidate


def letters(tried: Sequence[Candidate], choice: Tensor) -> tuple[dict[str, Candidate], list[str]]:
    """A letter for every candidate that was chosen, and a string for every layer."""
    used = dict(zip(choice.unique().tolist(), LETTERS, strict=False))
    lines = ["".join(used[number] for number in layer) for layer in choice.tolist()]
    return {letter: tried[number] for number, letter in used.items()}, lines


@dataclass(frozen=True, kw_only=True)
class _Probe(Method):
    """Dense attention that tries other methods on the side."""

    tried: tuple[Method, ...]
    note: Callable[[Site, tuple[Tensor, Tensor, Tensor]], None]
    schedule: Schedule

    def check_model(self, layers: int, heads: int) -> None:
        for one in self.tried:
            one.check_model(layers, heads)

    def plan(self, q, k, site, memory):
        return Plan.dense(site.grid.tokens, site.block, q.device)

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if site.step in measured_steps(self.schedule, site.steps, STEPS_MEASURED):
            fresh = replace(site, needs_plan=True)
            rows = [self._try(one, done, fresh) for one in trial_plans(self.tried, memory, self.schedule)]
            self.note(site, tuple(torch.stack(row).cpu() for row in zip(*rows, strict=True)))
        return done.out, done.lse

    def _try(self, tried: Plans, done: AttentionOutput, site: Site) -> tuple[Tensor, Tensor, Tensor]:
        """Squared relative error, density and predicted seconds of every head, ``[H]`` each."""
        heads, tokens = done.q.shape[1:3]
        one, plan = tried.method, tried.plan(done.q, done.k, site)
        if plan is None:
            seconds = cost_model("dense", CallSignature.from_call(done.q, done.plan)).seconds(tokens, tokens**2)
            return torch.zeros(heads), torch.ones(heads), torch.full((heads,), seconds)
        plan = plan.with_lengths(done.plan.lengths)
        choice = pick("auto", done.q, done.k, plan, lse=one.needs_lse)
        wrong = squared_error(one, done, plan, choice.executor.attend, site, tried.memory(done.q, site))
        density = plan.density_by_head.mean(0).float().cpu().expand(heads)
        price = cost_model(choice.name, CallSignature.from_call(done.q, plan))
        seconds = replace(price, fixed=price.fixed / heads).seconds(tokens, tokens**2 * density)
        return wrong.float().cpu(), density, seconds
