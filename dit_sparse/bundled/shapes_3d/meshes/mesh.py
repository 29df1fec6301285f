"""Coloured triangle meshes: extraction from signed distances, and files."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from scipy import ndimage
from torch import Tensor

from ..solids import Cells, Solid, fine_distances
from ..surface import Surface

if TYPE_CHECKING:
    import trimesh

TRUNCATION = 1.0  # distances are limited to this many cells
SMALLEST_BODY = 0.02  # smaller bodies and holes, as a fraction of the solid, are removed
FORMATS = (".glb", ".obj", ".ply")


@dataclass(frozen=True)
class Mesh:
    """Triangles with a colour at every vertex.

    Attributes:
        vertices: in the cube [-1, 1]^3, y up, float ``[N, 3]``.
        faces: numbers of the vertices, counter-clockwise from outside, int ``[M, 3]``.
        colours: RGB, uint8 ``[N, 3]``.
        bodies: number of separate bodies before small ones were removed.
    """

    vertices: NDArray
    faces: NDArray
    colours: NDArray
    bodies: int = 1

    def face_normals(self) -> tuple[NDArray, NDArray]:
        """Return unit normals ``[M, 3]`` and areas ``[M]`` of the triangles."""
        a, b, c = (self.vertices[self.faces[:, corner]] for corner in range(3))
        cross = np.cross(b - a, c - a)
        length = np.linalg.norm(cross, axis=1)
        return cross / np.maximum(length, 1e-12)[:, None], length / 2

    @cached_property
    def vertex_normals(self) -> NDArray:
        """Unit normals of the vertices, ``[N, 3]``: means of the triangles around them, weighted by area."""
        normals, areas = self.face_normals()
        sums = np.zeros_like(self.vertices)
        for corner in range(3):
            np.add.at(sums, self.faces[:, corner], normals * areas[:, None])
        return sums / np.maximum(np.linalg.norm(sums, axis=1), 1e-12)[:, None]

    def is_watertight(self) -> bool:
        """Return whether every edge has two triangles, in opposite directions."""
        edges = np.concatenate([self.faces[:, pair] for pair in ((0, 1), (1, 2), (2, 0))]).astype(np.int64)
        count = len(self.vertices)
        forward, backward = edges[:, 0] * count + edges[:, 1], edges[:, 1] * count + edges[:, 0]
        unique = np.unique(forward)
        return len(unique) == len(forward) and np.array_equal(unique, np.unique(backward))

    def to_trimesh(self) -> trimesh.Trimesh:
        """Return the mesh as an object of the package trimesh.

        Raises:
            ValueError: trimesh is not installed.
        """
        check_mesh_files()
        import trimesh

        return trimesh.Trimesh(self.vertices, self.faces, vertex_colors=self.colours, process=False)

    def save(self, path: str | Path) -> None:
        """Write a GLB, OBJ or PLY file, by its suffix.

        Raises:
            ValueError: the suffix is another one, or trimesh is not installed.
        """
        if Path(path).suffix not in FORMATS:
            raise ValueError(f"a mesh file must end in {', '.join(FORMATS)}, got {Path(path).name[:60]}")
        self.to_trimesh().export(path)


def check_mesh_files() -> None:
    """Raise a ValueError if mesh files cannot be written because trimesh is not installed."""
    if find_spec("trimesh") is None:
        raise ValueError("mesh files need trimesh: pip install trimesh, or in a checkout -e '.[three-d]'")


def extract_mesh(solid: Solid, cells: Cells, surface: Surface) -> Mesh:
    """Return the surface of a solid by marching cubes on the sub-voxels.

    Away from the surface cells the distances are those of the coarse solid. The volume is padded by one sub-voxel
    outside, so that the surface is closed.
    """
    from skimage.measure import marching_cubes

    index = _sub_voxel_index(cells)
    distances = fine_distances(solid, cells.resolution).amin(-1)
    distances[tuple(index.unbind(-1))] = surface.distances
    volume, bodies = remove_small_bodies(distances.clamp(-TRUNCATION, TRUNCATION).numpy())
    padded = np.pad(volume, 1, constant_values=TRUNCATION)
    vertices, faces, _, _ = marching_cubes(padded, 0.0, gradient_direction="ascent", allow_degenerate=False)
    vertices = (vertices - 0.5) / cells.resolution - 1
    return Mesh(vertices, faces[:, ::-1].copy(), sample_colours(cells, surface.colours, vertices), bodies)


def _sub_voxel_index(cells: Cells) -> Tensor:
    """Return the index of each sub-voxel in the volume, int64 ``[V, 8, 3]``."""
    corner = 2 * (cells.coordinates + cells.resolution // 2)
    return corner[:, None] + torch.cartesian_prod(*[torch.arange(2)] * 3)


def remove_small_bodies(volume: NDArray) -> tuple[NDArray, int]:
    """Return signed distances without small bodies and closed holes, and the number of bodies before."""
    volume, found = volume.copy(), 0
    for sign in (1, -1):
        inside = sign * volume < 0
        labels, count = ndimage.label(inside)
        sizes = np.bincount(labels.ravel())[1:]
        found += count * (sign > 0)
        small = np.flatnonzero(sizes < SMALLEST_BODY * max(1, (volume < 0).sum())) + 1
        volume[np.isin(labels, small)] = sign * TRUNCATION
    return volume, found


def sample_colours(cells: Cells, colours: Tensor, vertices: NDArray) -> NDArray:
    """Return the colours of points on the surface from those of the sub-voxels of surface cells.

    Args:
        colours: RGB in [0, 1], ``[V, 8, 3]``.
        vertices: in the cube [-1, 1]^3, ``[N, 3]``.

    Returns:
        RGB, uint8 ``[N, 3]``.
    """
    side = 2 * cells.resolution
    volume = torch.zeros(4, side, side, side)  # the last channel is 1 in surface cells
    volume[(slice(None), *_sub_voxel_index(cells).unbind(-1))] = F.pad(colours, (0, 1), value=1.0).movedim(-1, 0)
    place = torch.from_numpy(vertices).float().flip(-1)[None, None, None]
    sampled = F.grid_sample(volume[None], place, padding_mode="border", align_corners=False).view(4, -1)
    return (255 * (sampled[:3] / sampled[3].clamp_min(1e-3)).clamp(0, 1)).round().to(torch.uint8).T.numpy()
