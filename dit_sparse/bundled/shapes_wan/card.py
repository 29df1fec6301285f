"""Write the model card of an exported model: `python -m dit_sparse.bundled.shapes_wan.card FOLDER`.

All numbers come from FOLDER/reports/{training,concentration,accuracy*}.json and the sizes of the files in FOLDER. There
is a report of the judge for each size of clip, the smaller first.
"""

import argparse
import json
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from .scenes import COLOURS, SHAPES


def write_card(folder):
    """Write FOLDER/README.md from the reports in FOLDER/reports."""
    read = lambda path: json.loads(path.read_text())
    reports = {name: read(folder / "reports" / f"{name}.json") for name in ("training", "concentration")}
    reports["accuracy"] = sorted(map(read, (folder / "reports").glob("accuracy*.json")), key=_tokens)
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    card = environment.get_template("card.md.j2").render(
        **reports,
        megabytes=_megabytes(file for file in folder.rglob("*") if file.is_file()),
        components=[_component(folder / name) for name in ("transformer", "text_encoder", "vae")],
        layers=list(zip(*reports["concentration"]["shares"].values(), strict=True)),
        colours=COLOURS,
        shapes=SHAPES,
    )
    (folder / "README.md").write_text(card)


def _tokens(report):
    return math.prod(report["tokens"])


def _megabytes(files):
    return sum(file.stat().st_size for file in files) / 1e6


def _component(folder):
    (weights,) = folder.glob("*.safetensors")
    with safe_open(weights, "pt") as file:
        slices = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, not a mapping
        parameters = sum(math.prod(one.get_shape()) for one in slices)
        dtypes = sorted({one.get_dtype() for one in slices})
    return {"name": folder.name, "parameters": parameters, "dtypes": dtypes, "megabytes": _megabytes([weights])}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
