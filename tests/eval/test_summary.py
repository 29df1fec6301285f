"""Summaries of a row: sums over clips, densities, and the gain over random blocks."""

from __future__ import annotations

import math
from types import SimpleNamespace

import numpy as np
import pytest

from dit_sparse import SparseAttnProcessor
from dit_sparse.eval.comparison import summary
from dit_sparse.eval.comparison.clip_spec import ClipSpec
from dit_sparse.eval.comparison.clip_store import ClipRecord

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
SPEC = ClipSpec("x", "x", 0.3, SparseAttnProcessor("svg", density=0.3))


def metadata(seconds, attention, planning=0.0, achieved=None, run=1.0, steps=4) -> dict:
    return {
        "seconds": seconds,
        "attention_seconds": attention,
        "planning_seconds": planning,
        "steps": steps,
        "density_achieved": achieved,
        "density_run": run,
        "mass": [],
        "latent_error": [],
        "settings": {},
        "executors": {},
        "grids": ["1x2x3"],
        "prompt": "a",
    }


def summarize(*pairs: tuple[ClipRecord, ClipRecord]) -> dict:
    return summary.summarize_row(SPEC, SimpleNamespace(model="shapes-wan", seeds=1, clip_pairs=lambda _: iter(pairs)))


def test_costs_are_sums_and_densities_are_means_of_the_clips():
    runs = [
        (metadata(4, 1, 0.25, 0.3, 0.5), metadata(10, 5)),
        (metadata(6, 3, 0.75, 0.34, 0.7), metadata(20, 7)),
    ]
    row = summarize(*((ClipRecord(FRAMES + 2, sparse), ClipRecord(FRAMES, dense)) for sparse, dense in runs))
    assert (row["seconds"], row["attention_seconds"]) == (10, 4)
    assert (row["speedup"], row["attention_speedup"], row["planning_share"]) == (3, 3, 0.25)
    assert row["density_achieved"] == pytest.approx(0.32) and row["density_run"] == pytest.approx(0.6)
    assert row["density_hit"] is False and row["psnr"]["mean"] == pytest.approx(20 * math.log10(255 / 2))


def test_run_density_is_relative_to_the_full_dense_run():
    row = summarize((ClipRecord(FRAMES, metadata(4, 2, steps=3)), ClipRecord(FRAMES, metadata(5, 3))))
    assert row["density_run"] == 0.75 and row["steps"] == 3


def test_seeds_of_a_prompt_are_averaged():
    values = [1.0, 3.0, 10.0, 20.0, 5.0, 5.0]
    assert summary._by_prompt(values, 2).tolist() == [2, 15, 5]
    assert summary._by_prompt(values, 3).tolist() == [14 / 3, 10]


def row(method, psnr, asked=None, achieved=None) -> dict:
    statistics = psnr and {"each": psnr}
    return {"method": method, "density_asked": asked, "density_achieved": achieved, "psnr": statistics}


def test_gain_is_over_random_blocks_of_the_same_density():
    baselines = [row("random_blocks", [10.0, 12.0], 0.25), row("random_blocks", [20.0, 20.0], 0.26)]
    gain = lambda one: summary.gain_over_random(one, [row("dense", None), *baselines, one], 1)
    assert gain(row("svg", [13.0, 14.0], 0.25, 0.5)) == {"mean": 2.5, "interval": [2, 3]}
    assert gain(row("svg", [13.0, 14.0], 0.2501))["mean"] == 2.5
    assert gain(row("profile:x", [21.0, 22.0], None, 0.262))["mean"] == 1.5
    assert gain(row("profile:x", [21.0, 22.0], None, 0.28)) is None
    assert gain(baselines[0])["mean"] == 0
    assert gain(row("dense", [13.0, 14.0])) is None
    no_density = row("svg", [13.0, 14.0])
    assert summary.gain_over_random(no_density, [row("random_blocks", [1.0, 1.0]), no_density], 1) is None
