"""The commands: help, output, files, and one-sentence errors."""

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, WanTransformer3DModel
from typer.testing import CliRunner

from dit_sparse import METHODS, __version__
from dit_sparse.cli.main import app
from dit_sparse.cli.options import call_arguments, count_or_fraction, method_list
from dit_sparse.cli.terminal import one_sentence
from dit_sparse.generation.batch import Batch
from dit_sparse.generation.loading import LoadOptions
from dit_sparse.kernels.executors import EXECUTORS
from dit_sparse.methods import KINDS, method
from dit_sparse.output.media import read_video, save_video

STATIC = [name for name in METHODS if method(name, density=0.5).static]
GRID = ("--grid", "226+3x9x10", "--density", "0.5", "--block", "32")
COMMANDS = sorted(typer.main.get_command(app).commands)


def call(*arguments: str):
    return CliRunner().invoke(app, [str(a) for a in arguments])


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("bench", "eval")])
def test_every_command_has_help_with_an_example(command):
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"Example: dit-sparse {command}" in result.output


@pytest.mark.parametrize(
    "command",
    [("bench", name) for name in ("attention", "transformer", "scaling", "tail", "planning")]
    + [("eval", name) for name in ("video", "export", "attention")],
    ids=" ".join,
)
def test_commands_of_groups_have_help_with_an_example(command):
    result = call(*command, "--help")
    assert result.exit_code == 0
    assert f"Example: dit-sparse {' '.join(command)}" in result.output


def test_version():
    output = call("--version").output
    assert re.fullmatch(rf"dit-sparse {re.escape(__version__)}( \([0-9a-f]+\+?\))?", output.strip())


def test_methods_are_listed_by_kind():
    output = call("methods").output
    assert all(re.search(rf"^  {name} ", output, re.MULTILINE) for name in METHODS)
    assert max(map(len, output.splitlines())) <= 80 and "\N{HORIZONTAL ELLIPSIS}" not in output
    titles = re.findall(r"^([A-Z]\w+s): ", output, re.MULTILINE)
    assert titles == [*(f"{kind}s".capitalize() for kind in KINDS), "Presets"]
    output = call("methods", "--kind", "scorer,layout").output
    assert all(name in output for name in KINDS["scorer"] | KINDS["layout"]) and "neighborhood" not in output


def test_methods_as_json():
    rows = json.loads(call("methods", "--json").output)
    assert [row["name"] for row in rows] == list(METHODS)
    for row in rows:
        assert row["kind"] in KINDS and row["summary"] and row["source"] == row["paper"]["url"]
        assert row["source"].startswith("https://") and isinstance(row["settings"], dict)
        assert row["paper"]["title"] or not row["paper"]["arxiv"], row["name"]
        assert set(row["needs"]) <= {"values", "log-sum-exp", "profile", "gate weights"}
    by_name = {row["name"]: row for row in rows}
    assert by_name["sol"]["needs"] == ["log-sum-exp"] and by_name["radial"]["needs"] == []
    paper = by_name["vdit"]["paper"]
    assert paper["title"].startswith("Sparse-vDiT: ") and paper["authors"] == "P. Chen et al."
    assert paper["arxiv"] == "2506.03065"
    rows = json.loads(call("methods", "--kind", "layout", "--json").output)
    assert [row["name"] for row in rows] == list(KINDS["layout"])


def test_methods_describes_the_named_ones():
    output = call("methods", "radial", "sol").output
    assert "sink=false" in output and "arxiv.org/abs/2506.19852" in output and "needs     log-sum-exp" in output
    assert "svg2" not in output
    misspelt = call("methods", "radail")
    assert misspelt.exit_code == 2 and "did you mean 'radial'?" in misspelt.stderr
    misspelt = call("methods", "--kind", "scorers")
    assert misspelt.exit_code == 2 and "there is no kind 'scorers'; there are pattern, " in misspelt.stderr


@pytest.mark.parametrize("text", [*STATIC, "radial(sink=true)", "radial|sink(frames=2)", "pooled(window)"])
def test_show_draws_in_the_terminal(text):
    result = call("show", text, *GRID)
    assert result.exit_code == 0, result.output
    assert "226 text + 3x9x10" in result.output


def test_show_draws_to_a_file(tmp_path):
    assert call("show", "radial|sink(frames=2)", *GRID, "--png", tmp_path / "m.png").exit_code == 0
    assert (tmp_path / "m.png").stat().st_size > 1000


