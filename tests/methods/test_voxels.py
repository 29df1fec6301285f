"""Laws of attention on voxels: every method that applies to them, on surfaces in random order."""

from __future__ import annotations

import inspect
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from attention_cases import assert_near, make, plan_of, qkv
from dit_sparse import METHODS, Grid, VoxelGrid, attention
from dit_sparse.composition import check_grid
from dit_sparse.methods import method
from voxel_sets import packed, surface

VOXELS = VoxelGrid(surface(30), before=1)
NEED_RASTER = [
    "neighborhood", "radial", "sink", "svg", "vdit", "svg.temporal", "pooled(svg)", "cached(radial)",
    "rettention(vdit)", "svg.spatial|sink",
]  # fmt: skip


def applies(name: str) -> bool:
    try:
        check_grid(make(name, density=0.3), VOXELS)
    except ValueError:
        return False
    return True


NAMES = [name for name in METHODS if applies(name)]
every_method = pytest.mark.parametrize("name", NAMES)
COUNTS = [1, 7, 63, 65, 700]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double())


@every_method
@pytest.mark.parametrize("count", COUNTS)
def test_density_one_is_dense_attention(name, count):
    grid = VoxelGrid(surface(count), before=1)
    q, k, v = qkv(grid.tokens, batch=2, dim=16)
    out, lse = attention(q, k, v, grid=grid, method=make(name, density=1.0), executor="gather")
    assert_near(out, dense(q, k, v), 1e-5)
    assert_near(lse, torch.logsumexp(q @ k.mT * 0.25, -1), 1e-5)


@every_method
def test_permuting_the_input_permutes_the_output(name):
    """Exactly, because tokens are computed in an order that depends on their coordinates alone."""
    voxels, after = surface(700), 5
    order = torch.randperm(700, generator=torch.Generator().manual_seed(3))
    inputs, tokens = qkv(700 + after, dim=16), torch.cat([order, torch.arange(700, 700 + after)])
    compute = lambda voxels, inputs: attention(
        *inputs, grid=VoxelGrid(voxels, after=after), method=make(name, density=0.3), executor="gather"
    )
    out, lse = compute(voxels, inputs)
    permuted_out, permuted_lse = compute(voxels[order], [x[:, :, tokens] for x in inputs])
    assert_near(permuted_out, out[:, :, tokens], 1e-6)
    assert_near(permuted_lse, lse[:, :, tokens], 1e-6)


@every_method
@pytest.mark.parametrize("grid", [VoxelGrid(surface(1500)), VoxelGrid(surface(900), before=3)], ids=str)
def test_the_density_is_met(name, grid):
    one, item = make(name, density=0.3), grid.items()[0][1]
    plan = plan_of(one, item, 16)
    assert abs(plan.density - 0.3) <= 0.01 or one.density_note(item, 16, plan.density)
    assert one.density_exception or abs(plan.density - 0.3) <= 0.01


@every_method
def test_items_of_a_packed_sequence_are_computed_separately(name):
    voxels = packed(300, 1, 40)
    voxels = voxels[torch.randperm(len(voxels), generator=torch.Generator().manual_seed(5))]
    q, k, v = qkv(len(voxels), dim=16)
    one = make(name, density=0.4)
    out, lse = attention(q, k, v, grid=VoxelGrid(voxels), method=one, block=16, executor="gather")
    for number in range(3):
        own = (voxels[:, 0] == number).nonzero().flatten()
        inputs = [x[:, :, own] for x in (q, k, v)]
        alone = attention(*inputs, grid=VoxelGrid(voxels[own, 1:]), method=one, block=16, executor="gather")
        assert_near(out[:, :, own], alone[0], 1e-6)
        assert_near(lse[:, :, own], alone[1], 1e-6)


@pytest.mark.parametrize("name", NEED_RASTER)
def test_methods_that_need_frames_say_so(name):
    q, k, v = qkv(31)
    with pytest.raises(ValueError, match="does not apply to 1 text") as error:
        attention(q, k, v, grid=VOXELS, method=method(name, density=0.3))
    assert "frames, rows and columns" in str(error.value) and len(str(error.value)) < 200
    check_grid(method(name, density=0.3), Grid(3, 4, 5))


