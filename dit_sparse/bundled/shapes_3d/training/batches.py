"""Training batches, generated on the fly from a number, and the curriculum of their sizes."""

import random
from dataclasses import dataclass

import torch
from torch import Tensor

from ..prompts import Scene, training_scene
from ..solids import make_solid, surface_cells
from ..sparse_tensor import SparseTensor
from ..surface import fine_surface

PROMPT_DROPOUT = 0.1  # share of solids with an empty prompt, for classifier-free guidance
MAX_SEED = 2**40  # training solids have smaller seeds


@dataclass(frozen=True)
class Stage:
    """One stage of the curriculum. Each step draws one of the batches at random.

    Attributes:
        until: fraction of the budget at which the stage ends.
        batches: number of solids and resolution of their grid.
    """

    until: float
    batches: tuple[tuple[int, int], ...]


# A solid has about 4.5 cells per squared resolution: 450 cells in a grid of 10, 1,150 of 16 and 4,600 of 32.
CURRICULUM = (
    Stage(0.45, ((2, 8), (2, 10), (1, 12), (1, 14))),
    Stage(0.92, ((2, 10), (1, 14), (1, 16), (1, 18))),
    Stage(1.0, ((1, 18), (1, 28), (1, 32), (1, 40))),
)


@dataclass(frozen=True)
class Batch:
    """Packed solids with their prompts.

    Attributes:
        data: normalised channels of the fine surfaces, feats ``[T, 32]``.
        coarse: coarse condition, feats ``[T, 10]``.
        noise: ``[T, 32]``.
        levels: noise level of each solid, in (0, 1), ``[B]``.
        scenes: what the prompts describe; None for unconditional solids.
    """

    data: SparseTensor
    coarse: SparseTensor
    noise: Tensor
    levels: Tensor
    scenes: list[Scene | None]


def make_batch(stage: Stage, number: int, scale: int = 1) -> Batch:
    """Return a random batch of a stage, deterministic in ``number``.

    Args:
        scale: factor of the number of solids.
    """
    rng, generator = random.Random(number), torch.Generator().manual_seed(number)
    count, resolution = rng.choice(stage.batches)
    channels, coarse, coordinates, scenes = [], [], [], []
    for _ in range(count * scale):
        scene, seed = training_scene(rng), rng.randrange(MAX_SEED)
        cells = surface_cells(make_solid(scene, seed), resolution)
        channels.append(fine_surface(scene, cells, seed).channels(cells))
        coarse.append(cells.condition())
        coordinates.append(cells.coordinates)
        scenes.append(None if rng.random() < PROMPT_DROPOUT else scene)
    data = SparseTensor.pack(channels, coordinates)
    noise = torch.randn(data.feats.shape, generator=generator)
    levels = sample_levels(len(scenes), generator)
    return Batch(data, data.replace(torch.cat(coarse)), noise, levels, scenes)


def sample_levels(count: int, generator: torch.Generator) -> Tensor:
    """Return noise levels in (0.01, 1], ``[count]``: half of them uniform below 0.7, half mostly high.

    High levels teach to match the mirror images; below a level of one half each cell shows its own grain, and the last
    steps remove the noise that remains.
    """
    uniform, kind = 0.02 + 0.98 * torch.rand(count, generator=generator), torch.rand(count, generator=generator)
    return torch.where(kind < 0.5, 0.7 * uniform, 3 * uniform / (1 + 2 * uniform))
