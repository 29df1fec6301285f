"""Merging of finished comparisons that were made on different machines or at different times."""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Callable, Iterable, Sequence
from io import BytesIO

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from dit_sparse.eval.quality.fidelity import psnr
from dit_sparse.eval.quality.measures import MEASURES
from dit_sparse.grid import short_repr
from dit_sparse.output.files import json_values

from .result_schema import check_result
from .summary import gain_over_random

CONDITIONS = ("model", "call", "prompts", "seeds", "first_seed", "schedule", "block", "steps", "grids")
SAME_DENSE_PSNR = 25.0  # dB; film strips of dense clips from other noise or other weights have about 15 dB
_DEFAULTS = {"first_seed": 0, "block": None, "kinds": [], "failures": []}  # older results do not contain these
_SCHEDULE_DEFAULTS = {"dense_layers": 0, "replan_interval": 2, "per_branch": False, "density_ramp": None}


def merge_results(results: Sequence[dict], names: Sequence[str] = ()) -> dict:
    """Return one result with the rows of several comparisons of the same model, call, schedule, prompts and seeds.

    Devices, commits, versions and executors may differ: every row keeps its ``device``, ``commits`` and ``executor``,
    and its speedups are over the dense run of its own comparison. A row that several results contain is taken from the
    first of them; ``differences`` lists the numbers that the others have instead.

    Args:
        results: contents of ``compare.json``, at least one. A merged result can be merged again.
        names: what messages call the results. Default: ``result 1``, ``result 2``, ...

    Returns:
        A result as ``Comparison.run`` returns it, with ``sources``: the device, commit, versions, executor and number
        of rows of every comparison.

    Raises:
        ValueError: there is no result, one is unfinished or invalid, or conditions differ.
    """
    if not results:
        raise ValueError("there is no result to merge: give at least one")
    names = list(names) or [f"result {number}" for number in range(1, len(results) + 1)]
    results = [_complete(result, name) for result, name in zip(results, names, strict=True)]
    for result, name in zip(results[1:], names[1:], strict=True):
        if reason := _why_not_mergeable(results[0], result):
            raise ValueError(f"{name} cannot be merged with {names[0]}: {reason}")
    rows, differences = _merge_rows(results)
    for row in rows:
        row["over_random"] = row["over_random"] or gain_over_random(row, rows, results[0]["seeds"])
    failures = {failure["name"]: failure for result in results for failure in result["failures"]}
    sources = [source for result in results for source in result["sources"]]
    kinds = _unique(result["kinds"] for result in results) if all(result["kinds"] for result in results) else []
    merged = results[0] | {
        "kinds": kinds,
        "densities": sorted(_unique(result["densities"] for result in results)),
        "executor": _join(source["executor"] for source in sources),
        "quality": any(row["quality"] for row in rows),
        "device": _join(source["device"] for source in sources),
        "versions": _join_versions([source["versions"] for source in sources]),
        "commit": _join(source["commit"] for source in sources),
        "failures": [failure for name, failure in failures.items() if name not in {row["name"] for row in rows}],
        "sources": sources,
        "differences": differences,
        "rows": rows,
    }
    check_result(merged)
    return merged


def _complete(result: dict, name: str) -> dict:
    """Return a result with the keys that older ones lack, and with device, commits and executor in every row."""
    result = json.loads(json.dumps(json_values(result)))  # lists instead of tuples, as in a file
    try:
        check_result(result)
    except ValueError as error:
        raise ValueError(f"{name} is not a result of dit-sparse compare: {error}") from None
    if not result.get("finished", True):
        raise ValueError(f"{name} is not finished: resume it with its `dit-sparse compare` command")
    result = _DEFAULTS | result
    schedule = dict(result["schedule"])
    if "every" in schedule:  # the older name
        schedule["replan_interval"] = schedule.pop("every")
    measured = {key: result[key] for key in ("device", "commit", "versions", "executor")}
    own = {"device": result["device"], "executor": result["executor"], "commits": [result["commit"] or "unknown"]}
    return result | {
        "schedule": _SCHEDULE_DEFAULTS | schedule,
        "sources": result.get("sources") or [measured | {"rows": len(result["rows"])}],
        "differences": result.get("differences", []),
        "rows": [
            own | {key: value for key, value in row.items() if value or key != "commits"} for row in result["rows"]
        ],
    }


