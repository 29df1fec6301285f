"""Retained attention and output error of sparse masks, next to the best mask of the same cost.

A clip is generated densely, and methods are measured on some of its calls. The bounds are those of `upper_bounds`:
``best``, over the method's own blocks or clusters, which no choice among them can exceed, so that
``efficiency = retained / best`` is at most 1; ``best_by_row``, with the method's own number of pairs in every row;
``best_row_major``, over row-major blocks for every method, which another order or clusters can exceed. A correction
changes the output but not the retained attention, so it affects only the error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from dit_sparse import Method, PerHead, Schedule, SparseAttnProcessor, enable, prepare
from dit_sparse.bundled import BUNDLED, BUNDLED_PROMPT
from dit_sparse.composition import nested_methods
from dit_sparse.generation.checks import check_clip
from dit_sparse.generation.generate import Progress, default_call, generate, load_pipeline
from dit_sparse.methods import method, name_of
from dit_sparse.output.environment import conditions
from dit_sparse.plotting.plots import plot_heat_map
from dit_sparse.profiling.probe import measured_steps

from .mask_probe import METRICS, MaskProbe, MetricSums

Stage = Callable[[str], Progress]


@dataclass(frozen=True)
class MaskAnalysis:
    """Settings of an analysis. Everything but the model is checked at construction.

    Attributes:
        methods: names, compositions such as ``radial|sink``, or method objects.
        densities: each method is measured at each of them; None: at the method's own settings.
        prompts: one clip each, with seeds 0, 1, ...
        schedule: steps that it keeps dense are not measured.
        sampled_steps: number of the other steps to measure: the first, the last, and evenly spaced between.
        block: tokens in a block; None: 64 below 32,768 tokens, else 128.
        model: the bundled model, a local diffusers folder, or a name on the hub.
        call: arguments of the pipeline's call.

    Raises:
        ValueError: a value is unknown or out of range, a method depends on earlier calls, or the schedule keeps every
            step dense.
    """

    methods: Sequence[str | Method]
    densities: Sequence[float | None] = (0.25,)
    prompts: Sequence[str] = (BUNDLED_PROMPT,)
    schedule: Schedule = Schedule()  # noqa: RUF009
    sampled_steps: int = 3
    block: int | None = None
    model: str = BUNDLED
    call: dict = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.prompts:
            raise ValueError("no prompts given: name at least one")
        if not self.densities:
            raise ValueError("no densities given: name at least one")
        if self.sampled_steps < 1:
            raise ValueError(f"sampled_steps must be at least 1, got {self.sampled_steps}")
        SparseAttnProcessor("dense", block=self.block)
        self.cases()
        object.__setattr__(self, "call", default_call(self.model, small=True) | self.call)
        if steps := self.call.get("num_inference_steps"):
            measured_steps(self.schedule, steps, self.sampled_steps)
        for prompt in self.prompts:
            check_clip(prompt, 0, self.call, model=self.model)

    def cases(self) -> list[tuple[str, float | None, Method]]:
        """Return name, requested density and method of every row."""
        return [(name, d, one) for d in self.densities for name, one in methods_by_name(self.methods, d).items()]

    def run(self, stage: Stage) -> dict:
        """Generate the clips and return one row per method and density, as plain values for JSON.

        Args:
            stage: returns the progress callback of a named stage.

        Returns:
            The conditions and ``rows``. A row holds the mean of every metric over heads, batch items and calls, and
            ``tables``, the same by ``[layers][heads]``. Errors are root mean squares.

        Raises:
            ValueError: no call of the pipeline can be sparse.
        """
        pipe, cases, results = prepare(load_pipeline(self.model)), self.cases(), MetricSums()
        methods = tuple(one for *_, one in cases)
        probe = MaskProbe(methods=methods, results=results, schedule=self.schedule, sampled_steps=self.sampled_steps)
        with enable(pipe, probe, dense_steps=0, min_tokens=0, block=self.block):
            self._generate(pipe, stage("measuring masks"))
        if not results.calls:
            raise ValueError(f"no attention call of {self.model} can be sparse, so no mask was measured")
        return {
            "model": self.model,
            "prompts": list(self.prompts),
            "call": self.call,
            "schedule": asdict(self.schedule),
            "sampled_steps": self.sampled_steps,
            "grids": sorted(results.grids),
            "steps": sorted(results.steps),
            "blocks": sorted(results.blocks),
            "calls": sum(results.calls.values()),
            "rows": [_row(*case, tables) for case, tables in zip(cases, results.means(), strict=True)],
        } | conditions()

    def _generate(self, pipe: Any, progress: Progress) -> None:
        for number, prompt in enumerate(self.prompts):
            report = lambda done, steps, n=number: progress(n * steps + done, len(self.prompts) * steps)
            generate(pipe, prompt, number, self.call, report)


def methods_by_name(methods: Sequence[str | Method], density: float | None) -> dict[str, Method]:
    """Return methods by name, at one density; None: at their own settings.

    Raises:
        ValueError: no method, an unknown name, a name given twice, or a method that depends on earlier calls or on its
            layer.
    """
    by_name: dict[str, Method] = {}
    for name_or_method in methods:
        if isinstance(name_or_method, str):
            one = method(name_or_method, **({} if density is None else {"density": density}))
        else:
            one = name_or_method if density is None else replace(name_or_method, density=density)
        name = name_of(one)
        if any(part.reuses_outputs or isinstance(part, PerHead) for part in nested_methods(one)):
            raise ValueError(f"{name} cannot be measured on single calls: it depends on earlier calls or on its layer")
        if name in by_name:
            raise ValueError(f"{name} is given twice: rows are identified by the method's name")
        by_name[name] = one
    if not by_name:
        raise ValueError("no methods given: name at least one")
    return by_name


def _row(name: str, density: float | None, method: Method, tables: Tensor) -> dict:
    """Return one row from the means ``[metrics, L, H]``. The efficiency of a row is the ratio of its means."""
    by_metric = dict(zip(METRICS, tables, strict=True))
    means = {metric: float(table.mean()) for metric, table in by_metric.items()}
    means["error"], by_metric["error"] = means["error"] ** 0.5, by_metric["error"].sqrt()
    means["efficiency"] = means["retained"] / means["best"]
    by_metric["efficiency"] = by_metric["retained"] / by_metric["best"]
    rounded = {metric: [[round(x, 5) for x in line] for line in table.tolist()] for metric, table in by_metric.items()}
    return {"method": name, "settings": method.settings(), "density_asked": density} | means | {"tables": rounded}


def plot_efficiency(row: dict) -> Figure:
    """Return a heat map of one row's efficiency by layer and head."""
    title = f"{row['method']}: retained mass relative to the best mask at density {row['density']:.3f}"
    legend = [
        f"mean: retained {row['retained']:.3f}, upper bound {row['best']:.3f}, efficiency {row['efficiency']:.3f}",
        f"upper bound with the method's pairs per row {row['best_by_row']:.3f}, "
        f"with row-major blocks {row['best_row_major']:.3f}; output error {row['error']:.3f}",
    ]
    return plot_heat_map(row["tables"]["efficiency"], title, legend=legend)
