"""Prompt files, valid and invalid, and options that are refused before any work."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from batches import file_names, write_file
from dit_sparse.cli.main import app
from dit_sparse.demo.request import GenerationRequest
from dit_sparse.generation.checks import check_call, check_clip
from dit_sparse.generation.model_config import check_family, check_size, pipeline_config
from dit_sparse.generation.prompts import MAX_PROMPT, RESERVED_NAMES, Row, file_name, read_rows
from dit_sparse.notation.reading import read_json
from dit_sparse.output.files import save_json, writable_file, writable_folder
from dit_sparse.profiling.head_profile import Profile
from sparse_pipelines import cached_pipeline, generate


def test_one_prompt_per_line(tmp_path):
    path = write_file(tmp_path, "p.txt", b"\xef\xbb\xbfa red circle\r\n\n  a blue square \n")
    assert [(name, row.prompt) for name, row in read_rows(path)] == [
        ("0001-a_red_circle", "a red circle"),
        ("0002-a_blue_square", "a blue square"),
    ]


def test_any_line_ends_and_suffix_case(tmp_path):
    lines = read_rows(write_file(tmp_path, "p.TXT", b"a cat\ra dog\r\n"))
    table = read_rows(write_file(tmp_path, "p.csv", b"id, prompt\rx,a cat\ry,a dog\r"))
    assert [row.prompt for _, row in lines] == [row.prompt for _, row in table] == ["a cat", "a dog"]


def test_rows_with_settings_of_their_own(tmp_path):
    table = 'id,prompt,seed,density,dense_steps\ncat,"a cat, sleeping",7,0.3,2\n,a dog,,,0.5\n'
    objects = '{"id": "cat", "prompt": "a cat, sleeping", "seed": 7, "density": 0.3, "dense_steps": 2}\n'
    objects += '{"prompt": "a dog", "dense_steps": 0.5}\n'
    first, second = (read_rows(write_file(tmp_path, *one)) for one in (("p.csv", table), ("p.jsonl", objects)))
    assert first == second
    assert first[0] == ("cat", Row(id="cat", prompt="a cat, sleeping", seed=7, density=0.3, dense_steps=2))
    assert first[1][0] == "0002-a_dog" and isinstance(first[0][1].dense_steps, int)


@pytest.mark.parametrize(
    "name",
    [
        "../../etc/passwd",
        "/absolute/x",
        "..",
        "a/b\\c",
        "con\n",
        ".hidden",
        "x" * 150,
        "日本",
        "~",
        "a\0b",
        "COM1.x",
        "nul",
    ],
)
def test_names_are_safe_and_differ(name):
    safe = file_name(Row(prompt="p", id=name), 1)
    assert safe and Path(safe).name == safe and not safe.startswith((".", "-")) and len(safe) <= 100 and safe.isascii()
    assert safe != file_name(Row(prompt="p", id=name + "!"), 1) and safe.split(".")[0].lower() not in RESERVED_NAMES


def test_ids_that_become_safe_stay_different():
    assert len({file_name(Row(prompt="p", id=name), 1).lower() for name in ("a b", "a/b", "a?b", "a_b", "A b")}) == 5


@pytest.mark.parametrize(
    "name, content, words",
    [
        ("p.txt", "", "no prompts"),
        ("p.txt", "a cat\n\xff\n".encode("latin-1"), "line 2: not UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16"), "line 1: not UTF-8"),
        ("p.txt", "a cat\n".encode("utf-16-le"), "line 1: a zero byte"),
        ("p.txt", "a cat\0\n", "line 1: a zero byte"),
        ("p.txt", "\ufeff\n \n", "no prompts"),
        ("p.txt", "x" * 1_000_000, f"at most {MAX_PROMPT} characters"),
        ("p.csv", "", "a column 'prompt'"),
        ("p.csv", "prompt\n", "no prompts"),
        ("p.csv", "text\na cat\n", "a column 'prompt'"),
        ("p.csv", "id;prompt\nx;a cat\n", "commas between columns"),
        ("p.csv", "id,prompt,id\nx,a cat,y\n", "two columns of the same name"),
        ("p.csv", "id,prompt\nx\n", "line 2: prompt"),
        ("p.csv", "prompt\na cat,2\n", "line 2: more cells"),
        ("p.csv", "prompt,seed\na cat,many\n", "line 2: seed"),
        ("p.csv", "prompt,seed\na cat,-1\n", "line 2: seed"),
        ("p.csv", "prompt,density\na cat,nan\n", "line 2: density"),
        ("p.csv", "prompt,colour\na cat,red\n", "line 2: there is no setting 'colour'"),
        ("p.csv", 'prompt\n"a cat\n', "unexpected end of data"),
        ("p.csv", f"prompt\n{'x' * 200_000}\n", "field larger than field limit"),
        ("p.jsonl", '{"prompt": "a cat"}\n{"prompt"\n', "line 2: not JSON"),
        ("p.jsonl", "[" * 100_000, "line 1: not JSON"),
        ("p.jsonl", '["a cat"]\n', 'line 1: a row must be an object such as {"prompt"'),
        ("p.jsonl", '{"prompt": ["a cat"]}\n', "line 1: prompt"),
        ("p.jsonl", '{"prompt": "a", "\\u001b[2J": 1}\n', r"no setting '\x1b[2J'"),
        ("p.jsonl", '{"prompt": "a\\u0000b"}\n', "line 1: the prompt contains a zero byte"),
        ("p.jsonl", '{"prompt": "\\ud800"}\n', "line 1: prompt"),
        ("p.jsonl", '{"prompt": "a", "density": NaN}\n', "line 1: density"),
        ("p.jsonl", '{"prompt": "a", "guidance": 1e999}\n', "line 1: guidance"),
        ("p.jsonl", '{"prompt": "a", "frames": 1e300}\n', "line 1: frames"),
        ("p.jsonl", '{"prompt": "a", "steps": 1000000000}\n', "line 1: steps"),
        ("p.jsonl", '{"prompt": "a", "seed": true}\n', "line 1: seed cannot be true"),
        ("p.jsonl", f'{{"prompt": "a", "seed": {"9" * 5000}}}\n', "line 1"),
        ("p.jsonl", f'{{"prompt": "a", "id": "{"x" * 300}"}}\n', "line 1: id"),
        ("p.jsonl", '{"prompt": "  "}\n', "the prompt is empty"),
        ("p.jsonl", '{"prompt": "a", "frames": 0}\n', "line 1: frames"),
        ("p.jsonl", '{"id": "a", "prompt": "a"}\n{"id": "A", "prompt": "b"}\n', "already used in line 1"),
        ("p.doc", "a cat", "must be one of .txt, .csv, .jsonl"),
    ],
)
def test_an_invalid_file_is_one_sentence_and_nothing_is_written(tmp_path, name, content, words):
    run = CliRunner().invoke(app, ["batch", str(write_file(tmp_path, name, content)), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "row, words",
    [
        ({"method": "nope"}, "no method 'nope'"),
        ({"method": "radial(decay='x')"}, "decay of radial must be a number, got 'x'"),
        ({"method": "profile:nope"}, "no profile 'nope'"),
        ({"density": 2}, "density must be in"),
        ({"density": 0}, "density must be in"),
        ({"dense_steps": -1}, "dense_steps must be a count"),
        ({"id": "manifest"}, "would both be named manifest"),
    ],
)
def test_an_invalid_row_is_refused_before_any_work(tmp_path, row, words):
    path = write_file(tmp_path, "p.jsonl", json.dumps({"prompt": "a cat"} | row) + "\n")
    run = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, words",
    [
        (["--seed", "9" * 30], "seed must be in [0, 2**63)"),
        (["--guidance", "nan"], "guidance_scale must be in"),
        (["--frames", "9" * 30], "num_frames must be in"),
        (["--fps", "9" * 30], "fps must be in (0, 1000]"),
        (["--fps", "0"], "fps must be in (0, 1000]"),
        (["--executor", "nope"], "got 'nope'"),
    ],
)
def test_an_invalid_option_is_refused_before_any_work(tmp_path, options, words):
    path = write_file(tmp_path, "p.txt", "a red circle moves up\n")
    run = CliRunner().invoke(app, ["batch", str(path), *options, "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and words in run.output.replace("\n", " "), run.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("out", ["p.txt", "p.txt/deeper", "x" * 300])
def test_a_folder_that_cannot_be_written_is_refused_before_any_work(tmp_path, out):
    path = write_file(tmp_path, "p.txt", "a red circle moves up\n")
    run = CliRunner().invoke(app, ["batch", str(path), "--out", str(tmp_path / out)])
    assert run.exit_code == 2 and "cannot write into" in run.output, run.output
    assert file_names(tmp_path) == {"p.txt"}


@pytest.mark.parametrize("name", ["folder.txt", "nothing.csv"])
def test_a_missing_file_is_refused(tmp_path, name):
    (tmp_path / "folder.txt").mkdir()
    run = CliRunner().invoke(app, ["batch", str(tmp_path / name), "--out", str(tmp_path / "out")])
    assert run.exit_code == 2 and "cannot read" in run.output and not (tmp_path / "out").exists(), run.output


def test_only_regular_files_of_limited_size_are_read(tmp_path):
    """Reading a pipe would wait for ever, and a device or a large file would fill the memory."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("/dev/zero")
    with (tmp_path / "large").open("wb") as file:
        file.truncate(2**31)
    (tmp_path / "deep").write_text("[" * 200_000)
    (tmp_path / "binary").write_bytes(bytes(range(256)))
    reasons = {"pipe": "pipe or device", "link": "pipe or device", "large": "at most 64 MiB", "deep": "nested too deep"}
    reasons |= {"binary": "not UTF-8", "nothing": "No such file", ".": "it is a folder", "x" * 300: "too long"}
    for name, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            read_json(tmp_path / name)


