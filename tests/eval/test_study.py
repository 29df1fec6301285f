"""Studies: errors of single steps, variants of a method, and the command."""

from __future__ import annotations

import json
from types import SimpleNamespace
from unittest.mock import Mock

import pytest
import torch
from typer.testing import CliRunner

import dit_sparse as ds
from dit_sparse.cli.main import app
from dit_sparse.eval.study import study as studies
from dit_sparse.eval.study.ablation import Variant, variants
from dit_sparse.eval.study.screening import record_trajectory, step_errors
from dit_sparse.generation.generate import load_pipeline
from dit_sparse.methods import method, name_of
from dit_sparse.methods.corrections.routed import Routed

PROMPT = "a red circle moves left"


CALL = {"num_inference_steps": 3, "num_frames": 2, "height": 32, "width": 32}


@pytest.fixture(scope="module")
def wan():
    return ds.prepare(load_pipeline("shapes-wan-i2v"))


def processor(name: str, density: float, dense_steps: int = 1) -> ds.SparseAttnProcessor:
    schedule = ds.Schedule(dense_steps=dense_steps)
    return ds.SparseAttnProcessor(name, density=density, schedule=schedule, block=16, min_tokens=0, executor="gather")


def test_every_step_starts_from_the_dense_latents(wan):
    """The latents after each step are those of the dense clip, and a step errs as much as if it were the only one."""
    dense = record_trajectory(wan, PROMPT, 0, CALL)
    steps = CALL["num_inference_steps"]
    assert len(dense.predictions) == len(dense.latents) == steps
    wan.set_attn_processor(processor("window", 0.2))
    forced = record_trajectory(wan, PROMPT, 0, CALL, dense=dense)
    free = record_trajectory(wan, PROMPT, 0, CALL)
    wan.set_attn_processor(None)
    assert all(a.equal(b) for a, b in zip(forced.latents, dense.latents, strict=True))
    error = lambda clip, step: float((clip.predictions[step] - dense.predictions[step]).norm())
    assert error(forced, 0) < 1e-4 < error(forced, 1) == pytest.approx(error(free, 1), rel=1e-3)
    last = step_errors(wan, processor("window", 0.2, steps - 1), PROMPT, 0, CALL, dense)
    every = step_errors(wan, processor("window", 0.2), PROMPT, 0, CALL, dense)
    assert every["errors"][-1] == pytest.approx(last["errors"][0], rel=1e-3)
    assert every["steps"] == list(range(1, steps)) and every["density_achieved"] == pytest.approx(0.2, abs=0.05)


def test_dense_plans_have_no_error_and_the_scheduler_is_restored(wan):
    dense = record_trajectory(wan, PROMPT, 0, CALL)
    assert max(step_errors(wan, processor("window", 1.0), PROMPT, 0, CALL, dense)["errors"]) < 1e-4
    assert "step" not in vars(wan.scheduler)


def test_pipelines_that_predict_twice_in_a_step_are_named():
    def generate(prompt, callback_on_step_end, **options):
        for _ in range(2):
            pipe.scheduler.step(torch.zeros(1), 0, torch.zeros(1))
        callback_on_step_end(pipe, 0, 0, {"latents": torch.zeros(1)})

    pipe = Mock(side_effect=generate, scheduler=SimpleNamespace(step=lambda *arguments: arguments))
    with pytest.raises(RuntimeError, match="step 0 of Mock made 2 predictions, not 1"):
        record_trajectory(pipe, PROMPT, 0, CALL)


def test_variants_leave_out_each_part_or_keep_it_alone():
    found = variants("routed(key_tile=8)")
    parts = ["density_ramp", "boxes", "tail", "spread", "every", "residual"]
    assert [one.part for one in found if one.kind == "left out"] == [*parts, "all"]
    assert [one.part for one in found if one.kind == "alone"] == parts
    by_name = {(one.part, one.kind): method(one.method) for one in found}
    assert by_name["boxes", "left out"] == Routed(key_tile=8, boxes=False)
    nothing = dict(density_ramp=None, boxes=False, tail=None, spread=False, every=None, residual=None)
    assert by_name["all", "left out"] == Routed(key_tile=8, **nothing)
    assert by_name["tail", "alone"] == Routed(key_tile=8, **nothing | {"tail": 16})
    assert variants("rettention(offload=true)") == [Variant("offload", "left out", name_of(method("rettention")))]
    with pytest.raises(ValueError, match="nothing to leave out"):
        variants("svg2")


def test_the_command_writes_rows_and_an_ablation_and_resumes(tmp_path, monkeypatch):
    options = ["--steps", "3", "--frames", "2", "--height", "32", "--width", "32", "--block", "16", "--prompts", "1"]
    command = [
        "study",
        "--methods",
        "svg",
        "--ablate",
        "sparge",
        "--dense-steps",
        "1",
        "--out",
        str(tmp_path),
        *options,
    ]
    first = CliRunner().invoke(app, command)
    assert first.exit_code == 0, first.output
    result = json.loads((tmp_path / "study.json").read_text())
    names = {row["name"] for row in result["rows"]}
    assert names == {"random_blocks 0.25", "svg 0.25", "sparge 0.25", "sparge(hilbert=false) 0.25"}
    errors = [row["error"] for row in result["rows"]]
    assert errors == sorted(errors) and min(errors) > 0
    report = (tmp_path / "study.md").read_text()
    assert ("| hilbert | left out | 0.25 |" in report and result["commit"] is None) or result["commit"] in report
    monkeypatch.setattr(studies, "record_trajectory", lambda *arguments: pytest.fail("all rows are stored"))
    again = CliRunner().invoke(app, command)
    assert again.exit_code == 0 and json.loads((tmp_path / "study.json").read_text())["rows"] == result["rows"]
