"""Tables of docs/presets.md: the rows of the stored comparisons, and the schedules of papers."""

from __future__ import annotations

import pytest

from dit_sparse import SparseAttnProcessor
from dit_sparse.eval.report import preset_table
from dit_sparse.notation.presets import DEFAULT_PRESET, PRESETS

INTERVAL = {"mean": 30.0, "interval": [29.0, 31.0]}


def row(method: str, density: float | None, psnr: dict | None = INTERVAL, **values: object) -> dict:
    name = method if density is None else f"{method} {density}"
    shared = {"name": name, "method": method, "density_asked": density, "psnr": psnr, "ssim": {"mean": 0.9}}
    return shared | {"speedup": 1.5, "attention_speedup": 2.0} | values


@pytest.fixture
def stored(monkeypatch):
    """Replace the stored comparisons; conditions are tested elsewhere."""
    results: list[dict] = []
    monkeypatch.setattr(preset_table, "stored_comparisons", lambda: results)
    monkeypatch.setattr(preset_table, "compare_conditions", lambda result: "conditions")
    return results


def test_rows_are_those_of_the_first_comparison_with_a_preset(stored):
    method = SparseAttnProcessor("quality").settings.method
    name = type(method).__name__.lower()
    dense = row("dense", None, INTERVAL | {"mean": 25.0}, name="dense, 6 steps", equal_to=["x"])
    stored += [
        {"rows": [row("radial", 0.25)]},
        {"rows": [row(name, method.density, INTERVAL | {"mean": 33.25}), dense]},
        {"rows": [row(name, method.density)]},
    ]
    lines = preset_table.preset_table().splitlines()
    numbers = f"{method.density:g} | 33.2 [29.0, 31.0] | 0.900 | 1.50x | 2.00x"
    assert lines[2] == f"| `quality` | [`{name}`](methods.md#{name}) | {numbers} |"
    assert "| dense, 6 steps | [`dense`](methods.md#dense) | - | 25.0" in "\n".join(lines)
    assert lines[-1] == "conditions"
    assert [line for line in lines if "(default)" in line] == [line for line in lines if f"`{DEFAULT_PRESET}`" in line]


def test_presets_without_results_have_no_numbers(stored):
    lines = preset_table.preset_table().splitlines()
    assert len(lines) >= 2 + len(PRESETS) and all(line.endswith("| - | - | - | - |") for line in lines[2:])


def test_schedules_are_those_of_the_presets():
    text = preset_table.schedule_table()
    for preset in PRESETS.values():
        for name, schedule in preset.schedules.items():
            (line,) = [line for line in text.splitlines() if line.startswith(f"| `{name}` |")]
            assert schedule.source in line
            assert all(f"`{key}={value:g}`" in line for key, value in schedule.schedule.items())
