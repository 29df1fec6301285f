"""The stored clips that a row of a comparison was measured on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dit_sparse.output.files import json_values

from .runner import Sample

StoredClip = tuple[Path, dict]  # file and metadata, as `ClipStore.index` returns them


def paths_of_row(clips: Sequence[StoredClip], result: dict, row: dict) -> dict[Sample, Path]:
    """Return the file of every clip of a row, by prompt and seed in the order of the comparison.

    A folder may hold clips of other comparisons with the same row name. They are distinguished by their settings and,
    if several remain, by the total time that the row reports.

    Args:
        clips: the index of the store, the oldest clip first.
        result, row: content of ``compare.json``, and one of its rows.

    Raises:
        ValueError: clips are missing.
    """
    matches = _matching_clips(clips, result, row)
    if missing := sum(not found for found in matches.values()):
        raise ValueError(f"{missing} clips of {row['name']!r} are not in the folder: run the comparison again")
    most = max(map(len, matches.values()))
    sets = [[found[-min(age, len(found))] for found in matches.values()] for age in range(1, 1 + most)]
    own = min(sets, key=lambda found: abs(sum(seconds for _, seconds in found) - row["seconds"]))
    return dict(zip(matches, (path for path, _ in own), strict=True))


def _matching_clips(clips: Sequence[StoredClip], result: dict, row: dict) -> dict[Sample, list[tuple[Path, float]]]:
    """Return file and seconds of every clip that fits a row, by prompt and seed, the oldest first."""
    first = result.get("first_seed", 0)
    samples = [Sample(prompt, first + seed) for prompt in result["prompts"] for seed in range(result["seeds"])]
    matches: dict[Sample, list[tuple[Path, float]]] = {sample: [] for sample in samples}
    for path, metadata in clips:
        metadata = json_values(metadata)
        sample = Sample(metadata.get("prompt"), metadata.get("seed"))
        same_row = metadata.get("row") == row["name"]
        same_settings = all(metadata.get(key) == row[key] for key in ("settings", "steps"))
        if same_row and same_settings and metadata["grids"] in ([], result["grids"]) and sample in matches:
            matches[sample].append((path, metadata["seconds"]))
    return matches
