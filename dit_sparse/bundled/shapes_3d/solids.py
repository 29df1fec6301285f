"""Coarse solids: signed distances of the parts of a scene, and the surface cells of a grid.

Space is the cube [-1, 1]^3 with y up. Solids are mirrored at the planes x = 0 and z = 0. The grid has ``resolution``
cells along each side; a cell has 2x2x2 sub-voxels, in the order of x, y, z, of which z varies fastest. Coordinates of
cells are whole numbers relative to the centre of the grid: ``-resolution / 2`` to ``resolution / 2 - 1``.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .prompts import Scene

MARGIN = 0.7  # cells with a sub-voxel nearer to the coarse surface than this, in cells, are surface cells
RESOLUTIONS = (8, 96)
Distance = Callable[[Tensor], Tensor]  # points [..., 3] to signed distances [...]


def ball(p: Tensor, half: Tensor) -> Tensor:
    """Ellipsoid with half axes ``half``. Approximate away from its surface."""
    scaled = (p / half).norm(dim=-1)
    return scaled * (scaled - 1) / (p / half.square()).norm(dim=-1).clamp_min(1e-6)


def box(p: Tensor, half: Tensor) -> Tensor:
    """Box with slightly rounded edges."""
    rounding = 0.12 * half.min()
    outside = p.abs() - half + rounding
    return outside.clamp_min(0).norm(dim=-1) + outside.amax(-1).clamp_max(0) - rounding


def cylinder(p: Tensor, half: Tensor) -> Tensor:
    """Upright cylinder with slightly rounded edges; the radius is the smaller of the horizontal half sizes."""
    radius = torch.minimum(half[0], half[2])
    rounding = 0.12 * torch.minimum(radius, half[1])
    sides = p[..., (0, 2)].norm(dim=-1) - radius + rounding
    outside = torch.stack([sides, p[..., 1].abs() - half[1] + rounding], -1)
    return outside.clamp_min(0).norm(dim=-1) + outside.amax(-1).clamp_max(0) - rounding


def torus(p: Tensor, half: Tensor) -> Tensor:
    """Lying torus; the tube is as high as ``half[1]``, at most 0.42 of the horizontal radius."""
    radius = torch.minimum(half[0], half[2])
    tube = torch.minimum(half[1], 0.42 * radius)
    ring = p[..., (0, 2)].norm(dim=-1) - (radius - tube)
    return torch.stack([ring, p[..., 1]], -1).norm(dim=-1) - tube


def cone(p: Tensor, half: Tensor) -> Tensor:
    """Upright cone with a blunt tip."""
    radius, height = torch.minimum(half[0], half[2]), 2 * half[1]
    slope = torch.stack([height, 0.94 * radius])
    slope = slope / slope.norm()
    sides = (p[..., (0, 2)].norm(dim=-1) - radius) * slope[0] + (p[..., 1] + half[1]) * slope[1]
    return torch.maximum(sides, p[..., 1].abs() - half[1])


def gem(p: Tensor, half: Tensor) -> Tensor:
    """Octahedron with flattened tips."""
    faces = ((p.abs() / half).sum(-1) - 1) / (1 / half).norm()
    return torch.maximum(faces, (p.abs() - 0.9 * half).amax(-1))


DISTANCES = {"ball": ball, "box": box, "torus": torus, "cylinder": cylinder, "cone": cone, "gem": gem}


@dataclass(frozen=True)
class Solid:
    """The coarse solid of a scene.

    Attributes:
        parts: signed distance of each part, in units of the cube: first the main part, then the base.
    """

    parts: tuple[Distance, ...]

    def distances(self, points: Tensor) -> Tensor:
        """Return the signed distances of points ``[..., 3]`` to every part, ``[..., parts]``; negative inside."""
        return torch.stack([part(points) for part in self.parts], -1)


def make_solid(scene: Scene, seed: int) -> Solid:
    """Return the solid of a scene with the proportions of a seed."""
    rng = random.Random(f"proportions {seed}")
    size = lambda low, high: rng.uniform(low, high)
    if scene.base is None:
        wide, high = size(0.68, 0.9), size(0.62, 0.88)
        return Solid((_placed(scene.part.shape, (wide, high, wide * size(0.8, 1.0)), (0, 0, 0)),))
    base = size(0.7, 0.9), size(0.24, 0.36), size(0.66, 0.86)
    top = 2 * base[1] - 0.9
    radius = min(base[0], base[2])
    if scene.count == 1:
        wide = radius * size(0.68, 0.9)
        half, centre = (wide, (0.92 - top) / 2 * size(0.8, 1.0), wide * size(0.85, 1.0)), (0, 0)
    else:
        wide = radius * size(0.26, 0.32)
        half, centre = (wide, wide * size(1.2, 1.9), wide), (radius * size(0.52, 0.58), 0)
        centre = centre if scene.count == 2 else (0.92 * centre[0], 0.92 * centre[0])
    if scene.part.shape == "torus":
        half = (half[0], min(half[1], 0.42 * half[0]), half[0])
    if scene.part.shape == "ball":
        half = (half[0], min(half[1], 1.15 * half[0]), half[2])
    sunk = 0.04 + {"ball": 0.1, "torus": 0.25, "gem": 0.1}.get(scene.part.shape, 0) * half[1]  # so that the parts touch
    upper = _placed(scene.part.shape, half, (centre[0], top + half[1] - sunk, centre[1]))
    return Solid((upper, _placed(scene.base.shape, base, (0, base[1] - 0.9, 0))))


def _placed(shape: str, half: tuple[float, ...], centre: tuple[float, ...]) -> Distance:
    """Return the distance of a shape and of its mirror images."""
    function, half, centre = DISTANCES[shape], torch.tensor(half), torch.tensor(centre)
    fold = torch.tensor([True, False, True])
    return lambda p: function(torch.where(fold, p.abs(), p) - centre, half)


@dataclass(frozen=True)
class Cells:
    """Surface cells of a coarse solid.

    Attributes:
        coordinates: relative to the centre of the grid, int64 ``[V, 3]``.
        distances: signed distances of the sub-voxels to the coarse solid, in cells, ``[V, 8]``.
        part: number of the nearest part of each sub-voxel, int64 ``[V, 8]``.
        resolution: cells along each side of the grid.
    """

    coordinates: Tensor
    distances: Tensor
    part: Tensor
    resolution: int

    @property
    def points(self) -> Tensor:
        """Centres of the sub-voxels relative to the centre of the grid, in cells, ``[V, 8, 3]``."""
        return self.coordinates[:, None] + sub_voxels()

    def condition(self) -> Tensor:
        """Return the coarse condition of each cell, ``[V, 10]``: distances of the sub-voxels, and shares of the parts.

        It says nothing about relief and grain.
        """
        share = self.part.float().mean(1, keepdim=True)
        return torch.cat([self.distances.clamp(-1.5, 1.5), share, 1 - share], 1)


def sub_voxels() -> Tensor:
    """Return the centres of the sub-voxels of a cell, relative to its lower corner, ``[8, 3]``."""
    return torch.cartesian_prod(*[torch.tensor([0.25, 0.75])] * 3)


def fine_distances(solid: Solid, resolution: int) -> Tensor:
    """Return the signed distances to every part on the grid of sub-voxels, in cells, ``[2R, 2R, 2R, parts]``."""
    axis = (torch.arange(2 * resolution) + 0.5) / resolution - 1
    return solid.distances(torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)) * (resolution / 2)


def surface_cells(solid: Solid, resolution: int) -> Cells:
    """Return the surface cells of a solid in row-major order.

    Raises:
        ValueError: the resolution is odd, or outside 8 to 96.
    """
    check_resolution(resolution)
    nearest = fine_distances(solid, resolution).min(-1)
    values, parts = (_by_cell(volume) for volume in (nearest.values, nearest.indices))
    chosen = values.abs().amin(-1) < MARGIN
    return Cells(chosen.nonzero() - resolution // 2, values[chosen], parts[chosen], resolution)


def check_resolution(resolution: int) -> None:
    """Raise a ValueError if the resolution is odd, or outside 8 to 96."""
    low, high = RESOLUTIONS
    if not (isinstance(resolution, int) and low <= resolution <= high and resolution % 2 == 0):
        raise ValueError(f"resolution must be an even number of cells from {low} to {high}, got {resolution}")


def _by_cell(volume: Tensor) -> Tensor:
    """Return a volume of sub-voxels ``[2R, 2R, 2R]`` by cell, ``[R, R, R, 8]``."""
    side = len(volume) // 2
    return volume.view(side, 2, side, 2, side, 2).permute(0, 2, 4, 1, 3, 5).reshape(side, side, side, 8)
