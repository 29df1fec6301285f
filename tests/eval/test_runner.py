"""The clips of a comparison: the shelf, what decides a take, what is timed, and what the rows say of them."""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_sparse import Schedule, SparseAttnProcessor
from dit_sparse.eval.comparison import runner as takes
from dit_sparse.eval.comparison import summary
from dit_sparse.eval.comparison.bootstrap import interval
from dit_sparse.eval.comparison.clip_store import ClipRecord, ClipStore
from dit_sparse.eval.comparison.runner import ClipRunner, ClipSpec
from dit_sparse.generation.generate import Clip
from dit_sparse.output import environment

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
DENSE = ClipSpec("dense", "dense", None, SparseAttnProcessor("dense", min_tokens=0))

# --- the shelf


def test_a_take_is_found_by_all_that_decides_it(tmp_path):
    shelf, take = ClipStore(tmp_path), ClipRecord(np.full((2, 3, 4, 3), 7, np.uint8), {"seconds": 1.5, "mass": [[0.5]]})
    shelf.put("radial 0.3", {"seed": 0}, take)
    found = shelf.get("radial 0.3", {"seed": 0})
    assert np.array_equal(found.frames, take.frames) and found.note == take.note and found.latents is None
    assert shelf.get("radial 0.3", {"seed": 1}) is None and shelf.get("radial 0.4", {"seed": 0}) is None


@pytest.mark.parametrize("content", [b"", b"half a fi", b"PK\x03\x04" + bytes(40)])
def test_a_damaged_take_is_no_take(tmp_path, content):
    shelf = ClipStore(tmp_path)
    shelf.put("x", {}, ClipRecord(np.zeros((1, 2, 2, 3), np.uint8), {}))
    (path,) = tmp_path.iterdir()
    path.write_bytes(content)
    assert shelf.get("x", {}) is None


def test_no_damaged_byte_of_a_take_is_an_error(tmp_path):
    """Any byte of a zip archive may say: encrypted, compressed in an unknown way, made by a newer version."""
    shelf = ClipStore(tmp_path)
    shelf.put("x", {}, ClipRecord(np.zeros((1, 1, 1, 3), np.uint8), {}))
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 0x09]) + whole[place + 1 :])
        shelf.get("x", {})


# --- what decides a take


def processor(method="svg", density=0.3, executor="gather", block=32, **schedule) -> SparseAttnProcessor:
    schedule = Schedule(**{"dense_steps": 1} | schedule)
    return SparseAttnProcessor(method, density=density, schedule=schedule, executor=executor, block=block, min_tokens=0)


def studio(folder, model="shapes-wan", prompts=("a", "b"), seeds=1, **call) -> ClipRunner:
    return ClipRunner(model, prompts, range(seeds), {"num_inference_steps": 4} | call, folder, Schedule(1))


def wanted(**given) -> ClipSpec:
    return ClipSpec("x", "x", 0.3, processor(**given))


def test_whatever_decides_a_take_makes_another(tmp_path, monkeypatch):
    place = lambda one, row, scene=("a", 0): one.shelf._path(*one._key(row, scene))
    here, row = studio(tmp_path), wanted()
    places = [place(here, row), place(here, row, ("b", 0)), place(here, row, ("a", 1))]
    places += [place(here, replace(row, steps=3)), place(studio(tmp_path, height=64), row)]
    changes = [{"method": "svg2"}, {"density": 0.4}, {"executor": "auto"}, {"block": 64}]
    changes += [{"dense_steps": 2}, {"dense_layers": 1}, {"replan_interval": 1}]
    places += [place(here, wanted(**change)) for change in changes]
    for name in ("sources", "versions", "device_name"):
        monkeypatch.setattr(takes, name, lambda *_: "another")
        places.append(place(studio(tmp_path), row))
    monkeypatch.setattr(takes, "weights", lambda _: "another")
    places.append(place(studio(tmp_path), row))
    assert len(set(places)) == len(places)
    assert place(studio(tmp_path, prompts=("c", "a"), seeds=3), row) == places[-1]


def test_a_folder_with_other_weights_is_another_model(tmp_path):
    (tmp_path / "vae").mkdir()
    part = tmp_path / "vae" / "x.safetensors"
    part.write_bytes(b"12")
    before = environment.weights(str(tmp_path))
    assert before == environment.weights(str(tmp_path)) and environment.weights("shapes-wan") is None
    part.write_bytes(b"123")
    assert environment.weights(str(tmp_path)) != before
    assert environment.weights("nobody/has-this-model") is None


