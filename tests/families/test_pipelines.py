"""The pipelines that families list are those of diffusers, read from its source."""

from __future__ import annotations

import ast
import json
from collections import defaultdict
from functools import cache
from pathlib import Path

import diffusers

from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.pipelines.family import all_families
from dit_sparse.pipelines.unsupported import UNSUPPORTED
from tiny_models import tiny_models

PUBLIC = set(dir(diffusers))
OTHERS = {"Transformer2DModel", "LuminaNextDiT2DModel"}  # of VQ-Diffusion and of Lumina-Next, with short sequences


@cache
def pipelines_of_transformers() -> dict[str, set[str]]:
    """Return the public pipelines of diffusers by the class that annotates their argument ``transformer``."""
    found = defaultdict(set)
    for path in (Path(diffusers.__file__).parent / "pipelines").rglob("*.py"):
        source = path.read_text()
        for cls in ast.parse(source).body if "transformer: " in source else ():
            if isinstance(cls, ast.ClassDef) and cls.name.endswith(("Pipeline", "Refiner")):
                for name in transformer_annotations(cls):
                    found[name].add(cls.name)
    return found


def transformer_annotations(cls: ast.ClassDef) -> set[str]:
    """Return the names in the annotations of the constructor's arguments ``transformer*``."""
    constructors = [node for node in cls.body if isinstance(node, ast.FunctionDef) and node.name == "__init__"]
    arguments = [argument for node in constructors for argument in (*node.args.args, *node.args.kwonlyargs)]
    annotations = [one.annotation for one in arguments if one.arg.startswith("transformer") and one.annotation]
    names = [getattr(node, "id", getattr(node, "value", "")) for one in annotations for node in ast.walk(one)]
    return {name for name in names if isinstance(name, str) and name in PUBLIC}


def test_families_list_every_pipeline_of_their_transformers():
    for family in all_families():
        expected = set().union(*(pipelines_of_transformers()[cls] for cls in family.transformers))
        assert set(family.pipelines) == expected & PUBLIC, family.name
        assert len(set(family.pipelines)) == len(family.pipelines)


def test_the_stored_measurements_are_those_of_the_supported_classes():
    rows = json.loads((RESULTS / "cpu" / "families.json").read_text())["rows"]
    assert [row["transformer"] for row in rows] == list(tiny_models())
    for row in rows:
        assert row["dense_equal"] and row["difference"] < 1e-5 and abs(row["density"] - 0.5) <= 0.01, row


def test_every_transformer_of_diffusers_has_a_family_or_a_reason():
    supported = {cls for family in all_families() for cls in family.transformers}
    assert supported.isdisjoint(UNSUPPORTED) and supported == set(tiny_models())
    known = supported | set(UNSUPPORTED) | OTHERS
    missing = {name for name in pipelines_of_transformers() if "Tr" in name or "DiT" in name} - known
    assert not missing
