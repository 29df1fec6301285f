"""Plain torch modules, such as 3-D denoisers: self-attention is intercepted, planned item by item and restored."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import plain_modules as plain
from attention_cases import assert_near
from dit_sparse import Grid, ModuleAdapter, VoxelGrid, enable
from dit_sparse.engine.interception.module_link import link_of
from voxel_sets import packed, surface

TIMES = (1.0, 0.8, 0.5, 0.2)
PACKED = ModuleAdapter(
    sites=r"blocks\.\d+\.self_attn",
    call="sparse_scaled_dot_product_attention",
    grid=lambda arguments: VoxelGrid(arguments["x"].coords),
    step=lambda arguments: arguments["t"],
)
ANCHORED = ModuleAdapter(
    sites=r"blocks\.\d+\.attn1",
    grid=lambda arguments: [VoxelGrid(voxels, before=1) for voxels in arguments["voxel_cond"]],
    step=lambda arguments: arguments["t"],
)
OPTIONS = {"executor": "gather", "block": 16, "min_tokens": 0}


@torch.no_grad()
def denoise(model: nn.Module, *, sizes=(300, 40), shuffle=None, branches=1) -> Tensor:
    """Return the output of a few Euler steps, ``[T, D]`` or ``[B, N, D]``; ``shuffle`` is a seed."""
    random = lambda *shape, seed: torch.randn(*shape, generator=torch.Generator().manual_seed(seed))
    is_packed = isinstance(model, plain.PackedDenoiser)
    same_size = torch.stack([surface(sizes[0], seed) for seed in range(len(sizes))])
    coordinates = packed(*sizes) if is_packed else same_size
    x = random(*coordinates.shape[:-1], plain.DIM, seed=0)
    context = random(len(sizes), 5, plain.DIM, seed=1)
    if shuffle is not None:
        order = torch.randperm(x.shape[-2], generator=torch.Generator().manual_seed(shuffle))
        x, coordinates = x[..., order, :], coordinates[..., order, :]
    for step, t in enumerate(TIMES):
        if is_packed:
            inputs = plain.SparseTensor(x, coordinates)
            outputs = [model(inputs, torch.tensor(t), cond=context * (1 + n)).feats for n in range(branches)]
        else:
            outputs = [model(x, torch.tensor(t), context * (1 + n), voxel_cond=coordinates) for n in range(branches)]
        x = x - (t - (*TIMES, 0.0)[step + 1]) * sum(outputs) / branches
    return x if shuffle is None else x.index_select(-2, order.argsort())


def model_of(cls: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return cls().eval()


CASES = {
    "packed": (plain.PackedDenoiser, PACKED),
    "anchored": (plain.AnchoredDenoiser, ANCHORED),
    "alias in a helper": (plain.AliasDenoiser, ANCHORED),
    "torch.nn.functional": (plain.LongNameDenoiser, ANCHORED),
    "function of its own": (
        plain.OwnDenoiser,
        ModuleAdapter(ANCHORED.sites, ANCHORED.grid, ANCHORED.step, call="flash_attention", heads_first=False),
    ),
}
every_case = pytest.mark.parametrize("cls, adapter", CASES.values(), ids=CASES)


@every_case
def test_density_one_is_the_dense_model(cls, adapter):
    """Undo is exact: the same objects, and equal bits."""
    model = model_of(cls)
    dense, before = denoise(model), [dict(module.__dict__) for module in model.modules()]
    with enable(model, "subblock", density=1.0, family=adapter, dense_steps=1, **OPTIONS) as run:
        assert_near(denoise(model), dense, 1e-5)
        report = run.report()
    assert denoise(model).equal(dense)
    after = [dict(module.__dict__) for module in model.modules()]
    assert [set(one) for one in after] == [set(one) for one in before] and not any(map(link_of, model.modules()))
    items = 2
    assert report.sparse_calls == 3 * len(model.blocks) * items


@every_case
def test_plans_have_the_density_and_change_the_output(cls, adapter):
    model, seen = model_of(cls), []
    dense = denoise(model)
    with enable(model, "subblock", density=0.3, family=adapter, dense_steps=1, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: seen.append((site.grid, site.step, site.layer, plan.density)))
        sparse = denoise(model)
        again = denoise(model)
    assert sparse.equal(again), "plans of one generation do not affect the next"
    assert 1e-3 < float((sparse - dense).norm() / dense.norm()) < 0.5
    assert {step for _, step, _, _ in seen} == {1, 2, 3} and {layer for _, _, layer, _ in seen} == {0, 1}
    assert all(abs(density - 0.3) < 0.02 for grid, _, _, density in seen if grid.video == 300)


@every_case
def test_the_order_of_the_voxels_does_not_matter(cls, adapter):
    """UltraShape shuffles its voxels. Equal sets of voxels get equal plans."""
    model = model_of(cls)
    with enable(model, "svg2", density=0.3, family=adapter, dense_steps=1, **OPTIONS):
        assert_near(denoise(model, shuffle=7), denoise(model), 1e-5)


@pytest.mark.parametrize("cls, adapter", [CASES["packed"], CASES["anchored"]], ids=["packed", "anchored"])
def test_items_do_not_affect_each_other(cls, adapter):
    model = model_of(cls)
    with enable(model, "subblock", density=0.3, family=adapter, dense_steps=0, **OPTIONS):
        alone, together = denoise(model, sizes=(300,)), denoise(model, sizes=(300, 40))
    first = together[:300] if cls is plain.PackedDenoiser else together[:1]
    assert_near(first, alone, 1e-5)


def test_branches_of_guidance_share_plans():
    """Both branches get the same latents object, one call after the other."""
    model = model_of(plain.PackedDenoiser)
    plans = []
    with enable(model, "subblock", density=0.3, family=PACKED, dense_steps=0, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: plans.append((site.step, site.layer, site.grid.video, plan.index)))
        denoise(model, sizes=(300,), branches=2)
    assert len(plans) == 2 * 2 * len(TIMES)
    by_call = {}
    for step, layer, video, index in plans:
        by_call.setdefault((step, layer, video), []).append(index)
    assert all(len(pair) == 2 and pair[0].equal(pair[1]) for pair in by_call.values())


def test_cross_attention_is_not_touched():
    """Also if the regular expression matches it: it has other keys than queries."""
    model = model_of(plain.AnchoredDenoiser)
    both = ModuleAdapter(r"blocks\.\d+\.attn\d", ANCHORED.grid, ANCHORED.step)
    grids = []
    with enable(model, "subblock", density=0.4, family=both, dense_steps=0, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: grids.append((site.layer, site.grid.tokens)))
        denoise(model)
    assert set(grids) == {(0, 301), (2, 301)}
    with enable(model, "subblock", density=0.4, family=ANCHORED, dense_steps=0, **OPTIONS):
        assert not link_of(model.blocks[0].attn2) and link_of(model.blocks[0].attn1)


def test_default_method_is_svg2_and_dense_is_bit_equal():
    model = model_of(plain.PackedDenoiser)
    dense = denoise(model)
    with enable(model, family=PACKED, steps=len(TIMES)) as run:
        assert "svg2" in repr(run)
    with enable(model, "dense", family=PACKED, steps=len(TIMES)):
        assert denoise(model).equal(dense)


def test_two_models_of_a_cascade_have_runs_of_their_own():
    first, second = model_of(plain.PackedDenoiser), model_of(plain.PackedDenoiser)
    options = {"density": 0.3, "family": PACKED, "dense_steps": 0, **OPTIONS}
    with enable(first, "subblock", **options) as one, enable(second, "subblock", **options) as two:
        alone = denoise(first, sizes=(300,)), denoise(second, sizes=(90,))
        again = denoise(first, sizes=(300,)), denoise(second, sizes=(90,))
        assert all(a.equal(b) for a, b in zip(alone, again, strict=True))
        assert "300 voxels" in str(one.report()) and "90 voxels" in str(two.report())


def test_a_copy_of_a_sparse_model_is_unmodified():
    model = model_of(plain.AnchoredDenoiser)
    dense = denoise(model)
    with enable(model, "subblock", density=0.3, family=ANCHORED, dense_steps=0, **OPTIONS):
        assert denoise(copy.deepcopy(model)).equal(dense) and not denoise(model).equal(dense)


def test_a_dense_grid_of_tokens_works_too():
    """Frames x 1 x tokens, with a method that needs frames."""
    model = model_of(plain.AnchoredDenoiser)
    adapter = ModuleAdapter(ANCHORED.sites, lambda arguments: Grid(4, 1, 75, before=1), ANCHORED.step)
    dense = denoise(model)
    with enable(model, "radial", density=1.0, family=adapter, dense_steps=0, **OPTIONS):
        assert_near(denoise(model), dense, 1e-5)


def test_modules_with_a_processor_and_frames_of_tokens():
    """As in ActionMesh: frames x 1 x tokens, a time token in every frame, and a processor that computes attention."""
    model, seen = model_of(plain.FrameDenoiser), []
    x, context = torch.randn(2, 4, 24, plain.DIM), torch.randn(2, 5, plain.DIM)
    frames = lambda arguments: Grid(arguments["x"].shape[1], 1, arguments["x"].shape[2] + 1)
    adapter = ModuleAdapter(ANCHORED.sites, frames, ANCHORED.step)
    processors = [block.attn1.processor for block in model.blocks]
    with torch.no_grad():
        dense = model(x, torch.tensor(0.5), context)
        with enable(model, "radial", density=1.0, family=adapter, dense_steps=0, **OPTIONS) as run:
            run.observe(lambda site, q, k, plan: seen.append((site.layer, str(site.grid))))
            assert_near(model(x, torch.tensor(0.5), context), dense, 1e-5)
        assert model(x, torch.tensor(0.5), context).equal(dense)
    assert seen == [(0, "4x1x25"), (1, "4x1x25")]
    assert [block.attn1.processor for block in model.blocks] == processors


# --- wrong use


def run_sparsely(model: nn.Module, adapter: ModuleAdapter, method: str = "subblock", **settings) -> None:
    with enable(model, method, density=0.3, family=adapter, **{"dense_steps": 0} | OPTIONS | settings):
        denoise(model)


def wrong_grid(**changes) -> ModuleAdapter:
    values = {"sites": PACKED.sites, "grid": PACKED.grid, "step": PACKED.step, "call": PACKED.call}
    return ModuleAdapter(**values | changes)


OWN = {"sites": ANCHORED.sites, "grid": ANCHORED.grid, "step": ANCHORED.step}
WRONG = {
    "no such module": (plain.PackedDenoiser, wrong_grid(sites="attn"), "no self-attention module that matches"),
    "no such function": (
        plain.PackedDenoiser,
        wrong_grid(call="flash_attn"),
        "does not call flash_attn: pass",
    ),
    "its own function": (plain.PackedDenoiser, wrong_grid(call=None, sites="blocks"), "does not call F.scaled_dot"),
    "another class": (plain.PackedDenoiser, wrong_grid(transformers=("Other",)), "is for Other, got the transformer"),
    "no grid": (plain.PackedDenoiser, wrong_grid(grid=lambda arguments: None), "grid must return a Grid"),
    "one item for two": (
        plain.PackedDenoiser,
        wrong_grid(grid=lambda arguments: VoxelGrid(arguments["x"].coords[:, 1:] + 99 * arguments["x"].coords[:, :1])),
        "does not compute the attention of its arguments within each item",
    ),
    "heads and tokens exchanged": (
        plain.OwnDenoiser,
        ModuleAdapter(call="rotated_attention", heads_first=False, **OWN),
        "does not compute the attention of its arguments",
    ),
}


@pytest.mark.parametrize("cls, adapter, words", WRONG.values(), ids=WRONG)
def test_wrong_adapters_are_named(cls, adapter, words):
    model = model_of(cls)
    for block in model.blocks if cls is plain.OwnDenoiser else ():
        block.attn1.bias = None
    dense = denoise(model)
    with pytest.raises(ValueError, match=words) as error:
        run_sparsely(model, adapter)
    assert "\n" not in str(error.value) and denoise(model).equal(dense)


def test_no_intercepted_call_is_an_error():
    """Such as an attention function that is chosen by a setting of the model."""
    model = model_of(plain.OwnDenoiser)
    for block in model.blocks:
        block.attn1.bias = True
    adapter = ModuleAdapter(call="flash_attention", heads_first=False, **OWN)
    with pytest.raises(RuntimeError, match="no self-attention call of OwnDenoiser was intercepted"):
        run_sparsely(model, adapter)


def test_methods_that_need_frames_are_refused_before_the_forward():
    model, calls = model_of(plain.PackedDenoiser), []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match="Radial does not apply to 340 voxels of 2 items"):
        run_sparsely(model, PACKED, "radial")
    assert not calls


def test_a_model_is_made_sparse_once():
    model = model_of(plain.PackedDenoiser)
    with (
        enable(model, "subblock", density=0.3, family=PACKED, dense_steps=0),
        pytest.raises(ValueError, match="already"),
    ):
        enable(model, "subblock", density=0.3, family=PACKED, dense_steps=0)


def test_nothing_global_is_patched():
    model, before = model_of(plain.AnchoredDenoiser), F.scaled_dot_product_attention
    other = model_of(plain.AnchoredDenoiser)
    with enable(model, "subblock", density=0.3, family=ANCHORED, dense_steps=0, **OPTIONS):
        assert F.scaled_dot_product_attention is before and torch.nn.functional.scaled_dot_product_attention is before
        assert "forward" not in other.blocks[0].attn1.__dict__