def test_the_code_that_makes_clips_is_among_the_sources(tmp_path, monkeypatch):
    package = tmp_path / "dit_sparse"
    for name in ("engine/run.py", "generation/generate.py", "grid.py", "cli/main.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("code")
    monkeypatch.setattr(environment.dit_sparse, "__path__", [str(package)])
    before = environment.sources()
    (package / "cli" / "main.py").write_text("other code")
    assert environment.sources() == before
    for name in ("engine/run.py", "generation/generate.py", "grid.py"):
        (package / name).write_text("other code")
        changed = environment.sources()
        assert changed != before
        before = changed


# --- what is made, and what is timed


class FakePipe:
    """Notes with which processor it makes clips."""

    def set_attn_processor(self, given):
        self.processor = given
        report = SimpleNamespace(as_dict=dict)
        self.sparse_run = SimpleNamespace(observe=lambda observer: None, report=lambda: report)


@pytest.fixture
def made(monkeypatch) -> list[tuple]:
    """What ``generate`` was asked for: prompt, seed, steps, first sparse step. Clips take 10 s, looking at them 3."""
    asked = []

    def generate(pipe, prompt, seed, call, progress=None, watch=None):
        steps = call["num_inference_steps"]
        asked.append((prompt, seed, steps, pipe.processor.settings.schedule.first_sparse_step(steps)))
        for step in range(steps if watch else 0):
            watch(step, steps, torch.full((1, 2), 1 / 3 + seed))
        return Clip(FRAMES, 10.0)

    monkeypatch.setattr(takes, "generate", generate)
    monkeypatch.setattr(takes, "Stopwatch", lambda: SimpleNamespace(seconds=3.0, timing=lambda _: nullcontext()))
    monkeypatch.setattr(ClipRunner, "pipe", FakePipe())
    return asked


def quiet(done, steps):
    pass


def test_looking_is_no_part_of_a_clips_seconds_and_neither_is_the_first_call_of_a_row(tmp_path, made):
    here = studio(tmp_path)
    for row in (DENSE, wanted()):
        made.clear()
        here.make([row], quiet)
        warm_up, *timed = made
        assert warm_up[2:] == (1, 0), "one step, and that one sparse"
        assert [(prompt, steps) for prompt, _, steps, _ in timed] == [("a", 4), ("b", 4)]
        assert all(take.note["seconds"] == 7 for take, _ in here.takes(row))
        here.make([row], quiet)
        assert len(made) == 3


def test_rows_take_turns_and_warm_up_once(tmp_path, made):
    rows, told = [DENSE, wanted(), replace(wanted(), method="y")], []
    here = studio(tmp_path, prompts=("a", "b"))
    here.make(rows[:2], quiet)
    made.clear()
    here.make(rows, lambda *at: told.append(at))
    assert [(prompt, steps) for prompt, _, steps, _ in made] == [("a", 1), ("a", 4), ("b", 4)]
    assert told[-1] == (6, 6) and [a / b for a, b in told] == sorted(a / b for a, b in told)
    fresh = studio(tmp_path / "other", prompts=("a", "b"))
    made.clear()
    fresh.make(rows, quiet)
    assert [prompt for prompt, _, steps, _ in made if steps == 4] == ["a"] * 3 + ["b"] * 3
    assert sum(steps == 1 for *_, steps, _ in made) == 3


def test_a_larger_comparison_makes_only_what_is_missing(tmp_path, made):
    studio(tmp_path, prompts=("a",)).make([DENSE], quiet)
    made.clear()
    studio(tmp_path, prompts=("new", "a"), seeds=2).make([DENSE], quiet)
    assert [scene[:2] for scene in made[1:]] == [("new", 0), ("new", 1), ("a", 1)]


def test_equal_latents_have_no_error_though_they_are_kept_rounded(tmp_path, made):
    here = studio(tmp_path)
    here.make([DENSE], quiet)
    here.make([wanted()], quiet)
    for take, dense in here.takes(wanted()):
        assert take.note["latent_error"] == [[step, 0.0] for step in range(4)]
        assert dense.latents.dtype == np.float16 and dense.latents.shape == (4, 1, 2)


def test_errors_are_those_of_the_first_clip_and_the_executor(tmp_path, made, monkeypatch):
    asked = []
    found = SimpleNamespace(error=torch.full((1, 2, 2), 0.25))
    monkeypatch.setattr(takes.probe, "measure_candidates", lambda *_: asked.append(1) or found)
    same = {"call": {}, "folder": tmp_path, "schedule": Schedule(1)}
    setups = [{"prompts": ["a"], "seeds": [0]}, {"prompts": ["b"], "seeds": [0]}, {"prompts": ["a"], "seeds": [1]}]
    setups += [setups[0] | {"executor": "gather"}, setups[0] | {"block": 32}, setups[0] | {"schedule": Schedule(2)}]
    for count, setup in enumerate(setups, 1):
        for _ in range(2):
            assert ClipRunner("shapes-wan", **same | setup).errors([wanted()], quiet) == {"x": 0.5}
        assert len(asked) == count


def test_the_steps_of_a_pipeline_that_nobody_gave_are_checked(monkeypatch, tmp_path):
    class Pipe:
        def __call__(self, prompt, num_inference_steps=50):
            pass

    monkeypatch.setattr(takes, "load", lambda model: Pipe())
    monkeypatch.setattr(takes, "prepare", lambda pipe: pipe)
    assert isinstance(ClipRunner("x", ["a"], [0], {}, tmp_path, Schedule(49)).pipe, Pipe)
    with pytest.raises(ValueError, match="keeps all 50 steps dense"):
        _ = ClipRunner("x", ["a"], [0], {}, tmp_path, Schedule(50)).pipe


# --- what the rows say


def note(seconds, attention, planning=0.0, achieved=None, run=1.0, steps=4) -> dict:
    told = {"seconds": seconds, "attention_seconds": attention, "planning_seconds": planning, "steps": steps}
    told |= {"density_achieved": achieved, "density_run": run, "mass": [], "latent_error": [], "settings": {}}
    return told | {"executors": {}, "grids": ["1x2x3"], "prompt": "a"}


def test_a_row_is_the_sum_of_its_clips():
    notes = [(note(4, 1, 0.25, 0.3, 0.5), note(10, 5)), (note(6, 3, 0.75, 0.34, 0.7), note(20, 7))]
    pairs = [(ClipRecord(FRAMES + 2, one), ClipRecord(FRAMES, dense)) for one, dense in notes]
    row = summary.summary(wanted(), SimpleNamespace(seeds=1, takes=lambda _: iter(pairs)))
    told = {key: row[key] for key in ("seconds", "attention_seconds", "speedup", "attention_speedup", "planning_share")}
    assert told == dict(seconds=10, attention_seconds=4, speedup=3, attention_speedup=3, planning_share=0.25)
    assert row["density_achieved"] == pytest.approx(0.32) and row["density_run"] == pytest.approx(0.6)
    assert row["density_hit"] is False and row["psnr"]["mean"] == pytest.approx(20 * math.log10(255 / 2))


def test_pairs_are_counted_against_those_of_the_full_dense_run():
    pairs = [(ClipRecord(FRAMES, note(4, 2, steps=3)), ClipRecord(FRAMES, note(5, 3)))]
    row = summary.summary(wanted(), SimpleNamespace(seeds=1, takes=lambda _: iter(pairs)))
    assert row["density_run"] == 0.75 and row["steps"] == 3


def test_the_seeds_of_a_prompt_stand_side_by_side():
    values = [1.0, 3.0, 10.0, 20.0, 5.0, 5.0]
    assert summary._by_prompt(values, 2).tolist() == [2, 15, 5]
    assert summary._by_prompt(values, 3).tolist() == [14 / 3, 10]


def row(method, psnr, asked=None, achieved=None) -> dict:
    told = psnr and {"each": psnr}
    return {"method": method, "density_asked": asked, "density_achieved": achieved, "psnr": told}


def test_rows_are_compared_with_random_blocks_of_their_density():
    floors = [row("random_blocks", [10.0, 12.0], 0.25), row("random_blocks", [20.0, 20.0], 0.26)]
    over = lambda one: summary.over_random(one, [row("dense", None), *floors, one], 1)
    assert over(row("svg", [13.0, 14.0], 0.25, 0.5)) == {"mean": 2.5, "interval": [2, 3]}
    assert over(row("svg", [13.0, 14.0], 0.2501))["mean"] == 2.5
    assert over(row("profile:x", [21.0, 22.0], None, 0.262))["mean"] == 1.5
    assert over(row("profile:x", [21.0, 22.0], None, 0.28)) is None
    assert over(floors[0])["mean"] == 0
    assert over(row("dense", [13.0, 14.0])) is None
    alone = row("svg", [13.0, 14.0])
    assert summary.over_random(alone, [row("random_blocks", [1.0, 1.0]), alone], 1) is None


# --- intervals


def test_the_interval_is_near_what_the_normal_law_says():
    values = np.random.default_rng(1).normal(30, 2, 60)
    low, high = interval(values)
    half = 1.96 * values.std() / math.sqrt(60)
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.1)


def test_the_interval_of_two_prompts_is_between_them():
    """Of the means of two drawn values a quarter are the lower one, and a quarter the higher one."""
    assert interval([1.0, 5.0]) == [1, 5]
    low, high = interval([0.0] * 99 + [100.0])
    assert low == 0 and 2 <= high <= 4


def test_pairs_narrow_the_interval_and_one_prompt_has_none():
    rng = np.random.default_rng(2)
    prompts, noise = rng.normal(0, 5, 12), rng.normal(0, 0.1, 12)
    low, high = interval((prompts + 1 + noise) - prompts)
    assert 0.8 < low < high < 1.2
    assert interval([30.0]) is None and interval([30.0, math.inf]) is None
    assert interval([3.0, 3.0]) == [3.0, 3.0]
