"""Check generated solids against their prompts: `python -m dit_sparse.bundled.shapes_3d.judge FOLDER` prints JSON.

The judge knows the coarse solid and the colours and patterns of the prompt. It checks that the surface shows them, that
it has relief and grain of the right strength, and that these agree in all mirror images. It uses no trained network.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from .meshes.geometry import POINTS, compare_meshes
from .meshes.render import colour_psnr
from .pipeline import Shape, Shapes3DPipeline
from .prompts import COLOURS, PATTERNS, Part, Scene, held_out_scenes, parse
from .solids import Cells
from .surface import fine_surface, part_colours

MIN_AGREEMENT = 0.8  # correlation of relief and grain with those of the mirror images
DEPTH_RANGE = (0.6, 1.5)  # of relief and grain, relative to those of the training data
NEAR = 0.5  # sub-voxels nearer to the coarse surface than this, in cells, are visible


@dataclass(frozen=True)
class Verdict:
    """What is right about a solid.

    Attributes:
        colour: the mean colour of every part is nearest to that of the prompt.
        pattern: the pattern of every part fits that of the prompt best.
        relief: the relief is as deep as that of the training data, within ``DEPTH_RANGE``.
        agreement: relief and grain agree in mirror images.
        watertight: every edge of the mesh has two triangles.
        one_body: there is one body before small ones are removed.
    """

    colour: bool
    pattern: bool
    relief: bool
    agreement: bool
    watertight: bool
    one_body: bool

    @property
    def passes(self) -> bool:
        """Whether everything is right."""
        return all(vars(self).values())


def judge(shape: Shape) -> tuple[Verdict, dict[str, float]]:
    """Return the verdict on a solid, and its measurements.

    The measurements are ``mirror_correlation``, the lowest correlation of relief and of grain with those of the mirror
    images; ``relief_ratio`` and ``grain_ratio``, their standard deviations relative to the training data; and
    ``colour_psnr`` of the colours, without grain, to those of the prompt, in dB.
    """
    scene, cells = parse(shape.prompt), shape.cells
    parts = [part for part in (scene.part, scene.base) if part is not None]
    near = cells.distances.abs() < NEAR
    expected = _expected_colours(parts, cells)
    grain = (shape.surface.colours - expected).mean(-1)
    relief = cells.distances - shape.surface.distances
    truth = fine_surface(scene, cells, seed=0)
    true_relief, true_grain = cells.distances - truth.distances, (truth.colours - expected).mean(-1)
    measured = {
        "mirror_correlation": min(mirror_agreement(values, cells) for values in (relief, grain)),
        "relief_ratio": _ratio(relief[near], true_relief[near]),
        "grain_ratio": _ratio(grain[near], true_grain[near]),
        "colour_psnr": _psnr((shape.surface.colours - grain[..., None] - expected)[near]),
    }
    low, high = DEPTH_RANGE
    chosen = [near & (cells.part == number) for number in range(len(parts))]
    colours, points = shape.surface.colours, cells.points
    verdict = Verdict(
        colour=all(_colour_of(colours[own]) == part.colour for part, own in zip(parts, chosen, strict=True)),
        pattern=all(_fits_pattern(colours[own], points[own], part) for part, own in zip(parts, chosen, strict=True)),
        relief=low < measured["relief_ratio"] < high,
        agreement=measured["mirror_correlation"] > MIN_AGREEMENT,
        watertight=shape.mesh.is_watertight(),
        one_body=shape.mesh.bodies == 1,
    )
    return verdict, {name: round(value, 3) for name, value in measured.items()}


def _expected_colours(parts: Sequence[Part], cells: Cells) -> Tensor:
    """Return the colours of the sub-voxels without grain, ``[V, 8, 3]``."""
    colours = torch.stack([part_colours(part, cells.points) for part in parts])
    return colours.gather(0, cells.part[None, ..., None].expand(1, -1, -1, 3))[0]


def _colour_of(colours: Tensor) -> str:
    """Return the colour whose plain or patterned surface is nearest to the mean of ``colours [N, 3]``, up to grey."""
    hue = lambda rgb: rgb - rgb.mean(-1, keepdim=True)
    names, mean = list(COLOURS), hue(colours.mean(0))
    # A pattern mixes in a paler colour, which shortens the deviation from grey: compare its direction.
    known = torch.stack([hue(torch.tensor(COLOURS[name])) for name in names])
    if mean.norm() < 0.06:
        return "white"
    cosine = (known @ mean) / (known.norm(dim=1).clamp_min(1e-6) * mean.norm())
    cosine[names.index("white")] = -1
    return names[int(cosine.argmax())]


def _fits_pattern(colours: Tensor, points: Tensor, part: Part) -> bool:
    """Return whether the part's pattern fits ``colours [N, 3]`` at ``points [N, 3]`` as well as any other.

    Patterns whose squared errors differ by less than a tenth are taken as equal: small parts may show nothing of them.
    """
    fit = lambda pattern: part_colours(Part(part.colour, pattern, part.shape), points)
    errors = {pattern: (colours - fit(pattern)).square().mean().item() for pattern in PATTERNS}
    return errors[part.pattern] <= 1.1 * min(errors.values())


def mirror_agreement(values: Tensor, cells: Cells) -> float:
    """Return the lowest correlation of values of sub-voxels, ``[V, 8]``, with those mirrored at x = 0 and at z = 0."""
    volume = torch.zeros(*[cells.resolution] * 3, 2, 2, 2)
    index = (cells.coordinates + cells.resolution // 2).unbind(1)
    volume[index] = values.view(-1, 2, 2, 2)
    mirrored = (volume.flip(axis, axis + 3)[index].flatten() for axis in (0, 2))
    correlations = [torch.corrcoef(torch.stack([values.flatten(), other]))[0, 1].item() for other in mirrored]
    return min(0.0 if math.isnan(one) else one for one in correlations)


def _ratio(values: Tensor, reference: Tensor) -> float:
    return (values.std() / reference.std()).item()


def _psnr(errors: Tensor) -> float:
    return -10 * math.log10(max(errors.square().mean().item(), 1e-10))


def compare_shapes(shape: Shape, reference: Shape, points: int = POINTS, size: int = 256) -> dict[str, float]:
    """Return how a solid differs from one of the same coarse solid.

    Args:
        points: number of points sampled on each mesh.
        size: of the rendered views, in pixels.

    Returns:
        ``colour_psnr`` on rendered views, in dB; ``chamfer``, in cells; and ``normal_consistency``.
    """
    chamfer, consistency = compare_meshes(shape.mesh, reference.mesh, points)
    return {
        "colour_psnr": colour_psnr(shape.mesh, reference.mesh, size),
        "chamfer": chamfer * shape.cells.resolution / 2,
        "normal_consistency": consistency,
    }


def judge_model(pipeline: Shapes3DPipeline, scenes: Sequence[Scene], **call) -> dict:
    """Generate scenes, judge them, and return a report for JSON.

    Args:
        call: arguments of the pipeline's call.
    """
    rows, start = [], time.perf_counter()
    for seed, scene in enumerate(scenes):
        generator = torch.Generator().manual_seed(2**45 + seed)  # training solids have smaller seeds
        shape = pipeline(scene.prompt, generator=generator, **call)
        verdict, measured = judge(shape)
        rows.append({"prompt": scene.prompt, "cells": len(shape.cells.coordinates), **asdict(verdict), **measured})
    names = list(Verdict.__dataclass_fields__)
    share = lambda name: sum(row[name] for row in rows) / len(rows)
    return {
        "solids": len(rows),
        "passes": sum(all(row[name] for name in names) for row in rows) / len(rows),
        **{name: share(name) for name in names},
        "means": {name: round(share(name), 3) for name in measured},
        "call": call,
        "seconds_per_solid": round((time.perf_counter() - start) / len(rows), 1),
        "rows": rows,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of an exported model")
    parser.add_argument("--solids", type=int, default=12, help="number of held-out prompts")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, help="also write the JSON to this file")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    pipeline = Shapes3DPipeline.from_pretrained(options.folder)
    call = {"resolution": options.resolution, "num_inference_steps": options.steps}
    report = json.dumps(judge_model(pipeline, held_out_scenes(options.solids), **call))
    print(report)
    if options.out:
        options.out.write_text(report + "\n")


if __name__ == "__main__":
    main()