def test_show_prints_the_canonical_text_and_the_density():
    shown = lambda *arguments: call("show", *arguments).output.splitlines()[-1]
    assert shown("radial( sink=true, decay=0.2 )").startswith("radial(decay=0.2, sink=true)  21x20x20")
    assert shown("radial").endswith("density 0.250") and shown("radial(density=0.4)").endswith("density 0.400")
    lines = call("show", "radial", "--density", "0.2").output.splitlines()
    assert re.match(r"settings at this density: radial\(decay=0.0001, min_width=0.\d+\)", lines[-2])
    lines = call("show", "radial", "--density", "0.001").output.splitlines()
    assert lines[-2].startswith("density 0.001 requested: what every row keeps, such as text and its own block, is")


@pytest.mark.parametrize("text", [name for name in METHODS if name not in STATIC] + ["cached(radial)", "pooled(svg)"])
def test_show_refuses_methods_that_need_queries(text):
    result = call("show", text)
    assert result.exit_code == 2 and "plans from queries and keys" in result.stderr, result.output


def test_doctor_lists_every_executor():
    result = json.loads(call("doctor", "--json", "--quick").stdout)
    assert set(result["executors"]) == set(EXECUTORS)
    assert result["executors"]["gather"] == "ok"
    assert re.search("not checked|needs a C", result["executors"]["flex"]), "it would compile for a while"
    assert result["versions"]["torch"]


BAD = {
    "unknown method": (["show", "nonsense"], "no method 'nonsense'"),
    "misspelt method": (["generate", "a red circle moves up", "--method", "radail"], "did you mean 'radial'?"),
    "misspelt setting": (["generate", "a red circle moves up", "-m", "radial(dekay=1)"], "did you mean 'decay'?"),
    "misspelt profile": (
        ["generate", "a red circle moves up", "-m", "profile:shapes_wan"],
        "did you mean 'shapes-wan'?",
    ),
    "misspelt preset": (
        ["generate", "a red circle moves up", "--preset", "quick"],
        "there is no preset 'quick'; there are quality",
    ),
    "method and preset": (
        ["generate", "a red circle moves up", "--preset", "fast", "-m", "svg"],
        "--method and --preset exclude",
    ),
    "misspelt data type": (["generate", "a red circle moves up", "--dtype", "float"], "did you mean 'float32'?"),
    "offload without a GPU": (["generate", "a red circle moves up", "--offload", "model"], "there is no GPU"),
    "missing profile": (
        ["generate", "a red circle moves up", "--profile", "shapes_wan"],
        "did you mean 'shapes-wan'?",
    ),
    "type of a setting": (["demo", "-m", "radial(decay=x)"], "decay of radial must be a number, got 'x'"),
    "open parenthesis": (["demo", "-m", "radial(decay=1"], "expected ',' or ')' (character 15)"),
    "deep nesting": (["demo", "-m", "pooled(" * 10_000], "nested more than 32 levels deep"),
    "density of a profile": (["demo", "-m", "profile:shapes-wan-i2v", "-d", "0.3"], "takes no density"),
    "two densities": (["demo", "-m", "radial(density=0.2)", "-d", "0.3"], "density of radial is given twice"),
    "density 0": (["demo", "--density", "0"], "density must be in (0, 1]"),
    "density 2": (["generate", "a red circle moves up", "--density", "2"], "density must be in (0, 1]"),
    "grid": (["show", "radial", "--grid", "4x4"], "grid"),
    "executor": (["demo", "--executor", "warp"], "'warp'"),
    "dense steps": (["demo", "--dense-steps", "some"], "--dense-steps must be a count"),
    "dense steps above 1": (["demo", "--dense-steps", "1.5"], "dense_steps must be a count"),
    "one step": (["demo", "--steps", "1"], "at least 2 steps"),
    "not an mp4": (["generate", "a red circle moves up", "--out", "x.gif"], "must be a file that ends in .mp4"),
    "no frames": (["generate", "a red circle moves up", "--frames", "0"], "num_frames must be in [1, 100000], got 0"),
    "no model": (
        ["generate", "a red circle moves up", "--model", "./nowhere"],
        "cannot load the model ./nowhere: it is not a diffusers pipeline",
    ),
    "block": (["show", "radial", "--block", "7"], "block must be in [16, 256]"),
    "no frames per second": (["generate", "a red circle moves up", "--fps", "0"], "fps must be in (0, 1000], got 0"),
    "guidance": (["generate", "a red circle moves up", "--guidance", "nan"], "guidance_scale must be in"),
    "infinite guidance": (["generate", "a red circle moves up", "--guidance", "inf"], "guidance_scale must be in"),
    "seed": (["generate", "a red circle moves up", "--seed", "-1"], "the seed must be in [0, 2**63), got -1"),
    "no prompt": (["generate", " "], "the prompt is empty"),
    "empty prompt of the demo": (["demo", "--prompt", ""], "the prompt is empty"),
    "large clip": (
        ["generate", "a red circle moves up", "--height", "99999", "--width", "99999", "--frames", "9999"],
        "a smaller clip",
    ),
    "long name": (["generate", "a red circle moves up", "--out", "a" * 300 + ".mp4"], "File name too long"),
    "folder in the way": (
        ["generate", "a red circle moves up", "--out", "f.mp4"],
        "must be a file, got the folder f.mp4",
    ),
    "device in the way": (["generate", "a red circle moves up", "--out", "d.mp4"], "exists and is not a file"),
    "format of a plot": (["show", "radial", "--png", "mask.xyz"], "--png must end in"),
    "profile as a folder": (["profile", "shapes-wan-i2v", "--out", "f.json"], "must be a file, got the folder f.json"),
    "output": (["demo", "--out", "/proc/nothing"], "cannot write into"),
}


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_input_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for folder in ("f.mp4", "f.json"):
        (tmp_path / folder).mkdir()
    os.mkfifo(tmp_path / "d.mp4")
    result = call(*arguments)
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert "Traceback" not in result.output + result.stderr
    assert len(result.stderr.strip().splitlines()) == 1
    assert not any(path.is_file() for path in tmp_path.rglob("*"))


