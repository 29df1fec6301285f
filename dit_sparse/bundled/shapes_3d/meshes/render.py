"""Pictures of meshes: an orthographic rasteriser with a depth buffer, in torch."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from .mesh import Mesh

BACKGROUND = (0.93, 0.93, 0.92)
LIGHT = (-0.45, 0.75, 0.6)  # direction of the light, in camera space: from the left, above and in front
AMBIENT = 0.38
ELEVATION = 28.0  # of the camera, in degrees
ZOOM = 0.74  # half a picture is the space of this scale
VIEWS = (20.0, 65.0, 110.0, 200.0)  # azimuths of the views on which pictures are compared


def render(
    mesh: Mesh, azimuth: float = 30.0, size: int = 384, elevation: float = ELEVATION, colours: NDArray | None = None
) -> NDArray:
    """Return a picture of a mesh, uint8 ``[size, size, 3]``.

    Args:
        azimuth, elevation: direction of the camera, in degrees.
        size: of the picture, in pixels.
        colours: RGB of the vertices that replace those of the mesh, uint8 ``[N, 3]``.
    """
    return render_with_mask(mesh, azimuth, size, elevation, colours)[0]


def render_with_mask(
    mesh: Mesh, azimuth: float = 30.0, size: int = 384, elevation: float = ELEVATION, colours: NDArray | None = None
) -> tuple[NDArray, NDArray]:
    """Return a picture as `render` does, and which pixels show the mesh, bool ``[size, size]``."""
    fine = 2 * size  # every pixel is the mean of 2x2
    camera = _rotation(azimuth, elevation)
    normals = torch.from_numpy(mesh.vertex_normals).float() @ camera.T
    points = torch.from_numpy(np.ascontiguousarray(mesh.vertices)).float() @ camera.T
    pixels = (points[:, :2] * torch.tensor([ZOOM, -ZOOM]) + 1) * (fine / 2)
    faces = torch.from_numpy(np.ascontiguousarray(mesh.faces)).long()
    face, weights = _rasterise(pixels, points[:, 2], faces, fine)
    seen = face >= 0
    corners = faces[face[seen]]
    own = torch.from_numpy(mesh.colours if colours is None else colours).float() / 255
    mix = lambda values: (values[corners] * weights[seen][..., None]).sum(1)
    light = F.normalize(torch.tensor(LIGHT), dim=0)
    normal = F.normalize(mix(normals), dim=1)
    shade = AMBIENT + (1 - AMBIENT) * (normal @ light).clamp_min(0) + 0.12 * normal[:, 1].clamp_min(0)
    picture = torch.tensor(BACKGROUND).expand(fine, fine, 3).clone()
    picture[seen] = (mix(own) * shade[:, None]).clamp(0, 1) ** 0.85
    half = lambda image: F.avg_pool2d(image, 2)
    picture = half(picture.permute(2, 0, 1)[None])[0].permute(1, 2, 0)
    covered = half(seen[None].float())[0] > 0.5
    return (255 * picture).round().to(torch.uint8).numpy(), covered.numpy()


def turntable(mesh: Mesh, frames: int = 36, size: int = 320) -> NDArray:
    """Return the pictures of one turn, uint8 ``[frames, size, size, 3]``."""
    return np.stack([render(mesh, 360 * frame / frames + 30, size) for frame in range(frames)])


def colour_psnr(mesh: Mesh, reference: Mesh, size: int = 256) -> float:
    """Return the PSNR of a mesh to a reference on rendered views, in dB, over the pixels that show one of them."""
    errors, pixels = 0.0, 0
    for azimuth in VIEWS:
        (own, mask), (other, other_mask) = (render_with_mask(one, azimuth, size) for one in (mesh, reference))
        both = mask | other_mask
        errors += float(np.square(own[both].astype(float) - other[both]).sum())
        pixels += 3 * int(both.sum())
    return math.inf if not errors else 10 * math.log10(255**2 * pixels / errors)


def _rotation(azimuth: float, elevation: float) -> Tensor:
    """Return the rotation from space to the camera, whose axes point right, up and towards the viewer."""
    a, e = math.radians(azimuth), math.radians(elevation)
    turn = torch.tensor([[math.cos(a), 0, -math.sin(a)], [0, 1, 0], [math.sin(a), 0, math.cos(a)]])
    tilt = torch.tensor([[1, 0, 0], [0, math.cos(e), -math.sin(e)], [0, math.sin(e), math.cos(e)]])
    return tilt @ turn


def _rasterise(pixels: Tensor, depth: Tensor, faces: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return the visible face of each pixel, int64 ``[size, size]``, -1 for none, and its barycentric weights."""
    a, b, c = (pixels[faces[:, corner]] for corner in range(3))
    area = _cross(b - a, c - a)
    front = area < 0  # y points down in pixels, so faces towards the viewer are clockwise
    a, b, c, area, faces, number = (x[front] for x in (a, b, c, area, faces, torch.arange(len(faces))))
    corners = torch.stack([a, b, c])
    low, high = corners.amin(0).floor().long(), corners.amax(0).floor().long()
    spans = (high - low).amax(0).tolist() if len(faces) else [-1, -1]
    nearest = torch.full((size * size,), -torch.inf)
    visible, weights = torch.full((size * size,), -1), torch.zeros(size * size, 3)
    for x in range(spans[0] + 1):
        for y in range(spans[1] + 1):
            place = low + torch.tensor([x, y])
            chosen = ((place <= high) & (place >= 0) & (place < size)).all(1).nonzero().flatten()
            p = place[chosen] + 0.5
            first, second, third = a[chosen], b[chosen], c[chosen]
            inside = torch.stack([_cross(third - second, p - second), _cross(first - third, p - third)])
            inside = inside / area[chosen]
            bary = torch.stack([*inside, 1 - inside.sum(0)], 1)
            hit = (bary >= -1e-4).all(1)
            chosen, bary = chosen[hit], bary[hit]
            z = (depth[faces[chosen]] * bary).sum(1)
            at = place[chosen, 1] * size + place[chosen, 0]
            nearest.scatter_reduce_(0, at, z, "amax")
            won = z == nearest[at]
            visible[at[won]], weights[at[won]] = number[chosen[won]], bary[won]
    return visible.view(size, size), weights.view(size, size, 3)


def _cross(a: Tensor, b: Tensor) -> Tensor:
    return a[:, 0] * b[:, 1] - a[:, 1] * b[:, 0]
