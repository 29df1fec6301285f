"""Write the model card of an exported model: `python -m dit_sparse.bundled.shapes_3d.card FOLDER`.

All numbers come from FOLDER/reports/{training,concentration,judge}.json and the weights in FOLDER.
"""

import argparse
import json
import math
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from safetensors import safe_open

from .prompts import COLOURS, PATTERNS, SHAPES

REPORTS = ("training", "concentration", "judge")


def write_card(folder: Path) -> None:
    """Write FOLDER/README.md from the reports in FOLDER/reports."""
    weights = folder / "model.safetensors"
    with safe_open(weights, "pt") as file:
        parameters = sum(math.prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    options = {"trim_blocks": True, "lstrip_blocks": True, "keep_trailing_newline": True}
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), undefined=StrictUndefined, **options)
    card = environment.get_template("card.md.j2").render(
        **{name: json.loads((folder / "reports" / f"{name}.json").read_text()) for name in REPORTS},
        config=json.loads((folder / "config.json").read_text()),
        parameters=parameters,
        megabytes=weights.stat().st_size / 1e6,
        colours=COLOURS,
        patterns=PATTERNS,
        shapes=SHAPES,
    )
    (folder / "README.md").write_text(card)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    write_card(parser.parse_args().folder)


if __name__ == "__main__":
    main()
