"""Reports, and the repr, plot and HTML of a run."""

from __future__ import annotations

import inspect
import json
import re

import pytest
import torch
from matplotlib.text import Text

import dit_sparse as ds
from sparse_pipelines import (
    calls_per_step,
    count_layers,
    enable_sparse,
    expected_grids,
    generate,
    generate_dense,
    generate_sparse,
)


@pytest.mark.parametrize("method", ["radial", "window", "random_blocks"])
def test_density_1_equals_dense(stock, method):
    plain = generate_dense(stock.name)
    torch.testing.assert_close(generate_sparse(stock, method, density=1.0), plain, rtol=0, atol=2e-5)


def test_report_counts_calls_and_density(stock):
    pairs = []
    with enable_sparse(stock, density=0.3) as run:
        run.observe(lambda site, q, k, plan: pairs.append((q.shape[0] * site.grid.tokens**2, plan.density)))
        out = generate(stock)
        report = run.report()
    assert out.isfinite().all() and (out - generate_dense(stock.name)).abs().max() > 0.1
    assert report.sparse_calls == len(pairs) == 3 * calls_per_step(stock)
    assert report.dense_calls == {"the schedule": calls_per_step(stock)}
    assert report.executors == {"gather": report.sparse_calls}
    assert set(report.grids) == {str(grid) for grid in expected_grids(stock)}
    achieved = sum(n * density for n, density in pairs) / sum(n for n, _ in pairs)
    assert report.density_achieved == pytest.approx(achieved)
    assert report.density_run == pytest.approx((1 + 3 * achieved) / 4)
    assert report.density_asked == 0.3
    assert 0.29 < achieved < (0.45 if stock.side == "after" else 0.301)  # text is always kept
    assert report.attention_seconds > report.planning_seconds > 0


def test_dense_layers_stay_dense(stock):
    with enable_sparse(stock, density=0.3, dense_layers=1) as run:
        generate(stock)
    per_layer = calls_per_step(stock) // count_layers(stock)
    assert run.report().sparse_calls == 3 * per_layer * (count_layers(stock) - 1)
    assert run.report().dense_calls == {"the schedule": calls_per_step(stock) + 3 * per_layer}


def test_report_as_text_and_json(wan):
    with enable_sparse(wan, density=0.3) as run:
        assert str(run.report()).splitlines()[:2] == [
            "radial: density requested 0.300, achieved -, whole run -",
            "  grid             -",
        ]
        generate(wan)
    report = run.report()
    assert str(report).splitlines()[:4] == [
        f"radial: density requested 0.300, achieved {report.density_achieved:.3f}, whole run {report.density_run:.3f}",
        "  grid             5x5x7",
        "  sparse calls     12: 12 by gather",
        "  dense calls      4: the schedule",
    ]
    assert "attention time" in str(report) and "planning time" in str(report)
    assert json.loads(json.dumps(report.as_dict()))["settings"]["decay"] == ds.METHODS["radial"]().decay


def test_report_names_the_settings_that_the_density_is_solved_to(wan):
    with enable_sparse(wan, "cached(radial)", density=0.4) as run:
        generate(wan)
    report = run.report()
    (text,) = report.resolved.values()
    assert text == ds.methods.name_of(run._settings.method.resolve(ds.Grid(5, 5, 7), 16)) != "cached(radial)"
    assert f"  settings         {text} on 5x5x7" in str(report)
    assert report.density_note is None or report.density_note in str(report)
    with enable_sparse(wan, "svg2", density=0.4) as run:
        generate(wan)
    assert run.report().resolved == {}


@pytest.mark.parametrize(
    "method, density, words",
    [
        ("radial", 0.01, "what every row keeps, such as text and its own block, is"),
        ("rettention", 0.4, "refreshes compute all pairs"),
        ("vdit.skip", 0.9, "skipped heads compute only text and the diagonal"),
    ],
)
def test_report_names_why_the_density_is_not_met(wan, method, density, words):
    with enable_sparse(wan, method, density=density) as run:
        generate(wan)
    assert run.report().density_note.startswith(words) and words in str(run.report())


def test_repr_is_one_line(wan):
    with enable_sparse(wan, density=0.25) as run:
        assert repr(run) == "Run(WanPipeline, radial, density 0.25, active)"
        steps = []
        run.observe(lambda site, q, k, plan: steps.append(repr(run)))
        generate(wan)
    assert steps[0] == "Run(WanPipeline, radial, density 0.25, step 1/4, active)"
    assert repr(run) == "Run(WanPipeline, radial, density 0.25, disabled)"
    processor = ds.SparseAttnProcessor("radial", density=0.25, executor="gather")
    assert repr(processor) == (
        "SparseAttnProcessor(radial, density 0.25, dense_steps 0.25, dense_layers 0, executor gather)"
    )


def test_plot_shows_the_last_plan_of_an_active_run(wan):
    with enable_sparse(wan, density=0.3) as run:
        with pytest.raises(RuntimeError, match="no sparse call was made yet"):
            run.plot()
        assert "<svg" not in run._repr_html_()
        generate(wan)
        assert any("radial, layer 1, step 3" in text.get_text() for text in run.plot().findobj(Text))
        assert "<svg" in run._repr_html_() and "attention time" in run._repr_html_()
    with pytest.raises(RuntimeError, match="the run is disabled"):
        run.plot()
    assert "<svg" not in run._repr_html_()


def test_help_documents_every_argument():
    for function in (ds.enable, ds.SparseAttnProcessor):
        documented = set(re.findall(r"^ {4}(\w+): ", inspect.getdoc(function), re.MULTILINE))
        assert documented >= set(inspect.signature(function).parameters)