def test_methods_that_read_q_and_k_apply_to_voxels():
    scorers = {"svg2", "adaspa", "xattention", "asa", "subblock", "sparge", "routed"}
    assert scorers <= set(NAMES) and not set(NEED_RASTER) & set(NAMES)


def test_the_default_method_of_voxels_is_svg2():
    grid, inputs = VoxelGrid(surface(200)), qkv(200)
    default, named = (attention(*inputs, grid=grid, executor="gather", **one)[0] for one in ({}, {"method": "svg2"}))
    assert default.equal(named)


@pytest.mark.parametrize("lengths", [[198, 205], [203, 200]], ids=str)
def test_padding_is_text_at_the_end(lengths):
    grid, lengths = VoxelGrid(surface(200), after=5), torch.tensor(lengths)
    q, k, v = qkv(205, batch=2)
    if lengths.min() < 200:
        with pytest.raises(ValueError, match="padding must be text"):
            attention(q, k, v, grid=grid, method="subblock", lengths=lengths)
        return
    out, _ = attention(q, k, v, grid=grid, method="subblock", density=1.0, lengths=lengths, executor="gather")
    for item, length in enumerate(lengths.tolist()):
        inputs = (x[item : item + 1, :, :length] for x in (q, k, v))
        assert_near(out[item : item + 1, :, :length], dense(*inputs), 1e-5)


@cache
def volume() -> VoxelGrid:
    return VoxelGrid(torch.cartesian_prod(torch.arange(5), torch.arange(7), torch.arange(6)) - 3)


@pytest.mark.parametrize("name", ["subblock", "window", "asa", "sparge", "svg2"])
def test_a_full_box_of_voxels_is_a_volume(name):
    """Depth x height x width: a Grid and the VoxelGrid of all its cells give outputs of the same error."""
    q, k, v = qkv(210, dim=16)
    error = lambda grid: float(
        (attention(q, k, v, grid=grid, method=name, density=0.4, block=16)[0] - dense(q, k, v)).norm()
    )
    assert error(volume()) == pytest.approx(error(Grid(5, 7, 6)), rel=0.35)


def test_sets_of_tokens_of_several_frames_are_a_grid():
    """Frames x 1 x tokens, as in ActionMesh: methods that need frames apply."""
    grid = Grid(4, 1, 33)
    q, k, v = qkv(grid.tokens, dim=16)
    for name in ("radial", "svg", "svg2", "subblock", "neighborhood"):
        out, _ = attention(q, k, v, grid=grid, method=name, density=1.0, block=16, executor="gather")
        assert_near(out, dense(q, k, v), 1e-5)


def test_attention_names_the_kinds_of_grids():
    assert "VoxelGrid" in inspect.getdoc(attention)
    with pytest.raises(ValueError, match=r"grid must be a dit_sparse.Grid, .* VoxelGrid\(voxels\), got str"):
        attention(*qkv(4), grid="2x2x1")


@cache
def fields() -> tuple[VoxelGrid, list[Tensor]]:
    """Queries and keys that are smooth over a surface and equal on its mirrored parts, as for repeated detail."""
    voxels, generator = surface(1500), torch.Generator().manual_seed(0)
    waves = torch.randn(2, 3, 32, generator=generator) * 0.6
    features = 1.5 * (voxels.abs().float() @ waves).sin()[None]
    noise = 0.3 * torch.randn(2, 2, 1500, 32, generator=generator)
    return VoxelGrid(voxels), [
        features + noise[:1],
        features + noise[1:],
        torch.randn(1, 2, 1500, 32, generator=generator),
    ]


@pytest.mark.parametrize("name", ["svg2", "spatial", "subblock", "xattention", "asa", "sparge", "adaspa", "routed"])
def test_methods_that_read_q_and_k_beat_random_blocks(name):
    grid, inputs = fields()
    compute = lambda name: attention(*inputs, grid=grid, method=name, density=0.25, executor="gather")[0]
    error = lambda name: float((compute(name) - dense(*inputs)).norm() / dense(*inputs).norm())
    assert error(name) < 0.8 * error("random_blocks")
