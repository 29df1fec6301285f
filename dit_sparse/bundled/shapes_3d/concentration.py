"""Measure attention concentration and masks: `python -m dit_sparse.bundled.shapes_3d.concentration FOLDER`.

Cells are sorted along the Morton curve, and queries and keys are split into blocks of 64 consecutive cells. For each
block of queries the measure is the attention mass on the quarter of the key blocks with the most: 0.25 for uniform
attention, 1 for fully concentrated attention. The same solids are then generated with only these blocks, and with
random ones: if both were as good, no method could do better than a random mask.
"""

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...order import morton_index
from ..attention_mass import BLOCK, DENSITY
from .pipeline import Shapes3DPipeline
from .prompts import Scene, held_out_scenes
from .solids import Cells, make_solid, surface_cells
from .surface import CHANNELS, COLOUR_SCALE

CHUNK = 8  # blocks of queries at a time
HELD_OUT_SEED = 2**45  # training solids have smaller seeds
MASKS = ("dense", "best", "random")


class BlockAttention(TorchFunctionMode):
    """Context manager that measures every self-attention call, and computes it on chosen blocks.

    Args:
        mask: "dense"; "best": the quarter of the key blocks with the most attention; "random": the own block and others
            at random.
        seed: of the random blocks.

    Attributes:
        masses: for each call in order, the attention mass on the best quarter, ``[H]``.
    """

    def __init__(self, mask: str = "dense", seed: int = 0):
        super().__init__()
        self.mask, self.masses = mask, []
        self.generator = torch.Generator().manual_seed(seed)

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is F.scaled_dot_product_attention and args[0].shape[-2] == args[1].shape[-2]:
            return self._attend(*args)
        return function(*args, **(kwargs or {}))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the attention of ``[1, H, N, D]``."""
        count = k.shape[-2]
        blocks = -(-count // BLOCK)
        kept, outputs, masses = max(1, round(DENSITY * blocks)), [], []
        for start in range(0, count, CHUNK * BLOCK):
            scores = q[0, :, start : start + CHUNK * BLOCK] @ k[0].mT * q.shape[-1] ** -0.5
            weights = F.pad(scores.softmax(-1), (0, blocks * BLOCK - count))
            rows = [part.mean(1) for part in weights.unflatten(-1, (blocks, BLOCK)).sum(-1).split(BLOCK, 1)]
            mass = torch.stack(rows, 1)  # [H, query blocks, key blocks]
            best = mass.topk(kept, -1)
            masses.append(best.values.sum(-1))
            if self.mask != "dense":
                chosen = best.indices if self.mask == "best" else self._random(mass, start // BLOCK, kept)
                keep = torch.zeros_like(mass).scatter_(-1, chosen, 1.0)
                keep = keep.repeat_interleave(BLOCK, 1)[:, : weights.shape[1]].repeat_interleave(BLOCK, 2)
                weights = weights * keep
                weights = weights / weights.sum(-1, keepdim=True)
            outputs.append(weights[..., :count] @ v[0])
        self.masses.append(torch.cat(masses, 1).mean(1))
        return torch.cat(outputs, 1)[None]

    def _random(self, mass: Tensor, first: int, kept: int) -> Tensor:
        ranks = torch.rand(mass.shape, generator=self.generator)
        ranks[:, torch.arange(mass.shape[1]), first + torch.arange(mass.shape[1])] = 2
        return ranks.topk(kept, -1).indices


def sort_cells(cells: Cells) -> Cells:
    """Return the cells along the Morton curve."""
    shifted = cells.coordinates - cells.coordinates.amin(0)
    order = morton_index(shifted.unbind(1), cells.resolution.bit_length()).argsort()
    return replace(
        cells, coordinates=cells.coordinates[order], distances=cells.distances[order], part=cells.part[order]
    )


def mirror_agreement(channels: Tensor, cells: Cells) -> float:
    """Return the correlation of the relief of cells with that of their mirror images at x = 0; 1 if they agree."""
    residuals = channels[:, :8].mean(1)
    place = {tuple(one): row for row, one in enumerate(cells.coordinates.tolist())}
    mirror = torch.tensor([place[-x - 1, y, z] for x, y, z in cells.coordinates.tolist()])
    return torch.corrcoef(torch.stack([residuals, residuals[mirror]]))[0, 1].item()


def fidelity(channels: Tensor, reference: Tensor) -> float:
    """Return the PSNR of the colours of cells to a reference, in dB."""
    colours = lambda x: (0.5 + COLOUR_SCALE * x[:, 8:]).clamp(0, 1)
    return -10 * (colours(channels) - colours(reference)).square().mean().clamp_min(1e-12).log10().item()


@torch.no_grad()
def measure_concentration(
    pipeline: Shapes3DPipeline, resolution: int = 24, scenes: Sequence[Scene] | None = None, steps: int = 8
) -> dict:
    """Return attention masses by step, layer and head, and the fidelity of the masks, for JSON.

    Args:
        resolution: of the grid.
        scenes: by default 2 held-out ones.
        steps: number of denoising steps.
    """
    scenes = held_out_scenes(2) if scenes is None else scenes
    masses, psnr, agreement, counts = [], {mask: [] for mask in MASKS[1:]}, [], []
    for index, scene in enumerate(scenes):
        cells = sort_cells(surface_cells(make_solid(scene, HELD_OUT_SEED + index), resolution))
        noise = torch.randn(len(cells.coordinates), CHANNELS, generator=torch.Generator().manual_seed(index))
        counts.append(len(noise))
        results = {}
        for mask in MASKS:
            with BlockAttention(mask, seed=index) as attention:
                results[mask] = pipeline.denoise(scene, cells, noise, steps)
            if mask == "dense":
                masses.append(torch.stack(attention.masses).unflatten(0, (steps, -1)))
            else:
                psnr[mask].append(fidelity(results[mask], results["dense"]))
        agreement.append(mirror_agreement(results["dense"], cells))
    table = torch.stack(masses).mean(0)  # [steps, layers, H]
    mean = lambda values: round(sum(values) / len(values), 3)
    return {
        "cells": counts,
        "block": BLOCK,
        "kept": DENSITY,
        "mean": round(table.mean().item(), 3),
        "by_step": [round(value, 3) for value in table.mean((1, 2)).tolist()],
        "by_layer_and_head": [[round(value, 3) for value in layer] for layer in table.mean(0).tolist()],
        "psnr_best": mean(psnr["best"]),
        "psnr_random": mean(psnr["random"]),
        "mirror_agreement": mean(agreement),
        "steps": steps,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of an exported model")
    parser.add_argument("--resolution", type=int, default=24)
    parser.add_argument("--solids", type=int, default=2)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = Shapes3DPipeline.from_pretrained(options.folder)
    report = measure_concentration(pipeline, options.resolution, held_out_scenes(options.solids), options.steps)
    print(json.dumps(report))
    if options.out:
        options.out.write_text(json.dumps(report) + "\n")


if __name__ == "__main__":
    main()
