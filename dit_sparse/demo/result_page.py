"""The result of a demo on the page: a table in HTML, and the files."""

from __future__ import annotations

import json
import logging
import math
from html import escape
from pathlib import Path
from typing import Any

from dit_sparse import SparseAttnProcessor
from dit_sparse.methods import name_of

from ..generation.time_estimate import TimeEstimate
from ..notation.presets import PRESETS
from .form import CUSTOM

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
    return f"{result_method(result)}: {result['prompt']}"


def result_method(result: dict) -> str:
    """Return the preset, if any, with its method and density."""
    density = result["density_asked"]
    method = f"{result['method']}{'' if density is None else f' at density {density:g}'}"
    preset = example_preset(result)
    return method if preset is None else f"{preset} ({method})"


def example_preset(result: dict) -> str | None:
    """Return the preset of a result; None if it is not one of today's, or its method or density has changed."""
    preset = (result.get("preset") or "").partition(",")[0]
    if preset not in PRESETS:
        return None
    method = SparseAttnProcessor(preset).settings.method
    return preset if (name_of(method), method.density) == (result["method"], result["density_asked"]) else None


def example_values(result: dict) -> list:
    """Return the values of `Form.of_example` for a result."""
    density = result["density_asked"]
    method = [result["method"], 0.25 if density is None else density, density is None]
    call = [result["seed"], result["steps"], 0, 0, 0, "auto"]
    dense_steps = result["dense_steps"] / result["steps"]
    return [result["model"], result["prompt"], example_preset(result) or CUSTOM, *call, *method, dense_steps]


def estimate_text(estimate: TimeEstimate | None) -> str:
    """Return the sentence about the estimated time of both clips."""
    if estimate is None:
        return "The time cannot be estimated for this model."
    sparse = (
        "less for the sparse one" if estimate.sparse is None else f"{_duration(estimate.sparse)} for the sparse one"
    )
    times = f"about {_duration(estimate.dense)} for the dense clip and {sparse}"
    return f"Estimate: {times}, {estimate.tokens:,} tokens."


def _duration(seconds: float) -> str:
    """Return a time with two significant digits."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.{1 if seconds < 600 else 0}f} min"


def result_table(result: dict, kind: str = "Result") -> str:
    """Return a title and the table of a result in HTML. All values are escaped.

    Args:
        kind: first word of the title.
    """
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
    title = f"<h3>{escape(f'{kind}: {result_method(result)}')}</h3>"
    return f"{title}<table><thead>{head}</thead><tbody>{body}</tbody></table><p>{escape(conditions)}</p>"


def _decimals(value: Any, digits: int, unit: str) -> str:
    """Return a number as text; "-" if it is unknown."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}{unit}"