def _why_not_mergeable(first: dict, other: dict) -> str | None:
    """Return which condition differs, or None if the rows of two results can be compared."""
    for name in CONDITIONS:
        if first[name] != other[name]:
            return f"{name} differs, {' and '.join(_differing_parts(first[name], other[name]))}"
    strips = _dense_strips(first, other)
    if len(strips) == 2 and (similarity := psnr(*strips)) < SAME_DENSE_PSNR:
        return (
            f"their dense clips of the first prompt differ (PSNR {similarity:.1f} dB): they are of other weights, or "
            "their devices draw other noise"
        )
    return None


def _differing_parts(first: object, other: object) -> tuple[str, str]:
    """Return two values as short text, without what they have in common."""
    if isinstance(first, dict) and isinstance(other, dict):
        keys = [key for key in first | other if first.get(key) != other.get(key)]
        return tuple(short_repr({key: one.get(key) for key in keys}) for one in (first, other))
    if isinstance(first, list) and isinstance(other, list) and len(first) == len(other):
        return next((short_repr(a), short_repr(b)) for a, b in zip(first, other, strict=True) if a != b)
    return short_repr(first), short_repr(other)


def _dense_strips(*results: dict) -> list[NDArray]:
    """Return the frames of the first dense clip of every result that shows them."""
    rows = [next((row for row in one["rows"] if _is_reference(row, one)), None) for one in results]
    return [_decode(row["strip"]) for row in rows if row and row["strip"]]


def _decode(strip: str) -> NDArray:
    try:
        return np.asarray(Image.open(BytesIO(base64.b64decode(strip))).convert("RGB"))[None]
    except (binascii.Error, OSError):
        raise ValueError("the frames of a dense row are not an image: compare.json is damaged") from None


def _is_reference(row: dict, result: dict) -> bool:
    return row["method"] == "dense" and row["steps"] == result["steps"]


def _merge_rows(results: Sequence[dict]) -> tuple[list[dict], list[dict]]:
    """Return every row once, those of dense attention with fewer steps last, and the differences between results."""
    merged: dict[str, dict] = {}
    listed = [one for result in results for one in result["differences"]]
    differences = [one for index, one in enumerate(listed) if one not in listed[:index]]
    for result in results:
        for row in result["rows"]:
            kept = merged.setdefault(row["name"], dict(row))
            if row.get("equal_to"):
                kept["equal_to"] = _unique((kept.get("equal_to", []), row["equal_to"]))
            if changed := _differing_numbers(kept, row):
                differences.append({"name": row["name"], "numbers": changed, "device": row["device"]})
    has_fewer_steps = lambda row: row["method"] == "dense" and not _is_reference(row, results[0])
    return sorted(merged.values(), key=has_fewer_steps), differences


def _differing_numbers(kept: dict, other: dict) -> dict[str, list[str]]:
    """Return the reported numbers in which two measurements of a row differ: the one that is kept and the other."""
    texts = {name: [text(kept), text(other)] for name, text in REPORTED.items()}
    return {name: pair for name, pair in texts.items() if None not in pair and pair[0] != pair[1]}


def _number(name: str, digits: int) -> Callable[[dict], str | None]:
    return lambda row: None if row[name] is None else f"{row[name]:.{digits}f}"


def _mean(name: str, digits: int) -> Callable[[dict], str | None]:
    """Return the text of a mean, None if a result lacks the metric; the PSNR of equal clips is stored as None."""

    def text(row: dict) -> str | None:
        statistics = row.get(name)  # older results have fewer measures
        if not statistics or "mean" not in statistics:
            return None
        return "inf" if statistics["mean"] is None else f"{statistics['mean']:.{digits}f}"

    return text


REPORTED = {
    "density": _number("density_achieved", 3),
    "run density": _number("density_run", 2),
    "output error": _number("error", 2),
    "retained mass": _number("retained", 2),
    **{measure.title.split(" (")[0]: _mean(name, measure.digits) for name, measure in MEASURES.items()},
    "denoising speedup": _number("speedup", 2),
    "attention speedup": _number("attention_speedup", 2),
}


def _unique(lists: Iterable[Iterable]) -> list:
    return list(dict.fromkeys(value for values in lists for value in values))


def _join(values: Iterable[str | None]) -> str:
    return ", ".join(dict.fromkeys(value or "unknown" for value in values))


def _join_versions(versions: Sequence[dict]) -> dict[str, str | None]:
    """Return the version of every package; several ones are joined."""
    found = {name: _unique([[one.get(name) for one in versions]]) for name in _unique(versions)}
    return {
        name: each[0] if len(each) == 1 else ", ".join(one or "none" for one in each) for name, each in found.items()
    }