def test_a_damaged_model_folder_is_refused(tmp_path):
    (tmp_path / "model_index.json").write_text('{"_class_name": "WanPipeline"')
    result = call("generate", "x", "--model", tmp_path, "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2
    assert "cannot load the model" in result.stderr
    assert not (tmp_path / "x.mp4").exists()


@pytest.mark.parametrize(
    "content",
    [b"", b"[1]", b"\0" * 100, b"[" * 200_000, b'{"_class_name": 1}', b'{"_class_name": "WanPipeline"}'],
    ids=["empty", "a list", "binary", "deep nesting", "no name", "no transformer"],
)
def test_a_model_folder_that_is_no_pipeline_is_refused(tmp_path, content):
    (tmp_path / "model_index.json").write_bytes(content)
    result = call("generate", "x", "--model", tmp_path, "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2 and len(result.stderr.strip().splitlines()) == 1, result.stderr


def test_a_model_without_an_adapter_is_refused_before_its_weights_are_read(tmp_path, monkeypatch):
    config = {"_class_name": "SanaPipeline", "transformer": ["diffusers", "SanaTransformer2DModel"]}
    (tmp_path / "model_index.json").write_text(json.dumps(config))
    monkeypatch.setattr(DiffusionPipeline, "from_pretrained", None)
    result = call("generate", "x", "--model", tmp_path, "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2 and "has a SanaTransformer2DModel, which no adapter" in result.stderr, result.stderr
    monkeypatch.setattr(DiffusionPipeline, "load_config", lambda name, **_: config)
    result = call("generate", "x", "--model", "owner/name", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2 and "owner/name has a SanaTransformer2DModel" in result.stderr, result.stderr
    config["transformer"] = ["diffusers", "FluxTransformer2DModel"]
    result = call("generate", "x", "--model", "owner/name", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2 and "FluxTransformer2DModel, which generates images" in result.stderr, result.stderr


@pytest.mark.parametrize(("reason", "words"), [("Gated", "is restricted"), ("RepositoryNotFound", "no such model")])
def test_a_failed_download_names_its_reason(tmp_path, monkeypatch, reason, words):
    def load_config(name, **_):
        try:
            raise type(f"{reason}RepoError" if reason == "Gated" else f"{reason}Error", (OSError,), {})()
        except OSError:
            raise OSError("a long\nmessage") from None

    monkeypatch.setattr(DiffusionPipeline, "load_config", load_config)
    result = call("generate", "x", "--model", "owner/name", "--out", tmp_path / "x.mp4")
    assert result.exit_code == 2 and words in result.stderr, result.stderr


@pytest.mark.parametrize("content", ["x = " + "[" * 5_000, "call = 1", "\0", "[call]\n", "published = [1]"])
def test_a_recipe_that_cannot_be_read_is_one_sentence(tmp_path, content):
    (tmp_path / "r.toml").write_text(content)
    result = call("reproduce", tmp_path / "r.toml", "--out", tmp_path / "out")
    assert result.exit_code == 2 and str(tmp_path) in result.stderr, result.output
    assert len(result.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("error", "code", "words"),
    [
        (TypeError("two\nlines"), 2, "TypeError: two"),
        (AttributeError("x"), 2, "AttributeError: x"),
        (MemoryError(), 2, "out of memory"),
        (RecursionError("depth"), 2, "nested too deep"),
        (KeyError("x"), 2, "KeyError: 'x'"),
        (RuntimeError("x\ny"), 1, "dit-sparse: x"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_any_error_is_one_sentence(error, code, words, capsys):
    with pytest.raises(typer.Exit) as end, one_sentence():
        raise error
    output = capsys.readouterr().err
    assert end.value.exit_code == code and words in output and len(output.splitlines()) == 1


@pytest.mark.parametrize("name", ["a" * 249, "视频 [1] é [bold]x"])
def test_any_name_that_the_file_system_allows_is_written(tmp_path, name):
    save_video(tmp_path / f"{name}.mp4", np.zeros((1, 17, 19, 3), np.uint8), 8)
    frames, _ = read_video(tmp_path / f"{name}.mp4")
    assert frames.shape[0] == 1 and [path.stem for path in tmp_path.iterdir()] == [name]


def test_a_video_of_odd_size_is_even_and_a_warning_says_so(tmp_path, caplog):
    save_video(tmp_path / "odd.mp4", np.zeros((2, 385, 401, 3), np.uint8), 8)
    assert read_video(tmp_path / "odd.mp4")[0].shape == (2, 384, 400, 3) and "even heights" in caplog.text


def test_frames_and_latents_that_are_not_finite_are_reported(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="50% of the values of the frames are NaN or infinite"):
        save_video(tmp_path / "x.mp4", np.array([0.5, np.nan] * 6).reshape(1, 2, 2, 3), 8)
    monkeypatch.setattr(WanTransformer3DModel, "forward", lambda *_, hidden_states, **__: (hidden_states * np.nan,))
    size = ("--steps", "2", "--frames", "2", "--height", "32", "--width", "32", "--out", tmp_path / "x.mp4")
    result = call("generate", "a red circle moves up", *size)
    assert result.exit_code == 1 and "latents contain NaN or infinity after step 1 of 2" in result.stderr, result.output
    assert not list(tmp_path.iterdir())


def test_an_incomplete_video_is_not_written(tmp_path):
    resource = pytest.importorskip("resource")
    noise = np.random.default_rng(0).integers(0, 255, (4, 96, 96, 3), np.uint8)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, before[1]))
    try:
        with pytest.raises(OSError, match=r"x.mp4 is incomplete: is the disk full\?"):
            save_video(tmp_path / "x.mp4", noise, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("radial", "radial: density requested 0.250"),
        ("radial(sink=true)", "radial(sink=true): density requested -"),
        (
            "cached(subblock(subblocks=2, density=0.3), replan_interval=1)",
            "cached(subblock(subblocks=2), replan_interval=1): ",
        ),
        ("profile:shapes-wan-i2v", "profile:shapes-wan-i2v: density requested -"),
    ],
)
def test_generate_writes_a_video(text, line, tmp_path):
    size = ("--steps", "2", "--frames", "2", "--height", "32", "--width", "32")
    out = tmp_path / f"{'v' * 200}.mp4"
    result = call("generate", "a blue square moves up", "-m", text, *size, "--dense-steps", "1", "--out", out)
    assert result.exit_code == 0, result.output
    assert out.stat().st_size > 1000 and f": {out} and its .json\n" in result.output, "the path is printed on one line"
    assert line in result.output, result.output


def test_generate_writes_what_it_did_next_to_the_video(tmp_path):
    size = ("--steps", "2", "--frames", "2", "--height", "32", "--width", "32", "--dense-steps", "1")
    options = ("--preset", "fast", "--negative-prompt", "red", "--dtype", "float32", "--seed", "3")
    result = call("generate", "a blue square moves up", *size, *options, "--out", tmp_path / "x.mp4", "--json")
    assert result.exit_code == 0, result.output
    stored = json.loads((tmp_path / "x.json").read_text())
    assert json.loads(result.stdout) == stored
    asked, report = stored["asked"], stored["report"]
    assert (asked["prompt"], asked["seed"], asked["fps"], asked["preset"]) == ("a blue square moves up", 3, 8, "fast")
    assert asked["call"]["negative_prompt"] == "red" and asked["model"] == "shapes-wan-i2v"
    assert report["method"] == "asa" and report["schedule"]["dense_steps"] == 1 and report["preset"].startswith("fast")
    assert report["density_asked"] == 0.25 and report["sparse_calls"] > 0 and asked["dtype"] == "float32"
    assert stored["versions"]["torch"] and {"commit", "device", "video_sha256"} <= stored.keys()


def test_a_batch_takes_a_preset_and_a_negative_prompt(tmp_path, monkeypatch):
    """Rows may have their own."""
    (tmp_path / "p.csv").write_text(
        "prompt,method,negative_prompt\na red circle moves up,,\na blue square moves up,radial,blue\n"
    )
    jobs = []
    manifest = {"count": {"done": 2, "failed": 0, "missing": 0}, "clips": []}
    monkeypatch.setattr(Batch, "run", lambda batch, stage: jobs.extend(batch.jobs()) or manifest)
    options = ("--preset", "fast", "--negative-prompt", "red", "--dtype", "float16", "--json")
    assert json.loads(call("batch", tmp_path / "p.csv", "--out", tmp_path / "out", *options).stdout) == manifest
    assert [job.processor.settings.preset for job in jobs] == ["fast", None]
    assert [job.call["negative_prompt"] for job in jobs] == ["red", "blue"]
    assert [job.settings["dtype"] for job in jobs] == ["float16", "float16"]


def test_presets_are_listed():
    output = call("presets").output
    assert (
        "balanced (default)" in output and "HunyuanVideoTransformer3DModel" in output and "arXiv:2505.18875" in output
    )
    assert max(map(len, output.splitlines())) <= 80
    assert json.loads(call("presets", "--json").output)["fast"]["method"] == "asa(density=0.25)"


def test_loaded_pipelines_are_placed_by_the_options(monkeypatch):
    calls = []
    pipe = SimpleNamespace(
        vae=SimpleNamespace(enable_tiling=lambda: calls.append("tiling")),
        to=lambda device: calls.append(device) or pipe,
        enable_sequential_cpu_offload=lambda: calls.append("sequential"),
    )
    assert LoadOptions(vae_tiling=True).place(pipe, "cpu") is pipe and calls == ["tiling", "cpu"]
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert LoadOptions(offload="sequential").place(pipe, "cuda") is pipe and calls[2:] == ["sequential"]
    assert LoadOptions("float16").torch_dtype(torch.float32) == torch.float16
    with pytest.raises(ValueError, match="the autoencoder of SimpleNamespace cannot decode in tiles"):
        LoadOptions(vae_tiling=True).place(SimpleNamespace(), "cpu")


@pytest.mark.parametrize(("text", "value"), [(None, None), ("3", 3), ("0.2", 0.2), ("1.0", 1.0)])
def test_a_count_is_an_integer_and_a_fraction_is_a_float(text, value):
    parsed = count_or_fraction(text)
    assert parsed == value and type(parsed) is type(value)


def test_lists_of_methods_are_split_outside_parentheses():
    assert method_list("radial(sink=true, decay=0.2), svg@0.3,,pooled(svg)@own") == [
        "radial(sink=true, decay=0.2)",
        "svg@0.3",
        "pooled(svg)@own",
    ]


def test_call_arguments_are_those_that_are_given():
    assert call_arguments(steps=4, guidance=0.0) == {"num_inference_steps": 4, "guidance_scale": 0.0}
    with pytest.raises(ValueError, match=r"num_inference_steps must be in \[2, 100000\], got 1"):
        call_arguments(steps=1, min_steps=2)


def test_the_installed_command_answers():
    answer = subprocess.run([sys.executable, "-m", "dit_sparse.cli", "--help"], capture_output=True, text=True)
    assert answer.returncode == 0 and "generate" in answer.stdout
