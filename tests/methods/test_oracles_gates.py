"""Gates without weights against short re-implementations of their rules, and with weights: files, heads and layers."""

from __future__ import annotations

import json
import math
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from oracles import blocks_of
from torch import Tensor

import dit_sparse as ds
from attention_cases import plan_of, qkv
from dit_sparse import Grid, PerHead, Site
from dit_sparse.gating.gate import Gate
from dit_sparse.gating.weights import GateWeights
from dit_sparse.methods import method
from dit_sparse.methods.gates import GATES
from dit_sparse.methods.gates.sea import orthogonal_features
from dit_sparse.methods.gates.sparsifiner import POINTS
from dit_sparse.output.environment import method_digest
from fake_gpu import fake_gpu
from tiny_pipelines import ALL

GRIDS = [Grid(5, 7, 3, after=11), Grid(1, 23, 31), Grid(40, 2, 2)]
BLOCK, DIM = 16, 16
every_grid = pytest.mark.parametrize("grid", GRIDS, ids=lambda grid: str(grid).replace(" ", ""))
every_gate = pytest.mark.parametrize("name", GATES)


def scores_of(gate: Gate, grid: Grid, head: int = 1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the scores of one head, ``[Qb, Qb]``, and its q, k and v in float64."""
    q, k, v = qkv(grid.tokens, heads=2, dim=DIM, seed=4)
    scores = gate.score(q, k, v, Site(grid, BLOCK), {}).expand(1, 2, -1, -1)
    return scores[0, head].double(), *(x[0, head].double() for x in (q, k, v))


def assert_rows_agree(actual: Tensor, expected: Tensor) -> None:
    """Assert that the rows agree up to a constant, which changes no selection."""
    centre = lambda x: x - x.mean(-1, keepdim=True)
    torch.testing.assert_close(centre(actual), centre(expected), atol=2e-4, rtol=1e-3)


def place(grid: Grid, token: int) -> tuple[float, float, float]:
    """Return the position of a token as fractions of the grid; text has that of the nearest video token."""
    number = min(max(token - grid.before, 0), grid.video - 1)
    axes = number // grid.frame, number % grid.frame // grid.width, number % grid.width
    sizes = grid.frames, grid.height, grid.width
    return tuple(axis / (size - 1) if size > 1 else 0.5 for axis, size in zip(axes, sizes, strict=True))


@every_grid
def test_seer_is_the_product_of_means(grid):
    scores, q, k, _ = scores_of(method("seer"), grid)
    blocks = blocks_of(grid, block=BLOCK)
    expected = [[q[i].mean(0) @ k[j].mean(0) / math.sqrt(DIM) for j in blocks] for i in blocks]
    assert_rows_agree(scores, torch.tensor(expected, dtype=torch.float64))


@every_grid
def test_seer_reads_maximum_minimum_and_mean(grid):
    q, k, _ = qkv(grid.tokens, heads=2, dim=DIM)
    pooled = method("seer").features(q, k, None, Site(grid, BLOCK))[1]["pooled"]
    for number, block in enumerate(blocks_of(grid, block=BLOCK)):
        keys = k[:, :, block]
        torch.testing.assert_close(pooled[:, :, number], torch.cat([keys.amax(2), keys.amin(2), keys.mean(2)], -1))


@every_grid
def test_dma_adds_the_length_of_the_values(grid):
    scores, q, k, v = scores_of(method("dma"), grid)
    blocks = blocks_of(grid, block=BLOCK)
    length = [v[j].norm(dim=-1).mean().log() for j in blocks]
    product = [[q[i].mean(0) @ k[j].mean(0) / math.sqrt(DIM) for j in blocks] for i in blocks]
    assert_rows_agree(scores, torch.tensor(product, dtype=torch.float64) + torch.tensor(length))


@every_grid
def test_sparsifiner_interpolates_a_coarse_softmax(grid):
    """Keys are averaged around points of the grid, and the softmax over the points is interpolated."""
    scores, q, k, _ = scores_of(method("sparsifiner"), grid)
    blocks, points = blocks_of(grid, block=BLOCK), [(t, y, x) for t in range(3) for y in range(4) for x in range(4)]
    hat = torch.zeros(len(points), len(blocks), dtype=torch.float64)
    for row, point in enumerate(points):
        for column, block in enumerate(blocks):
            for token in block:
                near = (
                    max(0.0, 1 - abs(at * (number - 1) - index))
                    for at, index, number in zip(place(grid, token), point, POINTS, strict=True)
                )
                hat[row, column] += math.prod(near) / len(block)
    total = hat.sum(-1, keepdim=True).clamp(min=1e-3)
    queries, keys = (torch.stack([x[block].mean(0) for block in blocks]) for x in (q, k))
    logits = queries @ (hat @ keys / total).T / math.sqrt(DIM) + total.T.log()
    expected = (logits.softmax(-1) @ (hat / total)).clamp(min=1e-6).log()
    assert_rows_agree(scores, expected)


@every_grid
@pytest.mark.parametrize("width", [128, 4])
def test_sea_is_a_performer_estimate(grid, width):
    """The mean attention from groups of queries to the groups of keys of a block, with random features; a narrow map is
    averaged over neighbouring blocks and interpolated."""
    scores, q, k, _ = scores_of(method("sea", width=width), grid)
    features = orthogonal_features(DIM, 32, torch.Generator().manual_seed(0)).double()
    groups = [[block[first : first + 8] for first in range(0, len(block), 8)] for block in blocks_of(grid, block=BLOCK)]
    phi = lambda x: (x @ features - x.square().sum() / 2).exp()
    k = k - k.mean(0)
    per_block = [sum(len(one) * phi(k[one].mean(0) * DIM**-0.25) for one in block) for block in groups]
    columns = F.adaptive_avg_pool1d(torch.stack(per_block).T, min(width, len(groups)))
    rows = []
    for block in groups:
        share = lambda one: (phi(q[one].mean(0) * DIM**-0.25) @ columns).div(
            (phi(q[one].mean(0) * DIM**-0.25) @ columns).sum()
        )
        rows.append(sum(len(one) * share(one) for one in block) / sum(map(len, block)))
    expected = torch.stack(rows).clamp(min=1e-9).log()
    if width < len(groups):
        expected = F.interpolate(expected[None], len(groups), mode="linear")[0]
    assert_rows_agree(scores, expected)


@every_grid
def test_swinbert_prefers_near_blocks(grid):
    """Rows rank blocks by the distance between the mean positions; the table is linear between its entries."""
    scores = scores_of(method("swinbert"), grid)[0]
    blocks = blocks_of(grid, block=BLOCK)
    centre = torch.tensor([[place(grid, token) for token in block] for block in blocks[:-1]]).double().mean(1)
    distance = torch.cdist(centre, centre)
    error = (scores[:-1, :-1] + 4 * distance).abs()
    assert error.max() < 0.7, "interpolation of a norm between 5 to 13 points"
    assert (scores[:-1, :-1].diagonal()[:, None] >= scores[:-1, :-1] - 1e-5).all()


def stored(gate: Gate, path, layers=2, heads=3, **changes) -> str:
    """Write weights that differ between layers and heads, and return the path."""
    generator = torch.Generator().manual_seed(1)
    tensors = {}
    for name, tensor in gate.initial(DIM).items():
        noise = 0.3 * torch.randn(layers, heads, *tensor.shape[1:], generator=generator)
        tensors[f"transformer/{name}"] = tensor.expand_as(noise) + noise
    values = dict(name="", gate=type(gate).__name__, settings=gate.shape_settings(), model="tiny", digest="")
    values |= dict(transformer="WanTransformer3DModel", layers=layers, heads=heads, head_dim=DIM, training={})
    GateWeights(**values | changes, tensors=tensors).write(path)
    return str(path)


def site(grid: Grid, layer: int = 0, layers: int = 2, **other) -> Site:
    return Site(grid, BLOCK, layer=layer, layers=layers, component="transformer", **other)


@every_gate
def test_each_layer_and_head_has_its_parameters(name, tmp_path):
    """Heads of a call are numbered from ``first_head``, and those of a composition by their own numbers."""
    grid, path = Grid(4, 6, 8), stored(method(name), tmp_path / "gate.safetensors")
    gate, (q, k, v) = method(name, weights=path, density=0.3), qkv(192, heads=3, dim=DIM)
    whole = gate.score(q, k, v, site(grid), {}).expand(1, 3, -1, -1)
    assert not whole.allclose(gate.score(q, k, v, site(grid, layer=1), {}), atol=1e-3)
    part = gate.score(q[:, 1:], k[:, 1:], v[:, 1:], site(grid, first_head=1), {})
    torch.testing.assert_close(part.expand(1, 2, -1, -1), whole[:, 1:])
    alone = gate.score(q[:, 2:], k[:, 2:], v[:, 2:], site(grid, heads=(2,)), {})
    torch.testing.assert_close(alone.expand(1, 1, -1, -1), whole[:, 2:])
    mixed = PerHead(methods=(("g", gate), ("w", method("window", density=0.3))), layers=("wgg", "ggg"))
    own, expected = mixed.plan(q, k, v, site(grid), {}), gate.plan(q, k, v, site(grid), {})
    mask = expected.block_mask().expand(1, 3, -1, -1)
    assert own.block_mask()[:, 1:].equal(mask[:, 1:])


@every_gate
def test_weights_of_another_model_are_refused(name, tmp_path):
    path = stored(method(name), tmp_path / "gate.safetensors")
    gate, (q, k, v) = method(name, weights=path), qkv(192, heads=3, dim=DIM)
    gate.check_model(2, 3)
    gate.check_transformer(("WanTransformer3DModel", "ModelMixin"))
    checks = {
        "layers=2, but this model has layers=30": lambda: gate.check_model(30, 3),
        "heads=3, but this model has heads=12": lambda: gate.check_model(2, 12),
        "for a WanTransformer3DModel, got a FluxTransformer2DModel": lambda: gate.check_transformer(
            ("FluxTransformer2DModel", "ModelMixin")
        ),
        "head_dim=16, but this model has head_dim=8": lambda: gate.begin_generation(q[..., :8], site(Grid(4, 6, 8))),
        "layers=2, but this model has layers=1": lambda: gate.plan(q, k, v, Site(Grid(4, 6, 8), BLOCK), {}),
    }
    for words, check in checks.items():
        with pytest.raises(ValueError) as error:
            check()
        assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 300


def test_weights_are_compared_with_the_transformer(tmp_path):
    """When a model is made sparse, also inside a composition."""
    tiny = ALL["ltx"]()
    text = json.dumps(stored(method("seer"), tmp_path / "gate.safetensors", heads=2))
    for one in (f"seer(weights={text})", f"cached(seer(weights={text}))"):
        with pytest.raises(ValueError, match="for a WanTransformer3DModel, got a LTXVideoTransformer3DModel"):
            ds.enable(tiny.pipe, one, density=0.3)


def test_files_that_are_no_weights_are_refused(tmp_path):
    seer = method("seer")
    good, other = stored(seer, tmp_path / "a.safetensors"), stored(method("dma"), tmp_path / "b.safetensors")
    broken, empty = tmp_path / "c.safetensors", tmp_path / "d.safetensors"
    broken.write_bytes(b"not a file of tensors")
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, str(empty))
    old = stored(seer, tmp_path / "e.safetensors", model="x")
    content = (tmp_path / "e.safetensors").read_bytes().replace(b'"schema":"1"', b'"schema":"7"')
    (tmp_path / "e.safetensors").write_bytes(content)
    cases = {
        "holds DMA": {"weights": other},
        "rank must be 8": {"weights": good, "rank": 4},
        "cannot be read": {"weights": str(broken)},
        "got None": {"weights": str(empty)},
        "with schema 1, got '7'": {"weights": old},
        "No such file": {"weights": str(tmp_path / "none.safetensors")},
        "must be a .safetensors file or a bundled name": {"weights": "no-such-model"},
    }
    for words, settings in cases.items():
        with pytest.raises(ValueError) as error:
            method("seer", **settings)
        assert words in str(error.value) and "\n" not in str(error.value)


def test_a_changed_file_is_read_again(tmp_path):
    path = tmp_path / "gate.safetensors"
    gate = method("swinbert", weights=stored(method("swinbert"), path))
    (q, k, v), at = qkv(192, heads=3, dim=DIM), site(Grid(4, 6, 8))
    before = gate.score(q, k, v, at, {})
    assert gate.score(q, k, v, at, {}).equal(before)
    content = gate.stored_weights()
    replace(content, tensors={name: 2 * tensor for name, tensor in content.tensors.items()}).write(path)
    os.utime(path, ns=(1, 1))
    assert not gate.score(q, k, v, at, {}).allclose(before)


def test_results_depend_on_the_weights(tmp_path):
    """The digest by which clips are stored differs between files, and is that of the content."""
    gate, paths = method("swinbert"), [tmp_path / f"{name}.safetensors" for name in "abc"]
    texts = [stored(gate, path, heads=heads) for path, heads in zip(paths, (2, 3, 3), strict=True)]
    digests = [method_digest(method("cached(swinbert)"))]
    digests += [method_digest(method("cached", inner=method("swinbert", weights=text))) for text in texts]
    assert len(set(digests[:3])) == 3 and digests[2] == digests[3]


@every_gate
def test_bundled_weights(name):
    """They have the name of their model, keep more attention mass of held-out prompts than the untrained gate, and
    their card and the docs hold these numbers."""
    cached = method(f"cached({name}(weights=shapes-wan))", density=0.25)
    weights = cached.inner.stored_weights()
    assert (weights.layers, weights.heads, weights.head_dim, weights.model) == (6, 3, 64, "shapes-wan")
    kept, folder = weights.training["kept_mass"], Path(ds.__file__).parent / "assets" / "gates"
    for density in ("0.15", "0.25"):
        assert kept["untrained"][density] < kept["trained"][density] < kept["best"][density]
    row = [f"{kept[part][density]:.3f}" for density in ("0.15", "0.25") for part in ("untrained", "trained", "best")]
    for page in (folder / "README.md", folder.parents[2] / "docs" / "gates.md"):
        assert f"| `{name}` | {' | '.join(row)} |" in page.read_text()
    with pytest.raises(ValueError, match="layers=6, but this model has layers=1"):
        plan_of(cached, Grid(4, 6, 8), BLOCK)


def test_bundled_weights_are_small():
    files = (Path(ds.__file__).parent / "assets" / "gates").glob("*.safetensors")
    assert sum(file.stat().st_size for file in files) < 300_000


@every_gate
def test_trained_gates_plan_without_synchronization(name, monkeypatch):
    """On a simulated GPU, whose tensors have no values to wait for."""
    with fake_gpu(monkeypatch):
        q, k, v = (torch.empty(2, 3, 1280, 64, dtype=torch.bfloat16, device="cuda") for _ in range(3))
        gate = method(f"{name}(weights=shapes-wan)", density=0.25)
        plan = gate.plan(q, k, v, Site(Grid(5, 16, 16), 64, layer=2, layers=6), {})
        assert plan.count.is_cuda and plan.blocks == 20
