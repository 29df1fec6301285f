"""Benchmark of attention cost against video length: computed pairs, planning time and attention time of each method.

Static methods, which depend on the grid alone, are planned at any length. The others plan on synthetic queries and keys
(`synthetic_qkv`), up to a maximum number of tokens; the result lists the lengths that were skipped. Nothing is
extrapolated: an exponent is fitted to the lengths that it names.
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
from matplotlib.figure import Figure
from torch import Tensor

from dit_sparse import ClusterPlan, Grid, Method, Plan, Site, SparseAttnProcessor, Top
from dit_sparse.eval.analysis.mask_analysis import methods_by_name
from dit_sparse.generation.generate import Progress
from dit_sparse.kernels.pick import pick
from dit_sparse.method import AttentionOutput
from dit_sparse.output.environment import conditions
from dit_sparse.plotting.plots import plot_scaling

from .attention import dense_attention
from .synthetic_qkv import synthetic_qkv
from .timing import first_line, median_seconds, synchronize

METHODS = ("dense", "window", "radial", "svg", "sparge", "xattention", "svg2")
FRAMES = (8, 16, 32, 64, 128)
MAX_TOKENS = {"cpu": 50_000, "cuda": 250_000}  # of methods that are not static
RATE_TOKENS = {"cpu": 2048, "cuda": 32_768}  # long enough to keep the device busy


@dataclass(frozen=True)
class Scaling:
    """Settings of the benchmark. Everything is checked at construction.

    Attributes:
        methods: names, compositions such as ``radial|sink``, or method objects, each measured at its own settings.
        density: each method is measured at this density as well; None: only at its own settings.
        frames: video lengths in latent frames, ascending.
        height, width: tokens of a frame.
        text: text tokens after the video.
        block: tokens in a block, the same at all lengths, so that exponents are comparable.
        heads, dim: attention heads and head_dim of the synthetic data.
        max_tokens: longest sequence for methods that are not static; None: 50,000 on a CPU, 250,000 on a GPU.
        repeats: runs that a median is taken of.

    Raises:
        ValueError: a value is unknown or out of range.
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
    max_tokens: int | None = None
    repeats: int = 5

    def __post_init__(self) -> None:
        frames = list(self.frames)
        if len(frames) < 2 or frames != sorted(set(frames)) or min(frames) < 1:
            raise ValueError(f"frames must be at least two lengths in ascending order, each at least 1, got {frames}")
        for name in ("heads", "dim", "repeats", "max_tokens"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.density is not None:
            Top(self.density)
        SparseAttnProcessor("dense", block=self.block)
        shortest, cases = self._grid(frames[0]).tokens, self.cases()
        if shortest > self.token_limit and not any(method.static for *_, method in cases):
            raise ValueError(
                f"the shortest video has {shortest} tokens and max_tokens is {self.token_limit}: nothing is measured"
            )

    @property
    def token_limit(self) -> int:
        """``max_tokens`` or its default on this device."""
        return self.max_tokens or MAX_TOKENS[_device()]

    def cases(self) -> list[tuple[str, str, Method]]:
        """Return name, setting (``"own"`` or ``"fixed"``) and method. Dense attention has no density to fix."""
        own = [(name, "own", method) for name, method in methods_by_name(self.methods, None).items()]
        if self.density is None:
            return own
        fixed = methods_by_name(self.methods, self.density).items()
        return own + [(name, "fixed", method) for name, method in fixed if name != "dense"]

    def run(self, progress: Progress) -> dict:
        """Measure every length, method and setting.

        Args:
            progress: called as ``progress(rows_done, rows_total)``.

        Returns:
            Plain values for JSON, with one row per length, method and setting:

            - ``pairs``: computed token pairs, the mean over the heads.
            - ``flops``: of all heads, 4 * dim per pair for the two matrix products.
            - ``planning_seconds``: of a method's first plan at this length. Orders and required blocks are cached, so
              only the first method that uses them computes them.
            - ``modelled_seconds``: planning plus the FLOPs at this machine's rate of dense attention.
            - ``seconds``: measured attention with the executor that ``auto`` selects and the method's correction,
              without planning; None if it was not measured, with the reason in ``why_not``.
        """
        device, cases, limit = _device(), self.cases(), self.token_limit
        rate, rows, skipped = dense_flops_per_second(self.heads, self.dim, device), [], []
        for number, frames in enumerate(self.frames):
            grid = self._grid(frames)
            tensors = self._tensors(grid, device, fill=device == "cuda" or grid.tokens <= limit)
            for place, (name, setting, method) in enumerate(cases):
                case = {"method": name, "setting": setting, "frames": frames, "tokens": grid.tokens}
                if method.static or grid.tokens <= limit:
                    rows.append(case | self._measure(method, grid, tensors, rate))
                else:
                    skipped.append(case | {"why": f"{grid.tokens} tokens are over the limit of {limit}"})
                progress(number * len(cases) + place + 1, len(cases) * len(self.frames))
        result = self._settings(cases) | {"most_tokens": limit, "flops_per_second": rate, "rows": rows}
        return result | {"left_out": skipped, "exponents": fit_exponents(rows)} | conditions(device)

    def _grid(self, frames: int) -> Grid:
        return Grid(frames, self.height, self.width, after=self.text)

    def _tensors(self, grid: Grid, device: str, fill: bool) -> list[Tensor]:
        """Return q, k and v; unless ``fill``, zeros of the right shape that take no memory."""
        if fill:
            return synthetic_qkv(grid, self.heads, self.dim, device)
        return [torch.zeros(1).expand(1, self.heads, grid.tokens, self.dim)] * 3

    def _settings(self, cases: Sequence[tuple[str, str, Method]]) -> dict:
        return {
            "frame": f"{self.height}x{self.width}",
            "text": self.text,
            "density_fixed": self.density,
            "block": self.block,
            "heads": self.heads,
            "head_dim": self.dim,
            "settings": {name: method.settings() for name, setting, method in cases if setting == "own"},
        }

    @torch.no_grad()
    def _measure(self, method: Method, grid: Grid, tensors: list[Tensor], rate: float) -> dict:
        (q, k, v), site, memory = tensors, Site(grid, self.block), {}
        synchronize(q.device.type)
        begin = time.perf_counter()
        plan = method.plan(q, k, v, site, memory)
        synchronize(q.device.type)
        planning = 0.0 if plan is None else time.perf_counter() - begin
        density = 1.0 if plan is None else plan.density
        pairs = density * grid.tokens**2
        flops = 4 * self.dim * self.heads * pairs
        seconds, why_not = None, "there is no CUDA GPU here"
        if q.is_cuda:
            seconds, why_not = attention_seconds(method, plan, tensors, site, memory, self.repeats)
        return {
            "density": density,
            "pairs": pairs,
            "flops": flops,
            "planning_seconds": planning,
            "modelled_seconds": planning + flops / rate,
            "seconds": seconds,
            "why_not": why_not,
        }


def attention_seconds(
    method: Method, plan: Plan | ClusterPlan | None, tensors: list[Tensor], site: Site, memory: dict, repeats: int
) -> tuple[float | None, str | None]:
    """Return the median seconds of one attention call, and None; or None and the reason why it cannot run.

    Without a plan the call is dense, by the fastest backend.
    """
    q, k, v = tensors
    try:
        if plan is None:
            calls = list(dense_attention(q, k, v).values())
        else:
            calls = [_attention_call(method, plan, tensors, site, memory)]
        for call in calls:
            call()
        return min(median_seconds(call, q.device.type, repeats) for call in calls), None
    except RuntimeError as error:  # no executor qualifies, or the call does not fit into memory
        return None, first_line(error)


def _attention_call(
    method: Method, plan: Plan | ClusterPlan, tensors: list[Tensor], site: Site, memory: dict
) -> Callable[[], tuple[Tensor, Tensor | None]]:
    q, k, v = tensors
    attend = partial(pick("auto", q, k, plan, lse=method.needs_lse).executor.attend, q, k, v)
    dense = lambda: attend(plan=plan.full())
    return lambda: method.correct(AttentionOutput(q, k, v, plan, None, *attend(plan=plan), dense), site, memory)


def dense_flops_per_second(heads: int, dim: int, device: str) -> float:
    """Return the FLOP/s of dense attention on this device, at a length that keeps it busy."""
    tokens = RATE_TOKENS[device]
    q = torch.randn(1, heads, tokens, dim, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)
    call = partial(F.scaled_dot_product_attention, q, q, q)
    call()
    return 4 * dim * heads * tokens**2 / median_seconds(call, device, 3)


def fit_exponents(rows: Sequence[dict]) -> dict:
    """Return the fitted exponent of pairs against tokens, as ``exponents[method][setting]``."""
    series: dict[tuple[str, str], list[dict]] = {}
    for row in rows:
        series.setdefault((row["method"], row["setting"]), []).append(row)
    exponents: dict[str, dict] = {}
    for (name, setting), own in series.items():
        fit = fit_power_law([row["tokens"] for row in own], [row["pairs"] for row in own])
        exponents.setdefault(name, {})[setting] = fit
    return exponents


def fit_power_law(tokens: Sequence[float], pairs: Sequence[float]) -> dict:
    """Fit log pairs against log tokens by least squares: the exponent, and with three points its standard error."""
    fit = {"exponent": None, "standard_error": None, "points": len(tokens), "tokens": [min(tokens), max(tokens)]}
    if len(tokens) < 2:
        return fit
    x, y = ([math.log(value) for value in values] for values in (tokens, pairs))
    fit["exponent"], intercept = statistics.linear_regression(x, y)
    if len(x) > 2:
        residuals = sum((b - intercept - fit["exponent"] * a) ** 2 for a, b in zip(x, y, strict=True))
        deviations = sum((a - statistics.fmean(x)) ** 2 for a in x)
        fit["standard_error"] = (residuals / (len(x) - 2) / deviations) ** 0.5
    return fit


def plot_cost(result: dict, key: str, setting: str) -> Figure:
    """Return a chart of one value of the rows against tokens, one line per method with the exponent of its pairs.

    Args:
        result: what `Scaling.run` returned.
        key: ``density``, ``pairs``, or a kind of seconds.
        setting: ``"own"`` or ``"fixed"``; dense attention is in both.

    Raises:
        ValueError: no row has the value.
    """
    lines: dict[str, list[tuple[float, float]]] = {}
    for row in result["rows"]:
        if row[key] and (row["setting"] == setting or row["method"] == "dense"):
            fits = result["exponents"][row["method"]]
            exponent = (fits.get(setting) or fits["own"])["exponent"]
            label = row["method"] + ("" if exponent is None else f"   n^{exponent:.2f}")
            lines.setdefault(label, []).append((row["tokens"], row[key]))
    settings = "its own settings" if setting == "own" else f"density {result['density_fixed']}"
    labels = {
        "pairs": "computed pairs per head",
        "density": "density",
        "modelled_seconds": "modelled seconds of one plan and one call",
    }
    y_label = labels.get(key, key.replace("_", " "))
    title = f"{y_label[0].upper()}{y_label[1:]} against video length"
    subtitle = f"frames of {result['frame']} tokens, each method at {settings}; n^ is the exponent of its pairs"
    if result["left_out"]:
        subtitle += "; longer videos were skipped where a line ends early"
    return plot_scaling(lines, title, subtitle, "tokens", y_label)


def _device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"
