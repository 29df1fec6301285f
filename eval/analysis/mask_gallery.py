"""Pictures of the masks of all methods on the bundled model, for docs/methods.md.

``python -m dit_sparse.eval.analysis.mask_gallery`` draws every method again, and with the names of kinds only those.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dit_sparse import Schedule, Site, SparseAttnProcessor, prepare
from dit_sparse.bundled import BUNDLED, BUNDLED_PROMPT, SMALL_CALL
from dit_sparse.generation.generate import generate, load_pipeline
from dit_sparse.methods import KINDS
from dit_sparse.output.files import save_figure
from dit_sparse.plan import BasePlan
from dit_sparse.plotting.masks import MaskPanel, plot_gallery

FOLDER = Path(__file__).resolve().parents[2] / "docs" / "images" / "methods"
DENSITY, SEED, LAYER, STEP, HEAD = 0.25, 0, 3, 2, 1  # of the pictures
CALL = SMALL_CALL | {"guidance_scale": 1.0}
NOTE = (
    f"{BUNDLED}, density {DENSITY:g}, layer {LAYER}, head {HEAD}, after {STEP} of 8 steps. "
    "Left: kept pairs, queries down and keys across, frame by frame; darker is a larger share. "
    "Right: keys of the orange query, frame by frame."
)


class _Captured(Exception):
    """Ends a generation whose plan is known."""


def capture_plan(pipe: Any, name: str, call: dict, layer: int, step: int) -> tuple[BasePlan, Site]:
    """Return the plan of a method at one call of a generation, and the call's site. The generation ends there.

    Args:
        pipe: a pipeline.
        name: the method as text.
        call: arguments of the pipeline's call.
        layer, step: the first sparse call from this layer of this step on.

    Raises:
        RuntimeError: there was no such call.
    """
    found: list[tuple[BasePlan, Site]] = []

    def observe(site: Site, q: Tensor, k: Tensor, plan: BasePlan) -> None:
        if (site.step, site.layer) >= (step, layer):
            found.append((plan, site))
            raise _Captured

    settings = {"density": DENSITY, "schedule": Schedule(dense_steps=0.25), "min_tokens": 0}
    pipe.set_attn_processor(SparseAttnProcessor(name, **settings))
    try:
        pipe.sparse_run.observe(observe)
        generate(pipe, BUNDLED_PROMPT, SEED, call)
    except _Captured:
        return found[0]
    finally:
        pipe.set_attn_processor(None)
    raise RuntimeError(f"{name} has no sparse call from layer {layer} of step {step} on")


def panel(name: str, plan: BasePlan, site: Site, head: int) -> MaskPanel:
    """Return the picture of a plan: shares of kept pairs by rows of places, and the keys of the middle query."""
    grid = site.grid
    keep = plan.token_mask(torch.arange(grid.before, grid.before + grid.video))[0]
    keep = keep[min(head, len(keep) - 1)][:, grid.before : grid.before + grid.video].float()
    lines = grid.frames * grid.height
    pairs = keep.view(lines, grid.width, lines, grid.width).mean((1, 3))
    query = (grid.frames // 2 * grid.height + grid.height // 2) * grid.width + grid.width // 2
    keys = keep[query].view(grid.frames, grid.height, grid.width)
    return MaskPanel(f"{name}, {plan.density:.2f}", pairs.numpy(), keys.numpy(), query)


def draw(kinds: Sequence[str], folder: Path = FOLDER, call: dict = CALL, layer: int = LAYER, step: int = STEP):
    """Draw one picture for each kind, ``<kind>.png``, whose metadata lists the methods. ``dense`` is left out."""
    folder.mkdir(parents=True, exist_ok=True)
    pipe = prepare(load_pipeline(BUNDLED))
    for kind in kinds:
        names = [name for name in KINDS[kind] if name != "dense"]
        panels = [panel(name, *capture_plan(pipe, name, call, layer, step), HEAD) for name in names]
        save_figure(folder / f"{kind}.png", plot_gallery(panels, NOTE), {"Methods": ",".join(names)})


if __name__ == "__main__":
    torch.set_num_threads(1)
    draw(sys.argv[1:] or list(KINDS))
