"""`bench scaling`: exponents, synthetic data, skipped lengths, and the chart."""

import json
import math
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from matplotlib.text import Text

from attention_cases import exact, relative_rms, token_mask
from dit_sparse import Grid, Pattern, Site
from dit_sparse.eval.bench import scaling
from dit_sparse.eval.bench.scaling import Scaling, fit_power_law
from dit_sparse.eval.bench.synthetic_qkv import synthetic_qkv
from dit_sparse.methods import method, name_of


@dataclass(frozen=True, kw_only=True)
class FixedWindow(Pattern):
    """A window of a fixed number of blocks."""

    knob: ClassVar[str] = "blocks"
    knob_range: ClassVar[tuple[float, float]] = (1e-3, 1e6)
    blocks: float = 2

    def keep(self, grid, block):
        index = torch.arange(-(-grid.tokens // block))
        return (index[:, None] - index).abs() <= self.blocks


FIXED = name_of(FixedWindow())
SMALL = dict(height=8, width=12, block=32, heads=2, dim=16)


@pytest.fixture(scope="module")
def result():
    progress = []
    methods = ("dense", FixedWindow(), "radial", "sink", "window", "svg", "sparge", "svg2")
    benchmark = Scaling(methods, 0.25, (8, 16, 32, 64, 128), max_tokens=3200, **SMALL)
    result = benchmark.run(lambda *counts: progress.append(counts))
    assert progress == [(i + 1, 75) for i in range(75)]
    return result


def test_exponents_agree_with_theory(result):
    exponent = lambda name, setting="own": result["exponents"][name][setting]["exponent"]
    assert exponent("dense") == pytest.approx(2, abs=1e-6)
    assert exponent(FIXED) == pytest.approx(1, abs=0.03) and exponent("sink") == pytest.approx(1, abs=0.05)
    assert 1 < exponent("radial") < 1.8
    for name in (FIXED, "radial", "sink", "window", "svg"):
        assert exponent(name, "fixed") == pytest.approx(2, abs=0.02), name
    for name in ("sparge", "svg2"):  # their rows keep a whole number of blocks, of few
        assert exponent(name, "fixed") == pytest.approx(2, abs=0.1), name
    assert "fixed" not in result["exponents"]["dense"]


def test_rows_count_the_planned_pairs(result):
    for row in result["rows"]:
        assert row["tokens"] == row["frames"] * 96
        assert row["pairs"] == pytest.approx(row["density"] * row["tokens"] ** 2)
        assert row["flops"] == pytest.approx(4 * 16 * 2 * row["pairs"])
        modelled = row["planning_seconds"] + row["flops"] / result["flops_per_second"]
        assert row["modelled_seconds"] == pytest.approx(modelled) and row["planning_seconds"] >= 0
        assert (row["seconds"] is None) == (row["why_not"] is not None)
        if not torch.cuda.is_available():
            assert row["why_not"] == "there is no CUDA GPU here"
    grid = Grid(16, 8, 12)
    row = next(r for r in result["rows"] if (r["method"], r["setting"], r["frames"]) == ("radial", "own", 16))
    mask = token_mask(method("radial").plan(torch.zeros(1, 1, 1, 1), None, None, Site(grid, 32), {}), 1, 1)
    assert row["pairs"] == pytest.approx(int(mask.sum()))


def test_skipped_lengths_are_listed(result):
    skipped = {(one["method"], one["setting"], one["frames"]) for one in result["left_out"]}
    assert skipped == {(m, s, f) for m in ("svg", "sparge", "svg2") for s in ("own", "fixed") for f in (64, 128)}
    assert all("over the limit of 3200" in one["why"] for one in result["left_out"])
    assert result["exponents"]["svg"]["own"]["tokens"] == [768, 3072]
    assert result["exponents"]["radial"]["own"]["tokens"] == [768, 12288]
    assert set(["device", "versions", "commit"]) <= set(result) and json.loads(json.dumps(result)) == result


def test_fit_is_least_squares():
    """Compared with the normal equations and the standard error of a regression slope."""
    tokens, noise = [100, 300, 500, 2000, 9000], [0.1, -0.2, 0.05, 0.15, -0.1]
    pairs = [7 * n**1.5 * math.exp(e) for n, e in zip(tokens, noise, strict=True)]
    x = torch.tensor([[1, math.log(n)] for n in tokens], dtype=torch.float64)
    y = torch.tensor(pairs, dtype=torch.float64).log()
    solved = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
    covariance = (y - x @ solved).square().sum() / 3 * torch.linalg.inv(x.T @ x)
    fit = fit_power_law(tokens, pairs)
    assert fit["exponent"] == pytest.approx(float(solved[1])) and fit["points"] == 5
    assert fit["standard_error"] == pytest.approx(float(covariance[1, 1].sqrt()))
    assert fit_power_law([5], [7])["exponent"] is None
    two = fit_power_law([10, 100], [10, 1000])
    assert two["exponent"] == pytest.approx(2) and two["standard_error"] is None


def test_synthetic_heads_are_wide_in_space_or_in_time():
    grid = Grid(12, 10, 10, after=5)
    q, k, v = synthetic_qkv(grid, heads=2, dim=64)
    assert q.shape == k.shape == v.shape == (1, 2, grid.tokens, 64)
    assert all(x.equal(same) for x, same in zip((q, k, v), synthetic_qkv(grid, 2, 64), strict=True))
    weights = (q @ k.mT / 8).softmax(-1)[0, :, : grid.video, : grid.video]
    frame = grid.coordinates()[0][: grid.video]
    within = (weights * (frame[:, None] == frame)).sum(-1).mean(-1)
    assert within[0] > 0.4 > 0.2 > within[1], "one head stays in its frame, the other does not"


def test_the_timed_call_computes_attention():
    """The call that is timed on a GPU, on the device of the tests."""
    grid, one = Grid(4, 8, 12, after=7), method("window", density=0.4)
    tensors = synthetic_qkv(grid, 2, 16)
    site = Site(grid, 32)
    plan = one.plan(tensors[0], tensors[1], tensors[1], site, {})
    for timed_plan in (plan, None):
        seconds, why_not = scaling.attention_seconds(one, timed_plan, tensors, site, {}, 2)
        assert seconds > 0 and why_not is None
    out, _ = scaling._attention_call(one, plan, tensors, site, {})()
    assert relative_rms(out, exact(*tensors, token_mask(plan, 1, 2))[0]) < 1e-4


def test_calls_that_fail_have_a_reason(monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("out of memory\nmore words")

    monkeypatch.setattr(scaling, "pick", fails)
    grid = Grid(2, 4, 4)
    one, tensors = method("radial"), synthetic_qkv(grid, 1, 16)
    plan = one.plan(tensors[0], tensors[1], tensors[1], Site(grid, 16), {})
    assert scaling.attention_seconds(one, plan, tensors, Site(grid, 16), {}, 1) == (None, "out of memory")


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(methods=["nope"]), "no method 'nope'"),
        (dict(methods=[]), "no methods given"),
        (dict(methods=["radial", "radial"]), "twice"),
        (dict(methods=["rettention"]), "single calls"),
        (dict(frames=[8]), "ascending order"),
        (dict(frames=[16, 8]), "ascending order"),
        (dict(frames=[0, 8]), "ascending order"),
        (dict(density=2.0), "density must be in"),
        (dict(height=0), "at least 1x1x1"),
        (dict(text=-1), "no negative text"),
        (dict(block=17), "multiple of 16"),
        (dict(heads=0), "heads must be at least 1, got 0"),
        (dict(max_tokens=0), "max_tokens must be at least 1, got 0"),
        (dict(methods=["svg", "sparge"], max_tokens=1), "the shortest video has 12480 tokens"),
    ],
)
def test_invalid_settings_raise(settings, message):
    with pytest.raises(ValueError, match=message) as error:
        Scaling(**settings)
    assert "\n" not in str(error.value)


def test_chart_names_every_method_with_its_exponent(result):
    for key, setting in (("density", "own"), ("modelled_seconds", "fixed")):
        figure = scaling.plot_cost(result, key, setting)
        texts = " ".join(text.get_text() for text in figure.findobj(Text))
        for name, fits in result["exponents"].items():
            exponent = (fits.get(setting) or fits["own"])["exponent"]
            assert f"{name}   n^{exponent:.2f}" in texts
    with pytest.raises(ValueError, match="at least one point"):
        scaling.plot_cost(result | {"rows": [row | {"pairs": 0} for row in result["rows"]]}, "pairs", "own")
