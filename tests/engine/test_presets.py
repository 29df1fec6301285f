"""Presets: the default one, the schedules of papers by class of the transformer, and their names in the report."""

from __future__ import annotations

import pytest

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.notation.presets import DEFAULT_PRESET, PRESETS
from dit_sparse.pipelines.family import all_families

DEFAULT = ds.Schedule()


@pytest.fixture(scope="module")
def hunyuan():
    return tiny.hunyuan_video().pipe


@pytest.fixture(scope="module")
def mochi():
    return tiny.mochi().pipe


def report(pipe, *arguments, **settings):
    with ds.enable(pipe, *arguments, **settings) as run:
        return run.report()


def test_the_default_is_a_preset_and_the_report_names_it(mochi):
    found, named = report(mochi), report(mochi, DEFAULT_PRESET)
    assert found == named and found.preset == DEFAULT_PRESET
    assert found.method == "routed" and found.density_asked == 0.15 and found.schedule == vars(DEFAULT)
    assert f"preset           {DEFAULT_PRESET}" in str(found)


def test_other_settings_of_the_method_are_no_preset(mochi):
    for found in (report(mochi, density=0.3), report(mochi, residual=None), report(mochi, "routed")):
        assert found.method.startswith("routed") and found.preset is None and "preset" not in str(found)
    assert report(mochi, density=0.3).density_asked == 0.3 and report(mochi, "routed").density_asked == 0.25


def test_models_have_the_dense_steps_and_layers_of_their_papers(hunyuan):
    found = report(hunyuan, "balanced")
    assert (found.schedule["dense_steps"], found.schedule["dense_layers"]) == (0.1, 0.03)
    assert found.preset == "balanced, dense steps and layers of Sparse VideoGen2, arXiv:2505.18875"
    assert report(hunyuan, "quality").schedule == vars(DEFAULT)


def test_arguments_take_precedence_over_the_paper(hunyuan):
    found = report(hunyuan, "balanced", dense_steps=0.5)
    assert (found.schedule["dense_steps"], found.schedule["dense_layers"]) == (0.5, 0.03)
    found = report(hunyuan, "balanced", dense_steps=0.5, dense_layers=1)
    assert found.schedule["dense_layers"] == 1 and found.preset == "balanced"
    found = report(hunyuan, "balanced", schedule=DEFAULT)
    assert found.schedule == vars(DEFAULT) and found.preset == "balanced"


def test_a_processor_serves_pipelines_of_several_families(hunyuan, mochi):
    processor = ds.SparseAttnProcessor("balanced")
    for pipe, dense_steps in ((hunyuan, 0.1), (mochi, 0.25), (hunyuan, 0.1)):
        run = processor.attach(pipe)
        run.disable()
        assert run.report().schedule["dense_steps"] == dense_steps


@pytest.mark.parametrize("preset", PRESETS.values(), ids=PRESETS)
def test_schedules_of_presets_are_valid(preset):
    known = {name for family in all_families() for name in family.transformers}
    for transformer, of_paper in preset.schedules.items():
        assert transformer in known and "arXiv:" in of_paper.source
        assert ds.Schedule(**of_paper.schedule) != DEFAULT
