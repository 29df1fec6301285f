"""Frames per second of the models: where they are known, and how they are found without a connection."""

from __future__ import annotations

import inspect
import json

import diffusers
import pytest
from diffusers import AutoModel, DiffusionPipeline

from dit_sparse.generation.generate import DEFAULT_FPS, default_fps
from dit_sparse.pipelines.family import Family, all_families

ALL = list(all_families())


@pytest.mark.parametrize("family", ALL, ids=lambda family: family.name)
def test_video_families_have_a_frame_rate(family: Family):
    assert (family.frames_per_second({}, {}) is None) == family.images


@pytest.mark.parametrize("family", [family for family in ALL if not family.images], ids=lambda family: family.name)
def test_frame_rates_are_those_that_the_pipelines_condition_on(family: Family):
    """Some pipelines pass a frame rate to the model. Its default is the rate of the clip."""
    for name in family.pipelines:
        parameters = inspect.signature(getattr(diffusers, name).__call__).parameters
        for argument in {"fps", "frame_rate"} & parameters.keys():
            if isinstance(parameters[argument].default, int | float):
                assert family.frames_per_second({"_class_name": name}, {}) == parameters[argument].default, name


@pytest.mark.parametrize(
    ("config", "fps"),
    [
        ({"transformer": "MochiTransformer3DModel"}, 30),
        ({"transformer": "HunyuanVideoTransformer3DModel"}, 24),
        ({"transformer": "CogVideoXTransformer3DModel"}, 8),
        ({"transformer": "WanTransformer3DModel"}, 16),
        ({"transformer": "WanTransformer3DModel", "expand_timesteps": True}, 24),
        ({"transformer": "FluxTransformer2DModel"}, DEFAULT_FPS),
        ({"transformer": "SomeTransformer"}, DEFAULT_FPS),
    ],
)
def test_the_frame_rate_of_a_folder_is_that_of_its_transformer(tmp_path, config, fps):
    config = config | {"_class_name": "SomePipeline", "transformer": ["diffusers", config["transformer"]]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    assert default_fps(str(tmp_path)) == fps


def test_versions_of_cogvideox_differ_in_their_frame_rate(tmp_path, monkeypatch):
    """Version 1.5 is known by the config of its transformer, in a folder or in the cache of the hub."""
    (tmp_path / "transformer").mkdir()
    config = {"_class_name": "CogVideoXPipeline", "transformer": ["diffusers", "CogVideoXTransformer3DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda *_, **__: config)
    for patch, fps in ((None, 8), (2, 16)):
        (tmp_path / "transformer" / "config.json").write_text(json.dumps({"patch_size_t": patch}))
        monkeypatch.setattr(AutoModel, "load_config", lambda *_, value=patch, **__: {"patch_size_t": value})
        assert default_fps(str(tmp_path)) == default_fps("THUDM/CogVideoX") == fps


def test_nothing_is_downloaded(monkeypatch):
    def load_config(name, local_files_only=False):
        assert local_files_only
        raise OSError("not in the cache")

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    assert default_fps("owner/name") == DEFAULT_FPS and default_fps("shapes-wan-i2v") == 8
