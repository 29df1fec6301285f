"""Profiles in the text of a method: schedule, model check, composition and name in reports."""

from __future__ import annotations

import pytest

from dit_sparse import Profile, Schedule, SparseAttnProcessor, enable
from dit_sparse.methods import method, method_text
from dit_sparse.notation.syntax import ProfileName, write
from tiny_pipelines import ALL


@pytest.fixture
def text(tmp_path) -> str:
    """The text of a profile in a folder whose name needs quotes."""
    methods = {"r": {"method": "radial(sink=true)", "settings": {"density": 0.4}}, "t": {"method": "svg.temporal"}}
    profile = Profile(
        model="tiny",
        transformer="WanTransformer3DModel",
        source="a test",
        schedule={"dense_steps": 1},
        methods=methods,
        layers=["rt", "tt"],
    )
    path = tmp_path / "a, (b)" / "p.json"
    path.parent.mkdir()
    path.write_text(profile.dumps())
    return write(ProfileName(str(path)))


def test_the_schedule_of_the_profile_holds(text):
    assert SparseAttnProcessor(text).settings.schedule == Schedule(dense_steps=1)
    assert SparseAttnProcessor(text, dense_steps=3).settings.schedule.dense_steps == 3
    assert SparseAttnProcessor(text, schedule=Schedule(0.5)).settings.schedule == Schedule(0.5)
    assert SparseAttnProcessor("profile:hunyuan-video").settings == (
        SparseAttnProcessor.from_profile("hunyuan-video").settings
    )


def test_entries_of_a_profile_are_texts(text):
    per_head = SparseAttnProcessor(text).settings.method
    assert dict(per_head.methods)["r"] == method("radial(density=0.4, sink=true)")


@pytest.mark.parametrize("composition", ["{}", "cached({}, replan_interval=1)", "pooled({})"])
def test_reports_name_the_profile(text, composition):
    tiny, text = ALL["wan"](), composition.format(text)
    with enable(tiny.pipe, text, block=16, min_tokens=0, executor="reference") as run:
        tiny.pipe(**tiny.kwargs())
        report = run.report()
    assert report.method == text and report.sparse_calls
    processor = SparseAttnProcessor(report.method)
    assert method_text(processor.settings.method) == text


def test_a_profile_of_another_model_is_refused(text):
    for composition in ("profile:hunyuan-video", "cached(profile:hunyuan-video)"):
        with pytest.raises(ValueError, match="is for a HunyuanVideo"):
            enable(ALL["wan"]().pipe, composition)
    with pytest.raises(ValueError, match="is for a WanTransformer3DModel"):
        enable(ALL["mochi"]().pipe, text)


def test_a_text_holds_at_most_one_profile(text):
    with pytest.raises(ValueError, match="can hold one profile"):
        SparseAttnProcessor(f'per_head(methods=(("a", {text}), ("b", {text})), layers=("ab",))')