LONG = "x" * 5_000


@pytest.mark.parametrize(
    "call",
    [
        lambda: read_rows(None),
        lambda: read_rows("str"),
        lambda: read_rows(f"{LONG}.txt"),
        lambda: read_json(LONG),
        lambda: pipeline_config(LONG),
        lambda: pipeline_config(None),
        lambda: check_family(LONG, {"_class_name": LONG}),
        lambda: check_family("model", {"_class_name": "Pipeline", "transformer": ["diffusers", LONG]}),
        lambda: Profile.load(LONG),
        lambda: writable_folder(LONG),
        lambda: writable_file(LONG),
        lambda: GenerationRequest(prompt="a cat", dense_steps=LONG),
        lambda: check_call({LONG: float("nan")}),
    ],
)
def test_messages_do_not_repeat_long_texts(call):
    with pytest.raises(ValueError) as error:
        call()
    assert len(str(error.value)) < 400 and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ({"height": 68, "width": 52}, "height must be a multiple of 16 for shapes-wan-i2v, got 68: choose 64 or 80"),
        ({"width": 8}, "width must be a multiple of 16 for shapes-wan-i2v, got 8: choose 16"),
        ({"num_frames": 1025}, "num_frames must be at most 1024 for shapes-wan-i2v, got 1025"),
    ],
)
def test_sizes_that_the_model_cannot_make_are_refused(size, words):
    check_size("shapes-wan-i2v", {"height": 80, "width": 64, "num_frames": 1024})
    with pytest.raises(ValueError, match=words):
        check_clip("a cat", 0, size, model="shapes-wan-i2v")


@pytest.mark.parametrize("family", ["cogvideox", "mochi", "ltx", "hunyuan_video"])
def test_sizes_are_refused_by_the_configs_of_a_folder(tmp_path, family):
    """The pipeline itself refuses the size only after loading, or fails at the first step."""
    stock = cached_pipeline(family)
    save_json(tmp_path / "model_index.json", dict(stock.pipe.config))
    multiple = stock.strides[2]
    check_size(str(tmp_path), {"height": 2 * multiple})
    with pytest.raises(ValueError, match=f"height must be a multiple of {multiple} for .*: choose {2 * multiple} or"):
        check_size(str(tmp_path), {"height": 5 * multiple // 2})
    with pytest.raises((ValueError, RuntimeError)):
        generate(stock, height=5 * multiple // 2)


def test_folders_without_configs_have_no_limits(tmp_path):
    for text in ("", "[]", '{"transformer": 3}', '{"transformer": []}'):
        (tmp_path / "model_index.json").write_text(text)
        check_size(str(tmp_path), {"height": 7})
