"""Prompt files, rows and folders of batches."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from dit_sparse.bundled import TEXT_MODEL
from dit_sparse.generation.batch import Batch
from dit_sparse.generation.prompts import Row

batch_of_any_prompts = partial(Batch, model=str(Path(__file__).parents[2] / "eval" / "models" / TEXT_MODEL))


def write_file(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def make_rows(*prompts: str, **settings) -> list:
    return [(f"c{number}", Row(prompt=prompt, **settings)) for number, prompt in enumerate(prompts)]


def file_names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def silent_stage(name):
    return lambda done, steps: None
