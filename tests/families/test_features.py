"""Features of diffusers together with sparse attention: every cell of the table in docs/models.md."""

from __future__ import annotations

import json

import features
import pytest

CELLS = json.loads(features.TARGET.read_text())["cells"]
QUICK = (
    "WanTransformer3DModel",
    "HunyuanVideoTransformer3DModel",
    "CogVideoXTransformer3DModel",
    "FluxTransformer2DModel",
)


def cells() -> list:
    return [
        pytest.param(name, feature, marks=[] if name in QUICK else pytest.mark.slow)
        for feature in features.FEATURES
        for name in features.MODELS
    ]


@pytest.mark.parametrize("name, feature", cells())
def test_the_table_says_what_happens(name, feature):
    """In both orders of enabling for `QUICK` and where the order matters; otherwise the orders alternate."""
    cell = CELLS[feature][name]
    if name in QUICK or "/" in cell:
        assert features.verdicts(name, feature) == cell
    else:
        turn = features.MODELS.index(name) + list(features.FEATURES).index(feature)
        assert features.verdict(name, feature, features.ORDERS[turn % 2]) == cell


def test_nothing_is_wrong_or_silently_dense():
    found = {cell for row in CELLS.values() for cell in row.values()}
    assert found <= {"right", "dense", "-"}
