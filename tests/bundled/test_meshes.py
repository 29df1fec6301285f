"""Meshes of shapes-3d: extraction, files, pictures and distances."""

import numpy as np
import pytest
import torch

from dit_sparse.bundled.shapes_3d.meshes.geometry import compare_meshes, point_triangle_distance
from dit_sparse.bundled.shapes_3d.meshes.mesh import Mesh, extract_mesh, remove_small_bodies
from dit_sparse.bundled.shapes_3d.meshes.render import BACKGROUND, colour_psnr, render, render_with_mask, turntable
from dit_sparse.bundled.shapes_3d.prompts import parse
from dit_sparse.bundled.shapes_3d.solids import Solid, surface_cells
from dit_sparse.bundled.shapes_3d.surface import Surface, fine_surface

RADIUS = 0.6


def sphere(radius: float = RADIUS, resolution: int = 20, colour=(0.8, 0.2, 0.0)) -> Mesh:
    """A smooth sphere of one colour."""
    solid = Solid((lambda p: p.norm(dim=-1) - radius,))
    cells = surface_cells(solid, resolution)
    return extract_mesh(solid, cells, Surface(cells.distances, torch.tensor(colour).expand(*cells.distances.shape, 3)))


def test_a_sphere_is_one_closed_sphere():
    mesh = sphere()
    assert mesh.is_watertight() and mesh.bodies == 1
    assert np.linalg.norm(mesh.vertices, axis=1) == pytest.approx(RADIUS, abs=0.005)
    normals, areas = mesh.face_normals()
    assert areas.sum() == pytest.approx(4 * np.pi * RADIUS**2, rel=0.01)
    centres = mesh.vertices[mesh.faces].mean(1)
    assert (np.sum(normals * centres, 1) > 0.5).all()  # outwards
    assert (mesh.colours == np.round(255 * np.array([0.8, 0.2, 0.0]))).all()


def test_a_hole_in_the_surface_is_not_watertight():
    mesh = sphere()
    assert not Mesh(mesh.vertices, mesh.faces[1:], mesh.colours).is_watertight()


def test_a_solid_that_touches_the_grid_is_closed():
    assert sphere(radius=1.02).is_watertight()


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply"])
def test_files_load_in_trimesh(tmp_path, suffix):
    trimesh = pytest.importorskip("trimesh")
    scene = parse("two striped red balls on a blue box")
    from dit_sparse.bundled.shapes_3d.solids import make_solid

    solid = make_solid(scene, 0)
    cells = surface_cells(solid, 20)
    mesh = extract_mesh(solid, cells, fine_surface(scene, cells, 0))
    mesh.save(tmp_path / f"mesh{suffix}")
    loaded = trimesh.load(tmp_path / f"mesh{suffix}", force="mesh")
    assert loaded.is_watertight and loaded.body_count == 1 and loaded.volume > 0.3
    assert np.ptp(loaded.visual.vertex_colors[:, :3], axis=0).min() > 50


def test_other_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"must end in \.glb"):
        sphere().save(tmp_path / "mesh.txt")


def test_small_bodies_and_holes_are_removed():
    axis = torch.linspace(-1, 1, 40)
    points = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"), -1)
    ball = lambda centre, radius: (points - torch.tensor(centre)).norm(dim=-1) - radius
    volume = torch.maximum(torch.minimum(ball([0.0, 0, 0], 0.6), ball([0.9, 0.9, 0.9], 0.1)), -ball([0.0, 0, 0], 0.15))
    cleaned, bodies = remove_small_bodies(volume.numpy())
    assert bodies == 2
    assert remove_small_bodies(cleaned)[1] == 1
    assert (cleaned < 0)[20, 20, 20] and (cleaned > 0)[-2:, -2:, -2:].all()


def test_distances_of_spheres():
    distance, consistency = compare_meshes(sphere(0.6, 32), sphere(0.55, 32), points=2000)
    assert distance == pytest.approx(0.05, abs=0.002) and consistency > 0.99


def test_distances_of_a_point_and_a_triangle():
    a, b, c = np.eye(3)[:, None] * 2
    points = np.array([[2 / 3, 2 / 3, 2 / 3], [1.0, 1, 1], [3.0, 0, 0], [1, 1, -1]])
    assert point_triangle_distance(points, a, b, c) == pytest.approx([0, 1 / 3**0.5, 1, 1])


def test_a_picture_shows_the_sphere():
    picture, mask = render_with_mask(sphere(), size=96)
    assert mask[48, 48] and not mask[4, 4] and np.abs(picture[4, 4] / 255 - BACKGROUND).max() < 0.01
    seen = 0.74 * RADIUS  # as a fraction of half the picture
    assert mask.mean() == pytest.approx(np.pi * seen**2 / 4, rel=0.03)
    assert picture[48, 48, 0] > 2 * picture[48, 48, 2]  # red
    assert picture[36, 40].sum() > picture[60, 56].sum()  # the light is above and on the left
    assert not mask[~mask].any() and picture.dtype == np.uint8


def test_nearer_triangles_hide_others():
    corners = np.array([[-0.5, -0.5, 0], [0.5, -0.5, 0], [0, 0.5, 0]])
    vertices = np.concatenate([corners + [0, 0, 0.2], corners - [0, 0, 0.2]])
    red, blue = ([[255, 0, 0]] * 3, [[0, 0, 255]] * 3)
    for first, second, channel in ((red, blue, 0), (blue, red, 2)):
        mesh = Mesh(vertices, np.array([[0, 1, 2], [3, 4, 5]]), np.array(first + second, np.uint8))
        assert render(mesh, azimuth=0, size=32, elevation=0)[16, 16].argmax() == channel


def test_colour_psnr_and_turntable():
    mesh, other = sphere(resolution=12), sphere(resolution=12, colour=(0.7, 0.2, 0.0))
    assert colour_psnr(mesh, mesh, size=48) == np.inf and 20 < colour_psnr(mesh, other, size=48) < 40
    frames = turntable(mesh, frames=4, size=48)
    assert frames.shape == (4, 48, 48, 3) and np.abs(frames[0].astype(int) - frames[1]).mean() < 10
