"""The result of a demo on the page: a table in HTML, and the files."""

from __future__ import annotations

import json
import logging
import math
from html import escape
from pathlib import Path
from typing import Any

VIDEOS = {"dense": "dense", "sparse": "sparse", "difference": "difference x 4"}
PLOTS = ("mask", "retained", "attention")


def read_result(folder: Path) -> dict:
    """Return the result of a demo. The reverse of ``save_json``: the texts of infinity are numbers again.

    Raises:
        ValueError: the file cannot be read.
    """
    try:
        result = json.loads((folder / "result.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read {folder / 'result.json'}: {error}") from None
    return {key: float(value) if value in ("inf", "-inf") else value for key, value in result.items()}


def read_example(folder: Path) -> dict | None:
    """Return the result in a folder, or None with a warning if it cannot be shown."""
    try:
        result = read_result(folder)
        result_title(result), result_table(result)
        return result
    except (KeyError, TypeError, ValueError) as error:
        logging.warning("no example in %s: %s", folder, error)
        return None


def result_files(folder: Path) -> list:
    """Return the videos, the plots and the downloads in a folder; None for a file that does not exist."""
    path = lambda name: str(folder / name) if (folder / name).exists() else None
    videos = [path(f"{name}.mp4") for name in VIDEOS]
    plots = [path(f"{name}.png") for name in PLOTS]
    return [*videos, *plots, [*map(str, sorted(folder.glob("*.mp4"))), str(folder / "result.json")]]


def result_title(result: dict) -> str:
    density = result["density_asked"]
    return f"{result['method']}{'' if density is None else f' at {density:g}'}: {result['prompt']}"


def result_table(result: dict) -> str:
    """Return the table of a result in HTML. All values are escaped."""
    number = lambda name, digits, unit="": _decimals(result[name], digits, unit)
    rows = [
        ("denoising time (s)", number("seconds_dense", 1), number("seconds_sparse", 1), number("speedup", 2, "x")),
        (
            "attention time (s)",
            number("attention_seconds_dense", 1),
            number("attention_seconds_sparse", 1),
            number("attention_speedup", 2, "x"),
        ),
        ("density: sparse calls / whole run", "1", f"{number('density_achieved', 3)} / {number('density_run', 3)}", ""),
        ("PSNR (dB) / SSIM", "", f"{number('psnr', 1)} / {number('ssim', 3)}", ""),
    ]
    row = lambda tag, cells: f"<tr>{''.join(f'<{tag}>{escape(str(cell))}</{tag}>' for cell in cells)}</tr>"
    head = row("th", ("", "dense", result["method"], "speedup"))
    conditions = (
        f"“{result['prompt']}”, seed {result['seed']}, {result['grid']} tokens, {result['steps']} steps, "
        f"{result['dense_steps']} of them dense, executor {result['executor']}, {result['device']}"
    )
    body = "".join(row("td", cells) for cells in rows)
    return f"<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{escape(conditions)}</p>"


def _decimals(value: Any, digits: int, unit: str) -> str:
    """Return a number as text; "-" if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}{unit}"
