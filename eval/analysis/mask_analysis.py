"""How far a mask is from the best one: retained attention and error beside what as many pairs could have kept.

A clip is made densely, and methods are tried on some of its calls, one call at a time; only its plan outlives a call.
Beside the attention that a method retains stand the bounds of `upper_bounds`: ``best``, over the method's own blocks or
clusters, which no choice among them can exceed, so that ``efficiency = retained / best`` is at most 1; ``best_by_row``,
with the method's own number of pairs in every row; ``best_row_major``, over row-major blocks for every method, which
another order or clusters can exceed. A correction adds to the output, not to what is retained: it shows in the error.

Every look makes a new plan, shared by the branches of guidance as in a run, except by methods that keep theirs
themselves: staleness between plans is not in here.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, ClassVar

import torch
from PIL import Image
from torch import Tensor

from dit_sparse import Method, PerHead, Plan, Schedule, Site, SparseAttnProcessor, enable, prepare
from dit_sparse.bundled import BUNDLED, BUNDLED_PROMPT
from dit_sparse.composition import nested_methods
from dit_sparse.engine.plans import Plans
from dit_sparse.generation.generate import Progress, generate, load, usual_call
from dit_sparse.kernels.pick import pick
from dit_sparse.method import AttentionOutput
from dit_sparse.methods import method, name_of
from dit_sparse.methods.rettention import Rettention
from dit_sparse.output.environment import conditions
from dit_sparse.plotting.masks import heat_map
from dit_sparse.profiling.search import measured_steps, squared_error, trial_plans

from .upper_bounds import group_mass, kept_and_best

FIGURES = ("density", "retained", "best", "best_by_row", "best_row_major", "error")
Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class Analysis:
    """What is analysed; everything but the model is checked before any long work.

    Attributes:
        methods: names, compositions such as ``radial|sink``, or methods as values.
        densities: each method at each of them; None: the method's own settings.
        prompts: one clip each, seeds 0, 1, ...
        schedule: steps that it keeps dense are not looked at.
        looks: how many of the other steps are: the first, the last, and evenly spread between.
        block: tokens in a block; None: 64 below 32,768 tokens, else 128.
        model, call: the pipeline, and the arguments of its call.

    Raises:
        ValueError: anything unknown or out of range, a method that lives on what it saw of earlier calls, or a schedule
            that leaves no step to look at.
    """

    methods: Sequence[str | Method]
    densities: Sequence[float | None] = (0.25,)
    prompts: Sequence[str] = (BUNDLED_PROMPT,)
    schedule: Schedule = Schedule()  # noqa: RUF009
    looks: int = 3
    block: int | None = None
    model: str = BUNDLED
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("there are no prompts to analyse methods on")
        if not self.densities:
            raise ValueError("there are no densities to analyse methods at")
        if self.looks < 1:
            raise ValueError(f"looks is how many steps are looked at, at least 1, not {self.looks}")
        SparseAttnProcessor("dense", block=self.block)
        self.tried()
        object.__setattr__(self, "call", usual_call(self.model, small=True) | self.call)
        if steps := self.call.get("num_inference_steps"):
            measured_steps(self.schedule, steps, self.looks)

    def tried(self) -> list[tuple[str, float | None, Method]]:
        """Name, density asked for, and method, in the order of the rows."""
        return [(name, d, one) for d in self.densities for name, one in named(self.methods, d).items()]

    def run(self, stage: Stage) -> dict:
        """One row a method and density, as plain values for JSON. Means are over heads, batch items and calls, and
        ``tables`` hold the same ``[layers][heads]``; an error is the root of the mean of its squares."""
        pipe, tried, seen = prepare(load(self.model)), self.tried(), _Seen()
        look = _Look(tried=tuple(one for *_, one in tried), note=seen, schedule=self.schedule, looks=self.looks)
        with enable(pipe, look, dense_steps=0, min_tokens=0, block=self.block):
            self._generate(pipe, stage("analysing"))
        if not seen.count:
            raise ValueError("no call of this pipeline could be made sparse, so there is nothing to analyse")
        tables = seen.tables()
        result = {"model": self.model, "prompts": list(self.prompts), "call": self.call, "looks": self.looks}
        result |= {"schedule": asdict(self.schedule), "grids": sorted(seen.grids), "steps": sorted(seen.steps)}
        result |= {"blocks": sorted(seen.blocks), "calls": sum(seen.count.values())}
        return result | {"rows": [_row(*one, tables[i]) for i, one in enumerate(tried)]} | conditions()

    def _generate(self, pipe: Any, progress: Progress) -> None:
        for number, prompt in enumerate(self.prompts):
            told = lambda done, steps, n=number: progress(n * steps + done, len(self.prompts) * steps)
            generate(pipe, prompt, number, self.call, told)


def named(methods: Sequence[str | Method], density: float | None) -> dict[str, Method]:
    """Methods by their names, at one density; None: at their own settings.

    Raises:
        ValueError: none at all, an unknown name, the same one twice, or a method that single calls say nothing about.
    """
    found: dict[str, Method] = {}
    for given in methods:
        if isinstance(given, str):
            name, one = given, method(given, **({} if density is None else {"density": density}))
        else:
            name, one = name_of(given), given if density is None else replace(given, density=density)
        if any(isinstance(part, Rettention | PerHead) for part in nested_methods(one)):
            raise ValueError(
                f"{name} cannot be judged by single calls: it lives on earlier ones, or on a layer's place"
            )
        if name in found:
            raise ValueError(f"{name} is there twice; rows are told apart by the method's name")
        found[name] = one
    if not found:
        raise ValueError("there are no methods to look at")
    return found


@torch.no_grad()
def judged(tried: Plans, done: AttentionOutput, site: Site, row_major: Tensor) -> dict[str, Tensor]:
    """A method on one call, float64 ``[H]`` for each of `FIGURES`: means over the batch; ``error`` is squared.

    Args:
        done: the call as computed densely, by a full plan of row-major blocks, with its log-sum-exp.
        row_major: `group_mass` of that plan, which all methods share.
    """
    one, plan = tried.method, tried.plan(done.q, done.k, site)
    heads = done.q.shape[1]
    if plan is None:
        return {name: torch.full((heads,), float(name != "error"), dtype=torch.float64) for name in FIGURES}
    plan = plan.with_lengths(done.plan.lengths)
    by_head = {"density": plan.density_by_head} | kept_and_best(done, plan, site, row_major)
    figures = {name: value.mean(0).expand(heads) for name, value in by_head.items()}
    chosen = pick("auto", done.q, done.k, plan, lse=one.needs_lse)
    figures["error"] = squared_error(one, done, plan, chosen.executor.attend, site, tried.memory(done.q, site))
    return {name: x.cpu() for name, x in figures.items()}


@dataclass(frozen=True, kw_only=True)
class _Look(Method):
    """Dense attention that tries other methods on the side."""

    needs_lse: ClassVar[bool] = True
    tried: tuple[Method, ...]
    note: Callable[[Site, Tensor], None]
    schedule: Schedule
    looks: int

    def check_model(self, layers: int, heads: int) -> None:
        for one in self.tried:
            one.check_model(layers, heads)

    def plan(self, q: Tensor, k: Tensor, site: Site, memory: dict) -> Plan:
        return Plan.dense(site.grid.tokens, site.block, q.device)

    def correct(self, done: AttentionOutput, site: Site, memory: dict) -> tuple[Tensor, Tensor | None]:
        if site.step in measured_steps(self.schedule, site.steps, self.looks):
            row_major = group_mass(done.q, done.k, done.lse, done.plan, done.scale)
            fresh, plans = replace(site, needs_plan=True), trial_plans(self.tried, memory, self.schedule)
            found = [judged(one, done, fresh, row_major) for one in plans]
            self.note(site, torch.stack([torch.stack([figures[name] for name in FIGURES]) for figures in found]))
        return done.out, done.lse


class _Seen:
    """Sums of what was found, ``[methods, figures, H]`` a layer, and where."""

    def __init__(self) -> None:
        self.sums, self.count = {}, {}
        self.grids, self.steps, self.blocks = set(), set(), set()

    def __call__(self, site: Site, found: Tensor) -> None:
        self.sums[site.layer] = self.sums.get(site.layer, 0) + found
        self.count[site.layer] = self.count.get(site.layer, 0) + 1
        self.grids.add(str(site.grid))
        self.steps.add(site.step)
        self.blocks.add(site.block)

    def tables(self) -> Tensor:
        """Means, ``[methods, figures, L, H]``."""
        return torch.stack([self.sums[layer] / self.count[layer] for layer in sorted(self.sums)], 2)


def _row(name: str, density: float | None, one: Method, tables: Tensor) -> dict:
    """``tables [figures, L, H]`` as one row; the efficiency is the ratio of the means."""
    found = dict(zip(FIGURES, tables, strict=True))
    mean = {figure: float(table.mean()) for figure, table in found.items()}
    mean["error"], found["error"] = mean["error"] ** 0.5, found["error"].sqrt()
    mean["efficiency"], found["efficiency"] = mean["retained"] / mean["best"], found["retained"] / found["best"]
    told = {figure: [[round(x, 5) for x in line] for line in table.tolist()] for figure, table in found.items()}
    return {"method": name, "settings": one.settings(), "density_asked": density} | mean | {"tables": told}


def picture(row: dict) -> Image.Image:
    """The efficiency of every head, layers down, of one row of a result."""
    title = f"{row['method']}: retained mass relative to the best mask at density {row['density']:.3f}"
    legend = [
        f"mean: retained {row['retained']:.3f} of {row['best']:.3f} at best, efficiency {row['efficiency']:.3f}",
        f"best with the method's pairs in every row {row['best_by_row']:.3f}, "
        f"with row-major blocks {row['best_row_major']:.3f}; error {row['error']:.3f}",
    ]
    return heat_map(torch.tensor(row["tables"]["efficiency"]), title, legend=legend)
