"""Distances between two meshes: chamfer distance and normal consistency of points sampled on them."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray
from scipy.spatial import cKDTree

from .mesh import Mesh

POINTS = 20_000
CANDIDATES = 8  # triangles with the nearest centres, of which the nearest is taken


def compare_meshes(mesh: Mesh, reference: Mesh, points: int = POINTS) -> tuple[float, float]:
    """Return how a mesh differs from a reference.

    Returns:
        The chamfer distance, the mean distance of points on one mesh to the other mesh, in units of the cube
        [-1, 1]^3; and the normal consistency, the mean cosine between the normals at these points and at the nearest
        points. Both are means over the two directions.
    """
    there, back = _distances(mesh, reference, points), _distances(reference, mesh, points)
    return tuple(float((one + other) / 2) for one, other in zip(there, back, strict=True))


def sample_surface(mesh: Mesh, points: int = POINTS, seed: int = 0) -> tuple[NDArray, NDArray]:
    """Return random points on a mesh, even by area, and the unit normals there, each ``[points, 3]``."""
    rng = np.random.default_rng(seed)
    normals, areas = mesh.face_normals()
    face = rng.choice(len(areas), points, p=areas / areas.sum())
    u, v = rng.random((2, points, 1))
    u, v = np.where(u + v > 1, 1 - u, u), np.where(u + v > 1, 1 - v, v)
    a, b, c = _corners(mesh, face)
    return a + u * (b - a) + v * (c - a), normals[face]


def _distances(mesh: Mesh, reference: Mesh, points: int) -> tuple[float, float]:
    """Return mean distance and mean cosine of the normals of points on a mesh to a reference."""
    at, own_normals = sample_surface(mesh, points)
    normals, _ = reference.face_normals()
    corners = _corners(reference, np.arange(len(normals)))
    count = min(CANDIDATES, len(normals))
    _, faces = cKDTree(sum(corners) / 3).query(at, count)
    faces = faces.reshape(points, count)
    distances = point_triangle_distance(at[:, None], *(corner[faces] for corner in corners))
    nearest = faces[np.arange(points), distances.argmin(1)]
    return distances.min(1).mean(), (own_normals * normals[nearest]).sum(1).mean()


def _corners(mesh: Mesh, faces: NDArray) -> list[NDArray]:
    return [mesh.vertices[mesh.faces[faces, corner]] for corner in range(3)]


def point_triangle_distance(p: NDArray, a: NDArray, b: NDArray, c: NDArray) -> NDArray:
    """Return the distances of points to triangles, ``[...]``, of arrays ``[..., 3]``."""
    normal = np.cross(b - a, c - a)
    length = np.linalg.norm(normal, axis=-1)
    dot = lambda x, y: (x * y).sum(-1)
    inside = np.ones(np.broadcast_shapes(p.shape, a.shape)[:-1], bool)
    to_edges = np.full(inside.shape, np.inf)
    for start, end in ((a, b), (b, c), (c, a)):
        edge, offset = end - start, p - start
        inside &= dot(np.cross(edge, offset), normal) >= 0
        along = np.clip(dot(offset, edge) / np.maximum(dot(edge, edge), 1e-20), 0, 1)
        to_edges = np.minimum(to_edges, np.linalg.norm(offset - along[..., None] * edge, axis=-1))
    to_plane = np.abs(dot(p - a, normal)) / np.maximum(length, 1e-20)
    return np.where(inside & (length > 1e-20), to_plane, to_edges)
