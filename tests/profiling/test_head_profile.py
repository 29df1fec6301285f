"""Head profiles: the file format, the shipped profiles, and running one."""

from __future__ import annotations

import json

import pytest
import torch

from dit_sparse import PerHead, Profile, Schedule, SparseAttnProcessor, enable
from dit_sparse.pipelines.family import family_of
from dit_sparse.profiling.head_profile import profile_names
from tiny_pipelines import ALL


def make_profile(**fields) -> Profile:
    """Return a profile for the tiny Wan pipeline, with some fields replaced."""
    defaults = {
        "model": "tiny",
        "transformer": "WanTransformer3DModel",
        "source": "a test",
        "schedule": {"dense_steps": 1, "dense_layers": 0},
        "methods": {"r": {"method": "radial", "settings": {"density": 0.4}}, "t": {"method": "svg.temporal"}},
        "layers": ["rt", "tt"],
    }
    return Profile(**defaults | fields)


@pytest.mark.parametrize("name", profile_names())
def test_shipped_profile_loads_and_names_its_source(name):
    profile = Profile.load(name)
    assert profile.model == name and (profile.measured or "not measured" in profile.source)
    assert isinstance(profile.to_method(), PerHead) and isinstance(profile.to_schedule(), Schedule)
    assert len({len(layer) for layer in profile.layers}) == 1


def test_large_models_have_profiles():
    assert {"wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b", "hunyuan-video", "cogvideox1.5-5b"} <= set(profile_names())


@pytest.mark.parametrize(
    "name, sizes",
    [
        ("wan2.1-1.3b", dict(num_layers=30, num_attention_heads=12)),
        ("wan2.1-14b", dict(num_layers=40, num_attention_heads=40)),
        ("wan2.2-a14b", dict(num_layers=40, num_attention_heads=40)),
        ("hunyuan-video", dict(num_layers=20, num_single_layers=40, num_attention_heads=24)),
        ("cogvideox1.5-5b", dict(num_layers=42, num_attention_heads=48)),
    ],
)
def test_shipped_profile_fits_its_model(name, sizes):
    """The model has its real number of layers and heads, on the meta device."""
    import diffusers

    profile = Profile.load(name)
    with torch.device("meta"):
        model = getattr(diffusers, profile.transformer)(**sizes)
    enable(model, profile=name).disable()
    assert family_of(model)


def test_repr_is_one_line():
    assert repr(make_profile()) == str(make_profile()) == "Profile(tiny: 2 layers x 2 heads, 2 methods)"


def test_profile_is_saved_and_loaded(tmp_path):
    profile, path = make_profile(measured={"errors": [[0.1, 0.2]], "density": 0.3}), tmp_path / "p.json"
    path.write_text(profile.dumps())
    assert Profile.load(path) == profile
    assert '"rt",\n' in profile.dumps() and json.loads(profile.dumps())["schema"] == 2
    processor = SparseAttnProcessor.from_profile(path, executor="gather")
    assert processor.settings.method == profile.to_method()
    assert processor.settings.schedule == Schedule(dense_steps=1)
    assert SparseAttnProcessor.from_profile(profile, dense_steps=3).settings.schedule.dense_steps == 3


TEXT = make_profile().dumps()


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "cannot be read as a profile"),
        ("[1]", "no number under 'schema'"),
        ('{"model": "x"}', "no number under 'schema'"),
        ('{"schema": 7}', "schema 7, but this version of dit-sparse reads 2: upgrade"),
        ('{"schema": 1, "model": "x"}', "schema 1, but this version of dit-sparse reads 2: search it again"),
        ('{"schema": 2, "model": "x"}', "is damaged: transformer"),
        (TEXT.replace('"radial"', '"radail"'), "no method 'radail'"),
        (TEXT.replace('"density"', '"densty"'), "no setting 'densty'"),
        (TEXT.replace("0.4", "4"), "density must be in"),
        (TEXT.replace("0.4", '{"Foo": 1}'), "Foo"),
        (TEXT.replace('"dense_layers": 0', '"replan_interval": 1.5'), "replan_interval must be a number of steps"),
        (TEXT.replace('"rt"', '"rx"'), "letters"),
        (TEXT.replace("dense_layers", "dense_lairs"), "dense_lairs"),
        (TEXT.replace('"source"', '"sauce"'), "is damaged"),
    ],
)
def test_bad_file_raises_one_sentence(tmp_path, text, words):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        Profile.load(path)
    assert "\n" not in str(error.value)


def test_missing_profile():
    with pytest.raises(ValueError, match="no profile 'nope'"):
        SparseAttnProcessor.from_profile("nope")


def test_profile_of_another_model_raises_before_the_run():
    tiny = ALL["wan"]()
    for profile, words in (
        (make_profile(transformer="MochiTransformer3DModel"), "for a MochiTransformer3DModel, got a WanTransformer3DM"),
        (make_profile(layers=["rt"]), "1 layers"),
        (make_profile(layers=["rtr", "rtr"]), "3 heads"),
    ):
        with pytest.raises(ValueError, match=words):
            enable(tiny.pipe, profile=profile)


def test_profile_runs_at_any_video_size():
    tiny = ALL["wan"]()
    with enable(tiny.pipe, profile=make_profile(), block=16, min_tokens=0) as run:
        for frames in (5, 9):
            tiny.pipe(**tiny.kwargs(num_frames=frames))
        assert len(run.report().grids) == 2 and run.report().sparse_calls and "per_head" in run.report().method
