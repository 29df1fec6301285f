"""The fine surface of a solid: relief, grain and pattern, as the 32 channels of a cell.

Relief and grain are a random field on the quarter of space with positive x and z, repeated in its mirror images. The
coarse condition does not determine it: the noise of the generation does, and all mirror images have to agree.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .prompts import COLOURS, Part, Scene
from .solids import Cells

CHANNELS = 32  # 8 sub-voxels: 8 residuals of the distance, then 8 red, 8 green and 8 blue values
GRAIN_SPACING = 2.0  # distance of independent values of the random field, in cells
PERIOD = 8.0  # of the patterns, in cells
RELIEF = 0.3  # largest displacement of the surface, in cells
GRAIN = 0.2  # largest change of a colour value in [0, 1]
COLOUR_SCALE = 0.3  # colour values in [0, 1] are stored as (value - 0.5) / COLOUR_SCALE


@dataclass(frozen=True)
class Surface:
    """Fine values of the sub-voxels of surface cells.

    Attributes:
        distances: signed distances to the fine surface, in cells, ``[V, 8]``.
        colours: RGB in [0, 1], ``[V, 8, 3]``.
    """

    distances: Tensor
    colours: Tensor

    @classmethod
    def from_channels(cls, channels: Tensor, cells: Cells) -> "Surface":
        """Return the values of normalised channels ``[V, 32]``."""
        residuals, colours = channels[:, :8], channels[:, 8:].unflatten(1, (3, 8)).transpose(1, 2)
        distances = cells.distances + RELIEF * residuals.clamp(-1, 1)
        return cls(distances, (0.5 + COLOUR_SCALE * colours).clamp(0, 1))

    def channels(self, cells: Cells) -> Tensor:
        """Return the normalised channels, ``[V, 32]``."""
        colours = (self.colours - 0.5) / COLOUR_SCALE
        return torch.cat([(self.distances - cells.distances) / RELIEF, colours.transpose(1, 2).flatten(1)], 1)


def random_field(points: Tensor, resolution: int, generator: torch.Generator) -> Tensor:
    """Return a smooth random field in [-1, 1] that is mirrored at x = 0 and z = 0.

    Args:
        points: in cells from the centre of the grid, ``[..., 3]``.
        resolution: cells along each side of the grid.
    """
    half = resolution / 2
    sites = int(resolution / GRAIN_SPACING) + 2
    values = 2 * torch.rand(1, 1, sites, sites, sites, generator=generator) - 1
    folded = torch.stack([points[..., 0].abs(), points[..., 1] + half, points[..., 2].abs()], -1)
    at = 2 * folded.flatten(0, -2) / (GRAIN_SPACING * (sites - 1)) - 1
    sampled = F.grid_sample(values, at.flip(-1)[None, None, None], align_corners=True)
    return torch.tanh(2.2 * sampled.flatten()).view(points.shape[:-1])


def fine_surface(scene: Scene, cells: Cells, seed: int) -> Surface:
    """Return a random fine surface of a coarse solid."""
    generator = torch.Generator().manual_seed(seed)
    points, parts = cells.points, [scene.part] if scene.base is None else [scene.part, scene.base]
    field = random_field(points, cells.resolution, generator)
    colours = torch.stack([part_colours(part, points) for part in parts])
    own = colours.gather(0, cells.part[None, ..., None].expand(1, -1, -1, 3))[0]
    return Surface(cells.distances - RELIEF * field, (own + GRAIN * field[..., None]).clamp(0, 1))


def part_colours(part: Part, points: Tensor) -> Tensor:
    """Return the colours of a part without grain, in [0, 1], at points in cells ``[..., 3]``, ``[..., 3]``."""
    colour = torch.tensor(COLOURS[part.colour])
    second = 0.3 + 0.25 * colour if part.colour == "white" else 0.45 * colour + 0.5
    waves = torch.cos(2 * torch.pi * points / PERIOD)
    mark = {
        "plain": lambda: torch.full_like(waves[..., 0], -1.0),
        "striped": lambda: 3 * waves[..., 1],
        "checked": lambda: 3 * (waves * waves.roll(1, -1)).sum(-1),
        "dotted": lambda: 3 * (waves.sum(-1) - 1.1),
    }[part.pattern]()
    return torch.lerp(colour, second, (0.5 + mark).clamp(0, 1)[..., None])
