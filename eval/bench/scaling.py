"""What attention costs as videos grow longer: computed pairs, planning and seconds, frame by frame more, by method.

Methods that know the geometry alone are planned at any length. The others look at queries and keys made for this (see
`structured`), up to a number of tokens; what is longer is left out, and the result says so. Nothing
is extrapolated: an exponent is a fit to the lengths that it names.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from dit_sparse import ClusterPlan, Grid, Method, Plan, Site, SparseAttnProcessor, Top
from dit_sparse.eval.analysis.mask_analysis import named
from dit_sparse.generation.generate import Progress
from dit_sparse.kernels.pick import pick
from dit_sparse.method import AttentionOutput
from dit_sparse.output.environment import conditions
from dit_sparse.plotting.lines import log_log

from .attention import dense_attention, seconds_of
from .synthetic_qkv import structured

METHODS = ("dense", "window", "radial", "svg", "sparge", "xattention", "svg2")
FRAMES = (8, 16, 32, 64, 128)
MOST_TOKENS = {"cpu": 50_000, "cuda": 250_000}  # that methods look at
RATE_TOKENS = {"cpu": 2048, "cuda": 32_768}


@dataclass(frozen=True)
class Scaling:
    """What is measured; everything is checked before any work.

    Attributes:
        methods: names, compositions such as ``radial|sink``, or methods as values. Each at its own settings, which
            are a density where the method has nothing else that decides, and
        density: at this one, for comparison; None: not.
        frames: lengths, ascending.
        height, width, text: tokens of a frame, and beside the video.
        block: tokens in a block, the same at all lengths, so that exponents do not mix two.
        heads, dim: of the synthetic data.
        most_tokens: longest sequence for methods whose plans need more than the grid; None: 50,000 on a CPU, 250,000
            on a GPU.
        repeats: runs of which a median is taken.

    Raises:
        ValueError: anything unknown or out of range.
    """

    methods: Sequence[str | Method] = METHODS
    density: float | None = 0.25
    frames: Sequence[int] = FRAMES
    height: int = 30
    width: int = 52
    text: int = 0
    block: int = 128
    heads: int = 2
    dim: int = 64
    most_tokens: int | None = None
    repeats: int = 5

    def __post_init__(self) -> None:
        frames = list(self.frames)
        if len(frames) < 2 or frames != sorted(set(frames)) or min(frames) < 1:
            raise ValueError(f"frames are at least two lengths in ascending order, from 1, not {frames}")
        if min(self.heads, self.dim, self.repeats) < 1 or (self.most_tokens is not None and self.most_tokens < 1):
            given = f"{self.heads}, {self.dim}, {self.repeats} and {self.most_tokens}"
            raise ValueError(f"heads, dim, repeats and most_tokens are at least 1, not {given}")
        if self.density is not None:
            Top(self.density)
        SparseAttnProcessor("dense", block=self.block)
        least, tried = self._grid(frames[0]).tokens, self.tried()
        if least > self.limit and not any(one.static for *_, one in tried):
            raise ValueError(
                f"the shortest video has {least} tokens, over the limit of {self.limit}: nothing is measured"
            )

    @property
    def limit(self) -> int:
        """Tokens that methods look at, at most."""
        return self.most_tokens or MOST_TOKENS["cuda" if torch.cuda.is_available() else "cpu"]

    def tried(self) -> list[tuple[str, str, Method]]:
        """Name, "own" or "fixed" for its settings, and method. Dense has nothing to fix."""
        own = [(name, "own", one) for name, one in named(self.methods, None).items()]
        if self.density is None:
            return own
        fixed = named(self.methods, self.density).items()
        return own + [(name, "fixed", one) for name, one in fixed if name != "dense"]

    def run(self, progress: Progress) -> dict:
        """One row a length, method and setting, as plain values for JSON; ``progress(done, total)`` is told.

        ``pairs`` is the mean over the heads, ``flops`` those of all heads: 4 * dim a pair, as the two products of
        attention have it. ``planning_seconds`` are those of a method's first plan at a length; what several methods
        share there, orders and blocks that are always kept, only the first of them made. ``modelled_seconds`` adds to
        them the flops at the rate at which this machine runs dense attention; ``seconds`` are measured, of attention by
        the executor that `auto` takes and the method's correction, without planning. Where nothing was measured, it is
        None and ``why_not`` says why.
        """
        device = "cuda" if torch.cuda.is_available() else "cpu"
        limit, tried = self.limit, self.tried()
        rate, rows, left_out = dense_rate(self.heads, self.dim, device), [], []
        for number, frames in enumerate(self.frames):
            grid = self._grid(frames)
            tensors = self._tensors(grid, device, grid.tokens <= limit)
            for place, (name, setting, one) in enumerate(tried):
                case = {"method": name, "setting": setting, "frames": frames, "tokens": grid.tokens}
                if one.static or grid.tokens <= limit:
                    rows.append(case | self._measured(one, grid, tensors, rate))
                else:
                    why = f"its plan needs more than the grid, and {grid.tokens} tokens are over the limit of {limit}"
                    left_out.append(case | {"why": why})
                progress(number * len(tried) + place + 1, len(tried) * len(self.frames))
        told = self._told(tried) | {"most_tokens": limit, "flops_per_second": rate, "rows": rows}
        return told | {"left_out": left_out, "exponents": exponents(rows)} | conditions(device)

    def _grid(self, frames: int) -> Grid:
        return Grid(frames, self.height, self.width, after=self.text)

    def _tensors(self, grid: Grid, device: str, measured_steps: bool) -> list[Tensor]:
        """Queries, keys and values; without memory where nobody looks at what they hold."""
        if measured_steps or device == "cuda":
            return structured(grid, self.heads, self.dim, device)
        return [torch.zeros(1).expand(1, self.heads, grid.tokens, self.dim)] * 3

    def _told(self, tried: Sequence[tuple[str, str, Method]]) -> dict:
        return {
            "frame": f"{self.height}x{self.width}",
            "text": self.text,
            "density_fixed": self.density,
            "block": self.block,
            "heads": self.heads,
            "head_dim": self.dim,
            "settings": {name: one.settings() for name, setting, one in tried if setting == "own"},
        }

    @torch.no_grad()
    def _measured(self, one: Method, grid: Grid, tensors: list[Tensor], rate: float) -> dict:
        (q, k, _), site, memory = tensors, Site(grid, self.block), {}
        _finish(q)
        begin = time.perf_counter()
        plan = one.plan(q, k, site, memory)
        _finish(q)
        planning = 0.0 if plan is None else time.perf_counter() - begin
        density = 1.0 if plan is None else plan.density
        pairs = density * grid.tokens**2
        flops = 4 * self.dim * self.heads * pairs
        seconds, why_not = None, "there is no CUDA GPU here"
        if q.is_cuda:
            seconds, why_not = timed(one, plan, tensors, site, memory, self.repeats)
        return {
            "density": density,
            "pairs": pairs,
            "flops": flops,
            "planning_seconds": planning,
            "modelled_seconds": planning + flops / rate,
            "seconds": seconds,
            "why_not": why_not,
        }


def timed(
    one: Method, plan: Plan | ClusterPlan | None, tensors: list[Tensor], site: Site, memory: dict, repeats: int
) -> tuple[float | None, str | None]:
    """Median seconds of one attention call by a plan (None: dense, the fastest there is), or None and why."""
    q, k, v = tensors
    try:
        calls = dense_attention(q, k, v).values() if plan is None else [_call(one, plan, tensors, site, memory)]
        medians = []
        for call in calls:
            call()
            medians.append(statistics.median(seconds_of(call, q.device.type) for _ in range(repeats)))
        return min(medians), None
    except RuntimeError as error:  # nobody can compute it, or it does not fit into memory: one row has no time
        return None, (str(error).strip() or type(error).__name__).splitlines()[0]


def _call(one: Method, plan: Plan | ClusterPlan, tensors: list[Tensor], site: Site, memory: dict) -> Callable:
    q, k, v = tensors
    attend = partial(pick("auto", q, k, plan, lse=one.needs_lse).executor.attend, q, k, v)
    dense = lambda: attend(plan=plan.full())
    return lambda: one.correct(AttentionOutput(q, k, v, plan, None, *attend(plan=plan), dense), site, memory)


def dense_rate(heads: int, dim: int, device: str) -> float:
    """Flops a second of dense attention here, at a length where it is busy."""
    tokens = RATE_TOKENS[device]
    q = torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    call = partial(F.scaled_dot_product_attention, q, q, q)
    call()
    return 4 * dim * heads * tokens**2 / statistics.median(seconds_of(call, device) for _ in range(3))


def exponents(rows: Sequence[dict]) -> dict:
    """``exponents[method][setting]``: that of the pairs against the tokens, over the lengths that there are."""
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        series.setdefault((row["method"], row["setting"]), []).append(row)
    found: dict[str, dict] = {}
    for (name, setting), own in series.items():
        found.setdefault(name, {})[setting] = fitted([r["tokens"] for r in own], [r["pairs"] for r in own])
    return found


def fitted(tokens: Sequence[float], pairs: Sequence[float]) -> dict:
    """Least squares of log pairs against log tokens: the slope, and its standard error where there are three points or
    more. One point has no slope."""
    told = {"exponent": None, "standard_error": None, "points": len(tokens), "tokens": [min(tokens), max(tokens)]}
    if len(tokens) < 2:
        return told
    x, y = ([math.log(value) for value in values] for values in (tokens, pairs))
    slope, start = statistics.linear_regression(x, y)
    told["exponent"] = slope
    if len(x) > 2:
        wrong = sum((b - start - slope * a) ** 2 for a, b in zip(x, y, strict=True))
        spread = sum((a - statistics.fmean(x)) ** 2 for a in x)
        told["standard_error"] = (wrong / (len(x) - 2) / spread) ** 0.5
    return told


def picture(result: dict, what: str, setting: str) -> Image.Image:
    """``density``, ``pairs``, or a kind of seconds, against tokens: a line a method, with the exponent of its pairs.
    Dense is in both settings.

    Raises:
        ValueError: nothing of that was measured.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row[what] and (row["setting"] == setting or row["method"] == "dense"):
            lines.setdefault(row["method"], []).append((row["tokens"], row[what]))
    slope = lambda name: result["exponents"][name].get(setting) or result["exponents"][name]["own"]
    told = lambda fit: "" if fit["exponent"] is None else f"   n^{fit['exponent']:.2f}"
    how = "at its own settings" if setting == "own" else f"at density {result['density_fixed']}"
    labels = {
        "pairs": "computed pairs of a head",
        "density": "share of the pairs that is computed",
        "modelled_seconds": "seconds of a plan and one call, modelled",
    }
    y_label = labels.get(what, what.replace("_", " "))
    title = f"{y_label[0].upper()}{y_label[1:]} as videos grow longer"
    subtitle = f"frames of {result['frame']} tokens, every method {how}; n^ is the fitted exponent of its pairs"
    if result["left_out"]:
        subtitle += "; lines that end early: left out beyond"
    return log_log({f"{name}{told(slope(name))}": lines[name] for name in lines}, title, subtitle, "tokens", y_label)


def _finish(x: Tensor) -> None:
    if x.is_cuda:
        torch.cuda.synchronize()
