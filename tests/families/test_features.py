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
    assert features.verdicts(name, feature) == CELLS[feature][name]


def test_nothing_is_wrong_or_silently_dense():
    found = {cell for row in CELLS.values() for cell in row.values()}
    assert found <= {"right", "dense", "-"}
