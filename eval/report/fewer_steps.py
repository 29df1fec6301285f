"""Sparse rows that dense attention with fewer steps beats."""

from __future__ import annotations

from collections.abc import Sequence
from math import inf


def fewer_steps_note(rows: Sequence[dict]) -> str:
    """Return a sentence that names the sparse rows of a comparison that dense attention with fewer steps beats.

    It beats a row if it has at least the same mean PSNR and denoising speedup, measured on the same device.

    Returns:
        "" if the rows contain no dense attention with fewer steps.
    """
    dense_rows = [row for row in rows if row["method"] == "dense" and row["psnr"]]
    if not dense_rows:
        return ""
    sparse_rows = [row for row in rows if row["method"] not in ("dense", "random_blocks") and row["psnr"]]
    beaten_by: dict[str, list[str]] = {}
    for row in sparse_rows:
        better = [dense for dense in dense_rows if _beats(dense, row)]
        if better:
            beaten_by.setdefault(_describe(max(better, key=_psnr)), []).append(row["name"])
    if not beaten_by:
        return "Dense attention with fewer steps beats no sparse row at equal or lower time."
    parts = (f"with {dense} beats {', '.join(names)}" for dense, names in beaten_by.items())
    return f"At equal or lower time, dense attention {'; '.join(parts)}."


def _beats(dense: dict, sparse: dict) -> bool:
    same_device = dense.get("device") == sparse.get("device")
    return same_device and dense["speedup"] >= sparse["speedup"] and _psnr(dense) >= _psnr(sparse)


def _psnr(row: dict) -> float:
    """Return the mean PSNR, which is stored as None if it is infinite."""
    mean = row["psnr"]["mean"]
    return inf if mean is None else mean


def _describe(dense: dict) -> str:
    return f"{dense['steps']} steps ({_psnr(dense):.1f} dB, {dense['speedup']:.2f}x)"
