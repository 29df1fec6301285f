"""``dit-sparse``: the command and its subcommands."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from dit_sparse import __version__

from .batch import batch
from .bench import bench
from .compare import compare, report, reproduce
from .evaluate import ab, evaluate
from .generate import app as page
from .generate import demo, generate
from .profiles import profile
from .shared.command import CommandGroup
from .show import doctor, methods, presets, show
from .study import study
from .train import train

EXAMPLES = {
    demo: "demo --density 0.25 --out out/demo",
    generate: "generate 'a green square moves left' --method 'radial(sink=true)' --density 0.2 --out out/square.mp4",
    page: "app --port 7860",
    batch: "batch prompts.txt --density 0.25 --out out/batch",
    methods: "methods --kind scorer",
    presets: "presets --json",
    show: "show 'radial(sink=true)' --grid 21x45x80 --density 0.25 --png mask.png",
    compare: "compare --methods 'radial,svg,pooled(svg),profile:shapes-wan-i2v' --density 0.15,0.25 --prompts 2",
    report: "report out/compare --html",
    ab: "ab out/compare --row dense --row 'routed 0.25'",
    study: "study --methods 'svg2,pooled(svg2)' --ablate routed --prompts 3",
    reproduce: "reproduce wan2.1-t2v-14b-720p --prompts prompts.txt --out out/wan",
    profile: "profile shapes-wan-i2v --candidates 'radial(sink=true),svg.temporal,asa' --out profiles/mine.json",
    train: "train seer --model shapes-wan-i2v --prompts 8 --out out/seer.safetensors",
    doctor: "doctor --json > environment.json",
}

app = CommandGroup()
app.add_typer(bench, name="bench")
app.add_typer(evaluate, name="eval")


def print_version(wanted: bool) -> None:
    """Print the version and the commit of a checkout, and exit."""
    if not wanted:
        return
    from dit_sparse.output.environment import commit

    print(f"dit-sparse {__version__}" + (f" ({known})" if (known := commit()) else ""))
    raise typer.Exit()


@app.callback()
def root(
    version: Annotated[
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Sparse attention for diffusion transformers."""


for command, example in EXAMPLES.items():
    app.command(command.__name__, epilog=f"Example: dit-sparse {example}")(command)


def main() -> None:
    app()


if __name__ == "__main__":
    sys.exit(main())
