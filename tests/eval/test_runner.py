"""The clip runner: keys of clips, order and timing of generation, attention errors."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dit_sparse import Schedule, SparseAttnProcessor
from dit_sparse.eval.comparison import recorder, runner
from dit_sparse.eval.comparison.clip_spec import DENSE_SPEC, ClipSpec, Sample
from dit_sparse.eval.comparison.runner import ClipRunner
from dit_sparse.generation.generate import Clip
from dit_sparse.output import environment

FRAMES = np.zeros((2, 8, 8, 3), np.uint8)
SAMPLE = Sample("a", 0)


def processor(method="svg", density=0.3, executor="gather", block=32, **schedule) -> SparseAttnProcessor:
    schedule = Schedule(**{"dense_steps": 1} | schedule)
    return SparseAttnProcessor(method, density=density, schedule=schedule, executor=executor, block=block, min_tokens=0)


def make_runner(folder, model="shapes-wan-i2v", prompts=("a", "b"), seeds=1, **call) -> ClipRunner:
    return ClipRunner(model, prompts, range(seeds), {"num_inference_steps": 4} | call, folder, Schedule(1))


def make_spec(**settings) -> ClipSpec:
    return ClipSpec("x", "x", 0.3, processor(**settings))


def no_progress(done, total):
    pass


# --- keys


def test_everything_that_affects_a_clip_is_in_its_key(tmp_path, monkeypatch):
    path = lambda clips, spec, sample=SAMPLE: clips.store._path(*clips.key(spec, sample))
    base, spec = make_runner(tmp_path), make_spec()
    paths = [path(base, spec), path(base, spec, Sample("b", 0)), path(base, spec, Sample("a", 1))]
    paths += [path(base, replace(spec, steps=3)), path(make_runner(tmp_path, height=64), spec)]
    changes = [{"method": "svg2"}, {"density": 0.4}, {"executor": "auto"}, {"block": 64}]
    changes += [{"dense_steps": 2}, {"dense_layers": 1}, {"replan_interval": 1}]
    paths += [path(base, make_spec(**change)) for change in changes]
    for name in ("source_digest", "method_digest", "versions", "device_name"):
        monkeypatch.setattr(runner, name, lambda *_: "another")
        paths.append(path(make_runner(tmp_path), spec))
    monkeypatch.setattr(runner, "weights_digest", lambda _: "another")
    paths.append(path(make_runner(tmp_path), spec))
    assert len(set(paths)) == len(paths)
    assert path(make_runner(tmp_path, prompts=("c", "a"), seeds=3), spec) == paths[-1]


def test_weights_identify_a_local_model(tmp_path):
    (tmp_path / "vae").mkdir()
    file = tmp_path / "vae" / "x.safetensors"
    file.write_bytes(b"12")
    before = environment.weights_digest(str(tmp_path))
    assert before == environment.weights_digest(str(tmp_path)) and environment.weights_digest("shapes-wan-i2v") is None
    file.write_bytes(b"123")
    assert environment.weights_digest(str(tmp_path)) != before
    assert environment.weights_digest("no-such-owner/no-such-model") is None


def test_sources_cover_the_code_that_generates_clips(tmp_path, monkeypatch):
    package = tmp_path / "dit_sparse"
    for name in ("engine/run.py", "generation/generate.py", "grid.py", "cli/main.py"):
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).write_text("code")
    monkeypatch.setattr(environment.dit_sparse, "__path__", [str(package)])
    before = environment.source_digest()
    (package / "cli" / "main.py").write_text("other code")
    assert environment.source_digest() == before
    for name in ("engine/run.py", "generation/generate.py", "grid.py"):
        (package / name).write_text("other code")
        changed = environment.source_digest()
        assert changed != before
        before = changed


def test_the_sources_of_a_method_are_its_own_files_and_what_they_import(tmp_path, monkeypatch):
    digest = lambda text: environment.method_digest(SparseAttnProcessor(text).settings.method)
    assert digest("radial") != digest("radial|sink") and digest("radial") == digest("radial(sink=true)")
    names = ("radial", "vdit", "svg", "pooled(svg)", "asa", "cached(asa)")
    before = {name: digest(name) for name in names}
    other = tmp_path / "svg.py"
    other.write_text("other code")
    monkeypatch.setattr(sys.modules["dit_sparse.methods.patterns.svg"], "__file__", str(other))
    changed = [name for name in names if digest(name) != before[name]]
    assert changed == ["vdit", "svg", "pooled(svg)"], "vdit imports the bands of svg"
    foreign = type("Foreign", (type(processor("svg").settings.method),), {"__module__": "test_foreign"})
    monkeypatch.setitem(sys.modules, "test_foreign", SimpleNamespace(__file__=str(other)))
    assert environment.method_digest(foreign()) != digest("svg"), "methods of other packages count as well"


# --- generation


class FakePipe:
    """Records the processor that is set."""

    def set_attn_processor(self, processor):
        self.processor = processor
        report = SimpleNamespace(as_dict=dict)
        self.sparse_run = SimpleNamespace(observe=lambda observer: None, report=lambda: report)


@pytest.fixture
def calls(monkeypatch) -> list[tuple]:
    """Calls of ``generate``: prompt, seed, steps, first sparse step. A clip takes 10 s, its measurements 3 s."""
    calls = []

    def generate(pipe, prompt, seed, call, progress=None, observer=None):
        steps = call["num_inference_steps"]
        calls.append((prompt, seed, steps, pipe.processor.settings.schedule.first_sparse_step(steps)))
        for step in range(steps if observer else 0):
            observer(step, steps, torch.full((1, 2), 1 / 3 + seed))
        return Clip(FRAMES, 10.0)

    monkeypatch.setattr(runner, "generate", generate)
    monkeypatch.setattr(recorder, "Stopwatch", lambda: SimpleNamespace(seconds=3.0, timing=lambda _: nullcontext()))
    monkeypatch.setattr(ClipRunner, "pipe", FakePipe())
    return calls


def test_measurements_and_warm_up_are_not_timed(tmp_path, calls):
    clips = make_runner(tmp_path)
    for spec in (DENSE_SPEC, make_spec()):
        calls.clear()
        clips.generate_missing([spec], no_progress)
        warm_up, *timed = calls
        assert warm_up[2:] == (1, 0), "one step, which is sparse"
        assert [(prompt, steps) for prompt, _, steps, _ in timed] == [("a", 4), ("b", 4)]
        assert all(clip.metadata["seconds"] == 7 for clip, _ in clips.clip_pairs(spec))
        clips.generate_missing([spec], no_progress)
        assert len(calls) == 3


def test_rows_take_turns_and_warm_up_once(tmp_path, calls):
    specs, progress = [DENSE_SPEC, make_spec(), replace(make_spec(), method="y")], []
    clips = make_runner(tmp_path)
    clips.generate_missing(specs[:2], no_progress)
    calls.clear()
    clips.generate_missing(specs, lambda *counts: progress.append(counts))
    assert [(prompt, steps) for prompt, _, steps, _ in calls] == [("a", 1), ("a", 4), ("b", 4)]
    assert progress[0] == (0, 8) and progress[-1] == (8, 8), "steps of the missing clips"
    assert [a / b for a, b in progress] == sorted(a / b for a, b in progress)
    calls.clear()
    make_runner(tmp_path / "other").generate_missing(specs, no_progress)
    assert [prompt for prompt, _, steps, _ in calls if steps == 4] == ["a"] * 3 + ["b"] * 3
    assert sum(steps == 1 for *_, steps, _ in calls) == 3


def test_a_row_that_fails_does_not_stop_the_others(tmp_path, calls, monkeypatch, caplog):
    generate = runner.generate

    def fail(pipe, prompt, *arguments):
        if pipe.processor.settings.method.density == 0.4 and prompt == "b":
            raise RuntimeError("no memory\nmore")
        return generate(pipe, prompt, *arguments)

    specs = [DENSE_SPEC, make_spec(density=0.4), replace(make_spec(), requested_as="y", method="y")]
    clips, progress = make_runner(tmp_path, prompts=("a", "b", "c")), []
    with monkeypatch.context() as patch:
        patch.setattr(runner, "generate", fail)
        assert clips.generate_missing(specs, lambda *counts: progress.append(counts)) == {"x 0.3": "no memory"}
    assert progress[-1] == (36, 36) and "x 0.3 failed" in caplog.text
    stored = lambda: [len([clip for clip, _ in clips.clip_pairs(spec) if clip]) for spec in specs]
    assert stored() == [3, 1, 3]
    assert clips.generate_missing(specs, no_progress) == {} and stored() == [3, 3, 3]


def test_failing_dense_attention_stops_a_comparison(tmp_path, calls, monkeypatch):
    monkeypatch.setattr(runner, "generate", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_runner(tmp_path).generate_missing([DENSE_SPEC, make_spec()], no_progress)


def test_larger_comparisons_generate_only_missing_clips(tmp_path, calls):
    make_runner(tmp_path, prompts=("a",)).generate_missing([DENSE_SPEC], no_progress)
    calls.clear()
    make_runner(tmp_path, prompts=("new", "a"), seeds=2).generate_missing([DENSE_SPEC], no_progress)
    assert [call[:2] for call in calls[1:]] == [("new", 0), ("new", 1), ("a", 1)]


def test_equal_latents_have_no_error_after_rounding(tmp_path, calls):
    clips = make_runner(tmp_path)
    clips.generate_missing([DENSE_SPEC], no_progress)
    clips.generate_missing([make_spec()], no_progress)
    for clip, dense in clips.clip_pairs(make_spec()):
        assert clip.metadata["latent_error"] == [[step, 0.0] for step in range(4)]
        assert dense.latents.dtype == np.float16 and dense.latents.shape == (4, 1, 2)


def test_attention_errors_are_stored_by_clip_and_settings(tmp_path, calls, monkeypatch):
    measured = []
    measurements = SimpleNamespace(error=torch.full((1, 2, 2), 0.25))
    monkeypatch.setattr(runner.probe, "measure_candidates", lambda *_: measured.append(1) or measurements)
    shared = {"call": {}, "folder": tmp_path, "schedule": Schedule(1)}
    setups = [{"prompts": ["a"], "seeds": [0]}, {"prompts": ["b"], "seeds": [0]}, {"prompts": ["a"], "seeds": [1]}]
    setups += [setups[0] | {"executor": "gather"}, setups[0] | {"block": 32}, setups[0] | {"schedule": Schedule(2)}]
    for count, setup in enumerate(setups, 1):
        for _ in range(2):
            clips = ClipRunner("shapes-wan-i2v", **shared | setup)
            assert clips.attention_errors([make_spec()], no_progress) == {"x": 0.5}
        assert len(measured) == count


def test_attention_errors_of_further_methods_are_added_and_failing_ones_left_out(tmp_path, calls, monkeypatch):
    measured = []

    def measure(pipe, generate, candidates, *_):
        measured.append([candidate.name for candidate in candidates])
        if "bad" in measured[-1]:
            raise ValueError("no")
        return SimpleNamespace(error=torch.full((len(candidates), 2, 2), 0.25))

    monkeypatch.setattr(runner.probe, "measure_candidates", measure)
    monkeypatch.setattr(runner, "PROBED_TOGETHER", 2)
    specs = [replace(make_spec(method=method), method=name) for name, method in
             {"a": "svg", "b": "radial", "bad": "window", "c": "asa"}.items()]  # fmt: skip
    clips = make_runner(tmp_path)
    assert clips.attention_errors(specs[:1], no_progress) == {"a": 0.5}
    assert clips.attention_errors(specs, no_progress) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert measured == [["a"], ["b", "bad"], ["b"], ["bad"], ["c"]]


def test_default_steps_of_a_pipeline_are_checked(monkeypatch, tmp_path):
    class Pipe:
        def __call__(self, prompt, num_inference_steps=50):
            pass

    monkeypatch.setattr(runner, "load_pipeline", lambda model: Pipe())
    monkeypatch.setattr(runner, "prepare", lambda pipe: pipe)
    assert isinstance(ClipRunner("x", ["a"], [0], {}, tmp_path, Schedule(49)).pipe, Pipe)
    with pytest.raises(ValueError, match="keeps all 50 steps dense"):
        _ = ClipRunner("x", ["a"], [0], {}, tmp_path, Schedule(50)).pipe
