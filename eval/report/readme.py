"""Generate the tables of README.md and docs/ from the methods and the stored results.

``python -m dit_sparse.eval.report.readme`` rewrites the pages between ``<!-- table: name -->`` and ``<!-- end -->``. It
also draws the animation of README.md.
"""

from __future__ import annotations

import json
import re
from functools import partial
from pathlib import Path

import imageio.v3 as imageio

from dit_sparse.bundled import BUNDLED_FPS
from dit_sparse.methods import KINDS
from dit_sparse.output.media import side_by_side

from . import comparison_tables, gate_tables, method_page, model_tables, preset_table
from . import tables as result_tables
from .tables import ROOT

PAGES = (
    "README.md",
    "docs/benchmarks.md",
    "docs/gates.md",
    "docs/kernels.md",
    "docs/methods.md",
    "docs/models.md",
    "docs/presets.md",
    "docs/routed.md",
)
TABLES = {
    "kinds": method_page.kind_table,
    "conditions": method_page.method_conditions,
    "presets": preset_table.preset_table,
    "preset_schedules": preset_table.schedule_table,
    "models": model_tables.summary,
    "families": model_tables.family_table,
    "features": model_tables.feature_table,
    "pipelines": model_tables.pipeline_table,
    "unsupported": model_tables.unsupported_table,
    "demo": result_tables.demo_table,
    "compare": comparison_tables.compare_tables,
    "branches": comparison_tables.branches_tables,
    "routed": comparison_tables.routed_tables,
    "second_model": comparison_tables.second_model_tables,
    "gate_weights": gate_tables.weights_table,
    "gate_videos": gate_tables.comparison_tables,
    "study": result_tables.study_tables,
    "executors": result_tables.executor_table,
    "transformers": result_tables.transformer_table,
    "tail": result_tables.tail_table,
    "scaling": result_tables.scaling_table,
} | {kind: partial(method_page.kind_section, kind) for kind in KINDS}


def update_tables(text: str) -> str:
    """Return the text of a page with all tables generated again."""
    return re.sub(
        r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)",
        lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}",
        text,
        flags=re.DOTALL,
    )


def draw_animation(path: Path) -> None:
    """Write the dense and the sparse clip of the first example of the page, side by side, as an animated WebP."""
    folder = ROOT / "docs" / "examples" / "1"
    clips = [imageio.imread(folder / f"{name}.mp4", plugin="FFMPEG") for name in ("dense", "sparse")]
    result = json.loads((folder / "result.json").read_text())
    sparse = f"{result['method']}, density {result['density_asked']:.2f}: PSNR {result['psnr']:.1f} dB"
    frames = side_by_side(*clips, ("dense attention", sparse))
    imageio.imwrite(path, frames, plugin="pillow", duration=1000 / BUNDLED_FPS, loop=0, quality=80, method=6)


if __name__ == "__main__":
    for page in PAGES:
        (ROOT / page).write_text(update_tables((ROOT / page).read_text()))
    draw_animation(ROOT / "docs" / "images" / "demo.webp")
