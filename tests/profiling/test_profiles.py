"""Profiles: the file format, the search that makes them, and the commands around both."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from dit_sparse import Grid, PerHead, Plan, Profile, Schedule, Site, SparseAttnProcessor, enable, prepare
from dit_sparse.cli.main import app
from dit_sparse.kernels.executors import reference
from dit_sparse.method import AttentionOutput
from dit_sparse.methods.radial import Radial
from dit_sparse.pipelines.family import family_of
from dit_sparse.profiling import search
from dit_sparse.profiling.head_profile import names
from tiny_pipelines import ALL

SMALL = ["--frames", "3", "--height", "32", "--width", "32", "--steps", "4"]


def profile(**given) -> Profile:
    made = {
        "model": "tiny",
        "transformer": "WanTransformer3DModel",
        "source": "a test",
        "schedule": {"dense_steps": 1, "dense_layers": 0},
        "methods": {"r": {"method": "radial", "settings": {"density": 0.4}}, "t": {"method": "svg.temporal"}},
        "layers": ["rt", "tt"],
    }
    return Profile(**made | given)


# --- the format


@pytest.mark.parametrize("name", names())
def test_profiles_that_ship_load_and_say_where_they_are_from(name):
    shipped = Profile.load(name)
    assert shipped.model == name and (shipped.measured or "not measured" in shipped.source)
    assert isinstance(shipped.mixture(), PerHead) and isinstance(shipped.when(), Schedule)
    assert len({len(line) for line in shipped.layers}) == 1


def test_there_is_a_profile_for_every_big_family():
    assert {"wan2.1-1.3b", "wan2.1-14b", "wan2.2-a14b", "hunyuan-video", "cogvideox1.5-5b"} <= set(names())


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
def test_hand_set_profiles_fit_their_models(name, sizes):
    """The real number of layers and heads, on the meta device."""
    import diffusers

    shipped = Profile.load(name)
    with torch.device("meta"):
        model = getattr(diffusers, shipped.transformer)(**sizes)
    enable(model, profile=name).disable()
    assert family_of(model)


def test_a_profile_travels_through_its_file(tmp_path):
    made, path = profile(measured={"errors": [[0.1, 0.2]], "density": 0.3}), tmp_path / "p.json"
    path.write_text(made.dumps())
    assert Profile.load(path) == made
    assert '"rt",\n' in made.dumps() and json.loads(made.dumps())["schema"] == 1
    processor = SparseAttnProcessor.from_profile(path, executor="gather")
    assert processor.settings.method == made.mixture() and processor.settings.schedule == Schedule(dense_steps=1)
    assert SparseAttnProcessor.from_profile(made, dense_steps=3).settings.schedule.dense_steps == 3


@pytest.mark.parametrize(
    "text, words",
    [
        ("{", "cannot be read as a profile"),
        ("[1]", "no number under 'schema'"),
        ('{"model": "x"}', "no number under 'schema'"),
        ('{"schema": 7}', "schema 7, and this dit-sparse reads up to 1"),
        ('{"schema": 1, "model": "x"}', "is damaged: transformer"),
        (profile().dumps().replace('"radial"', '"radail"'), "no method 'radail'"),
        (profile().dumps().replace('"density"', '"densty"'), "no setting 'densty'"),
        (profile().dumps().replace("0.4", "4"), "density must be in"),
        (profile().dumps().replace("0.4", '{"Foo": 1}'), "neither a method nor a budget"),
        (profile().dumps().replace('"dense_layers": 0', '"replan_interval": 1.5'), "replan_interval must be a number of steps"),
        (profile().dumps().replace('"rt"', '"rx"'), "unknown letters"),
        (profile().dumps().replace("dense_layers", "dense_lairs"), "dense_lairs"),
        (profile().dumps().replace('"source"', '"sauce"'), "is damaged"),
    ],
)
def test_what_is_wrong_with_a_file_is_said(tmp_path, text, words):
    path = tmp_path / "p.json"
    path.write_text(text)
    with pytest.raises(ValueError, match=words) as error:
        Profile.load(path)
    assert "\n" not in str(error.value)


def test_a_profile_that_is_not_there():
    with pytest.raises(ValueError, match="no profile 'nope', neither a file nor one of cogvideox"):
        SparseAttnProcessor.from_profile("nope")


def test_a_profile_for_another_model_is_refused_before_anything_runs():
    tiny = ALL["wan"]()
    for wrong, words in (
        (profile(transformer="MochiTransformer3DModel"), "made for a MochiTransformer3DModel, not a WanTransformer3DM"),
        (profile(layers=["rt"]), "made for 1 layers"),
        (profile(layers=["rtr", "rtr"]), "made for 3 heads"),
    ):
        with pytest.raises(ValueError, match=words):
            enable(tiny.pipe, profile=wrong)


def test_a_profile_runs_at_any_size():
    tiny = ALL["wan"]()
    with enable(tiny.pipe, profile=profile(), block=16, min_tokens=0) as run:
        for frames in (5, 9):
            tiny.pipe(**tiny.kwargs(num_frames=frames))
        assert len(run.report().grids) == 2 and run.report().sparse_calls and run.report().method == "per_head"


# --- the choice


def tables(seed: int, layers=2, heads=2, candidates=4):
    generator = torch.Generator().manual_seed(seed)
    error = torch.rand(candidates, layers, heads, generator=generator)
    density = 0.05 + 0.6 * torch.rand(candidates, 1, 1, generator=generator).expand_as(error)
    error[0], density = 0, torch.cat([torch.ones(1, layers, heads), density[1:]])
    return error, density


@given(st.integers(0, 10_000), st.floats(0.1, 1.0))
def test_the_choice_meets_the_density_and_is_near_the_best(seed, target):
    error, density = tables(seed)
    if target < density.amin(0).mean():
        with pytest.raises(ValueError, match="sparse enough"):
            search.choose(error, density, target_density=target)
        return
    choice = search.choose(error, density, target_density=target)
    taken = lambda table, c: float(table.gather(0, c[None]).mean())
    assert taken(density, choice) <= target + 1e-5
    every = [torch.tensor(c).view(2, 2) for c in itertools.product(range(4), repeat=4)]
    best = min(taken(error, c) for c in every if taken(density, c) <= target)
    assert taken(error, choice) <= best + 0.26, "off by more than one head"
    assert choice.equal(search.choose(error, density, target_density=target))


@given(st.integers(0, 10_000), st.floats(0.05, 0.9))
def test_the_choice_meets_the_error(seed, most):
    error, density = tables(seed)
    choice = search.choose(error, density, max_error=most)
    assert float(error.gather(0, choice[None]).mean()) ** 0.5 <= most + 1e-6


def test_at_one_density_every_head_takes_what_errs_least():
    error, _ = tables(5)
    choice = search.best(error)
    assert (choice > 0).all() and error.gather(0, choice[None])[0].equal(error[1:].amin(0))


def test_a_larger_error_buys_a_smaller_density():
    error, density = tables(3, 8, 8, 9)
    taken = [float(density.gather(0, search.choose(error, density, max_error=e)[None]).mean()) for e in (0.1, 0.3, 0.6)]
    assert taken == sorted(taken, reverse=True) and taken[0] > taken[-1]


def test_one_of_the_two_targets():
    for given_ in ({}, {"target_density": 0.3, "max_error": 0.1}):
        with pytest.raises(ValueError, match="one of the two"):
            search.choose(*tables(0), **given_)


def test_candidates_are_tried_at_several_densities():
    tried = search.candidates("radial, vdit", 0.2)
    assert [one.name for one in tried[:2]] == ["dense", "radial"]
    assert {one.name for one in tried} == {
        "dense",
        "radial",
        "svg.spatial",
        "svg.temporal",
        "vdit.vertical",
        "vdit.skip",
    }
    assert [one.method.density for one in tried if one.name == "radial"] == pytest.approx([0.08, 0.14, 0.2, 0.3, 0.5])
    assert [one.method.density for one in search.candidates("radial", 0.2, (1.0,))[1:]] == [0.2]
    with pytest.raises(ValueError, match="the spread is multiples of the density"):
        search.candidates("radial", 0.2, (5.0,))
    for name, words in (
        ("nope", "no method"),
        ("rettention", "single calls"),
        ("cached(rettention)", "single calls"),
        ("svg2", "share a launch"),
        ("pooled(pbs)", "share a launch"),
        ("radial,svg,sol,asa,vdit,sparge,subblock,window,xattention,adaspa,sink", "letters"),
    ):
        with pytest.raises(ValueError, match=words):
            search.candidates(name, 0.2)


def test_measuring_leaves_the_pipeline_dense_and_as_it_was():
    tiny = ALL["wan"]()
    latents = lambda: tiny.pipe(**tiny.kwargs()).frames
    before = latents()
    prepare(tiny.pipe)
    during = []
    tried = [search.Candidate("dense", Radial(density=1.0)), search.Candidate("radial", Radial(density=0.3))]
    seen = search.measure(tiny.pipe, lambda: during.append(latents()), tried, Schedule(dense_steps=0), block=16)
    assert torch.allclose(torch.as_tensor(during[0]), torch.as_tensor(before), atol=1e-4)
    assert torch.equal(torch.as_tensor(latents()), torch.as_tensor(before))
    assert seen.error.shape == seen.density.shape == seen.seconds.shape == (2, 2, 2)
    assert (seen.error[0] < 1e-8).all() and (seen.error[1] > 1e-4).all() and (seen.density[0] == 1).all()
    assert len(seen.grids) == 1 and seen.steps


def test_padding_does_not_count_in_the_error():
    """The same call, with wild values where one item is padding."""
    q, k, v = torch.randn(3, 2, 2, 96, 16, generator=torch.Generator().manual_seed(0)).unbind(0)
    found = []
    for scale in (1, 100):
        wild = [x.clone() for x in (q, k, v)]
        for x in wild:
            x[1, :, 80:] *= scale
        plan = Plan.dense(96, 16).with_lengths(torch.tensor([96, 80]))
        done = AttentionOutput(*wild, plan, None, *reference.attend(*wild, plan), dense=None)
        radial = Radial(density=0.4)
        sparse = radial.plan(*wild[:2], Site(Grid(6, 4, 4), 16), {}).with_lengths(plan.lengths)
        found.append(search.squared_error(radial, done, sparse, reference.attend, Site(Grid(6, 4, 4), 16), {}))
    assert found[0].dtype == torch.float64 and (found[0] > 1e-4).all()
    torch.testing.assert_close(*found)


def test_steps_looked_at_are_sparse_ones():
    assert search.measured_steps(Schedule(dense_steps=2), 12, 3) == [2, 6, 11]
    assert search.measured_steps(Schedule(dense_steps=2), None, 3) == [2, 2, 2]
    for schedule in (Schedule(dense_steps=4), Schedule(dense_steps=1.0)):
        with pytest.raises(ValueError, match="all 4 steps dense"):
            search.measured_steps(schedule, 4, 3)


# --- the commands


@pytest.mark.parametrize("spread", [(), ("--spread", "0.5,1,1.5")])
def test_profile_writes_what_enable_takes(tmp_path, spread):
    out = tmp_path / "mine.json"
    run = CliRunner().invoke(
        app,
        ["profile", "shapes-wan", "--prompts", "1", "--candidates", "radial,svg.temporal", "--target-density", "0.5"]
        + ["--block", "16", "--out", str(out), *spread, *SMALL],
    )
    assert run.exit_code == 0, run.output
    made = Profile.load(out)
    assert made.measured["density"] == pytest.approx(0.5, abs=0.01)
    assert len(made.layers) == len(made.measured["errors"]) == 6
    assert {"device", "versions", "commit", "grids", "prompts", "candidates"} <= set(made.measured)
    assert out.with_suffix(".png").stat().st_size > 1000
    check = CliRunner().invoke(app, ["profile", "shapes-wan", "--prompts", "1", "--check", str(out), *SMALL])
    assert check.exit_code == 0 and "when it was made" in check.output, check.output


def test_compositions_are_candidates_that_load_again(tmp_path):
    out = tmp_path / "mine.json"
    given = ["--candidates", "radial|sink,pooled(svg),cached(xattention)", "--target-density", "0.3", "--block", "16"]
    run = CliRunner().invoke(app, ["profile", "shapes-wan", "--prompts", "1", *given, "--out", str(out), *SMALL])
    assert run.exit_code == 0, run.output
    assert Profile.load(out).measured["block"] == 16


@pytest.mark.parametrize(
    "command, words",
    [
        (["compare", "--methods", "nope"], "no method 'nope'"),
        (["compare", "--methods", "profile:nope"], "no profile 'nope'"),
        (["compare", "--density", "2"], "density must be in"),
        (["compare", "--prompts", "nowhere.txt"], "cannot read nowhere.txt"),
        (["compare", "--prompts", "a long sentence " * 30], "a number from 1 to 60"),
        (["compare", "--prompts", "61"], "a number from 1 to 60"),
        (["compare", "--prompts", "²"], "a number from 1 to 60"),
        (["compare", "--methods", "profile:" + "a" * 300], "there is no profile"),
        (["compare", "--methods", "window|sink"], "different token orders"),
        (["compare", "--methods", "cached"], "write cached(NAME)"),
        (["compare", "--dense-steps", "nan"], "between 0.0 and 1.0"),
        (["compare", "--dense-steps", "some"], "a count such as 3"),
        (["profile", "shapes-wan", "--target-density", "2"], "between 0 and 1"),
        (["profile", "shapes-wan", "--target-density", "0.2", "--max-error", "0.1"], "one of the two"),
        (["profile", "shapes-wan", "--candidates", "nope"], "no method 'nope'"),
        (["profile", "shapes-wan", "--spread", "wide"], "--spread is numbers separated by commas"),
        (["profile", "shapes-wan", "--spread", "4"], "the spread is multiples of the density"),
        (["profile", "shapes-wan", "--spread", "-1,1"], "the spread is multiples of the density"),
        (["profile", "shapes-wan", "--spread", "2"], "cannot meet the target"),
        (["profile", "shapes-wan", "--out", "profile.txt"], "ends in .json"),
        (["profile", "shapes-wan", "--dense-steps", "1.0"], "all 16 steps dense"),
        (["profile", "shapes-wan", "--check", "nope"], "no profile 'nope'"),
        (["profile", "shapes-wan", "--check", "wan2.1-14b"], "was not measured"),
    ],
)
def test_bad_input_is_one_sentence(command, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = CliRunner().invoke(app, command)
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not any(tmp_path.rglob("*.json"))
