"""3-D denoisers that are not in diffusers: found by their class names in the pipelines that hold them."""

from __future__ import annotations

import re
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

import three_d_models as models
from attention_cases import assert_near
from dit_sparse import ModuleAdapter, enable
from dit_sparse.engine.interception.module_link import link_of
from dit_sparse.pipelines.module_adapter import ADAPTERS, adapter_of
from three_d_models import CASES, Case, denoise
from voxel_sets import packed

OPTIONS = {"executor": "gather", "block": 16, "min_tokens": 0}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def model_of(case: Case, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return case.build().eval()


@every_case
def test_density_one_is_the_dense_model_and_undo_is_exact(case):
    model = model_of(case)
    dense, before = denoise(case, model), [dict(module.__dict__) for module in model.modules()]
    with enable(model, "subblock", density=1.0, dense_steps=1, **OPTIONS) as run:
        assert_near(denoise(case, model), dense, 1e-5)
        report = run.report()
    assert report.sparse_calls == 3 * case.calls, report
    assert denoise(case, model).equal(dense)
    assert [dict(module.__dict__) for module in model.modules()] == before


@every_case
def test_sparse_steps_have_the_density_and_change_the_output(case):
    model, seen = model_of(case), []
    dense = denoise(case, model)
    with enable(model, "subblock", density=0.4, dense_steps=1, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: seen.append((site.step, plan.density, site.grid.tokens)))
        sparse = denoise(case, model)
        assert denoise(case, model).equal(sparse)
    assert 1e-4 < float((sparse - dense).norm() / dense.norm()) < 0.5
    assert {step for step, _, _ in seen} == {1, 2, 3}
    assert all(abs(density - 0.4) < 0.03 for _, density, tokens in seen if tokens > 150)


@pytest.mark.parametrize("name", ["trellis 2", "trellis 1", "ultrashape"])
def test_permuting_the_voxels_permutes_the_output(name):
    case = CASES[name]
    model, order = model_of(case), torch.randperm(case.shape[-2], generator=torch.Generator().manual_seed(3))
    with enable(model, "subblock", density=0.3, dense_steps=0, **OPTIONS):
        assert_near(denoise(case, model, order=order), denoise(case, model), 1e-5)


def test_every_adapter_has_a_stand_in_and_a_row_in_the_documentation():
    found = {adapter_of(model_of(case)).name for case in CASES.values()}
    assert found == set(ADAPTERS)
    text = (Path(__file__).parents[2] / "docs" / "three-d.md").read_text()
    for name in ADAPTERS:
        adapter = import_module(f"dit_sparse.pipelines.three_d.{name}").ADAPTER
        row = re.search(rf"^\| .*pipelines/three_d/{name}\.py.*$", text, re.MULTILINE)[0]
        assert all(f"`{transformer}`" in row for transformer in adapter.transformers)


# --- pipelines


class Decoder(nn.Module):
    """Not a denoiser, with the names of one."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.ModuleDict({"self_attn": nn.Linear(4, 4)})])


FINE = Case(models.SLatFlowModel, (300, models.DIM), models._packed, 2, packed(300, seed=5))
STAGES = {  # name: case, steps, first timestep
    "models.shape_slat_flow_model_512": (CASES["trellis 2"], 4, 1.0),
    "models.shape_slat_flow_model_1024": (FINE, 6, 0.9),
    "models.tex_slat_flow_model_1024": (FINE, 3, 0.8),
}


def cascade() -> SimpleNamespace:
    """The models of TRELLIS.2's pipeline: several of one class, for different coordinates and numbers of steps."""
    names = [name.removeprefix("models.") for name in STAGES]
    denoisers = {name: model_of(FINE, seed) for seed, name in enumerate(names)}
    return SimpleNamespace(models={"shape_slat_decoder": Decoder(), **denoisers}, image_cond_model=None)


def run_cascade(pipeline: SimpleNamespace) -> list[Tensor]:
    outputs = []
    for name, (case, steps, first) in STAGES.items():
        outputs.append(denoise(case, pipeline.models[name.removeprefix("models.")], steps=steps, first=first))
    return outputs


def test_models_of_a_cascade_have_steps_and_plans_of_their_own():
    """Each output is that of a model that was made sparse alone."""
    pipeline, alone, seen = cascade(), [], []
    settings = {"method": "subblock", "density": 0.3, "dense_steps": 2, **OPTIONS}
    dense = run_cascade(pipeline)
    for name, (case, steps, first) in STAGES.items():
        model = pipeline.models[name.removeprefix("models.")]
        with enable(model, **settings):
            alone.append(denoise(case, model, steps=steps, first=first))
    with enable(pipeline, **settings) as run:
        run.observe(lambda site, q, k, plan: seen.append((site.component, site.step)))
        together = run_cascade(pipeline)
        again = run_cascade(pipeline)
    assert all(a.equal(b) and a.equal(c) for a, b, c in zip(alone, together, again, strict=True))
    assert not any(a.equal(b) for a, b in zip(alone, dense, strict=True))
    assert set(seen) == {(name, step) for name, (_, steps, _) in STAGES.items() for step in range(2, steps)}
    assert all(a.equal(b) for a, b in zip(run_cascade(pipeline), dense, strict=True))


def test_models_may_take_turns():
    """Their steps are counted separately, whatever the order of the calls."""
    pipeline, steps = cascade(), []
    first, second = (pipeline.models[f"shape_slat_flow_model_{size}"] for size in (512, 1024))
    x, y = models.random(300, models.DIM), models.random(300, models.DIM, seed=1)
    with torch.no_grad(), enable(pipeline, "subblock", density=0.3, dense_steps=0, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: steps.append((site.component[-4:].strip("_"), site.step)))
        for t in (1.0, 0.6, 0.2):
            models._packed(first, x, t, FINE.coordinates)
            models._packed(second, y, t / 2, FINE.coordinates)
    assert list(dict.fromkeys(steps)) == [(size, step) for step in range(3) for size in ("512", "1024")]


def test_one_model_may_serve_two_sets_of_coordinates():
    """A second set begins a generation of its own."""
    model, grids = model_of(FINE), []
    with enable(model, "subblock", density=0.3, dense_steps=1, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: grids.append((site.step, site.grid.video)))
        coarse, fine = denoise(CASES["trellis 2"], model), denoise(FINE, model)
    assert {voxels for step, voxels in grids} == {230, 40, 300} and min(step for step, _ in grids) == 1
    for case, expected in ((CASES["trellis 2"], coarse), (FINE, fine)):
        with enable(model, "subblock", density=0.3, dense_steps=1, **OPTIONS):
            assert denoise(case, model).equal(expected)


def test_defaults_need_no_arguments():
    """svg2, and a quarter of the 12 steps of TRELLIS.2 dense."""
    pipeline, steps = cascade(), set()
    with enable(pipeline, min_tokens=0) as run:
        assert "svg2" in repr(run)
        run.observe(lambda site, q, k, plan: steps.add(site.step))
        denoise(FINE, pipeline.models["tex_slat_flow_model_1024"], steps=12)
    assert steps == set(range(3, 12))


def test_models_inside_other_modules_and_attributes_are_found():
    """As in ActionMesh, whose pipeline is a module; SAM 3D Objects, whose generators hold them; and UltraShape."""
    meshes, slat, shape = CASES["actionmesh"], CASES["trellis 1"], CASES["ultrashape"]
    action = nn.Module()
    action.vae, action.temporal_3D_denoiser = Decoder(), model_of(meshes)
    generator = nn.Module()
    generator.reverse_fn = nn.ModuleDict({"backbone": model_of(slat)})
    objects = SimpleNamespace(models=nn.ModuleDict({"slat_generator": generator, "decoder": Decoder()}))
    ultra = SimpleNamespace(vae=Decoder(), model=model_of(shape), scheduler=None)
    ultra.same_model = ultra.model
    places = {
        "temporal_3D_denoiser": (action, action.temporal_3D_denoiser, meshes),
        "models.slat_generator.reverse_fn.backbone": (objects, generator.reverse_fn["backbone"], slat),
        "model": (ultra, ultra.model, shape),
    }
    for name, (pipeline, model, case) in places.items():
        components = set()
        with enable(pipeline, "subblock", density=0.4, dense_steps=0, **OPTIONS) as run:
            run.observe(lambda site, q, k, plan, components=components: components.add(site.component))
            denoise(case, model)
        assert components == {name} and run.report().sparse_calls == 4 * case.calls
        assert not any(map(link_of, model.modules()))


def test_the_scheduler_of_a_pipeline_gives_the_steps():
    """Hunyuan3D 2.0 gives the model the time in [0, 1], rising, and its scheduler has times up to 1000."""
    case, steps = CASES["hunyuan3d 2.0"], set()
    pipeline = SimpleNamespace(model=model_of(case), scheduler=SimpleNamespace(timesteps=torch.arange(8) * 125.0))
    x = models.random(*case.shape)
    with torch.no_grad(), enable(pipeline, "subblock", density=0.4, dense_steps=0.5, **OPTIONS) as run:
        run.observe(lambda site, q, k, plan: steps.add((site.step, site.steps)))
        for t in pipeline.scheduler.timesteps.tolist():
            case.predict(pipeline.model, x, t / 1000, None)
    assert steps == {(step, 8) for step in range(4, 8)}


def test_components_of_a_pipeline_are_made_sparse_and_restored():
    """PartCrafter's pipeline is one of diffusers, with a component named transformer."""
    case = CASES["partcrafter"]
    pipeline = SimpleNamespace(transformer=model_of(case))
    pipeline.components = {"transformer": pipeline.transformer, "vae": Decoder()}
    dense = denoise(case, pipeline.transformer)
    enable(pipeline, "subblock", density=0.4, dense_steps=0, **OPTIONS)
    assert not denoise(case, pipeline.transformer).equal(dense)
    pipeline.set_attn_processor(None)
    assert denoise(case, pipeline.transformer).equal(dense)


@pytest.mark.slow
def test_a_compiled_model_runs_eagerly_while_it_is_sparse():
    case = CASES["hunyuan3d 2.1"]
    model = model_of(case)
    compiled, dense = torch.compile(model, backend="eager"), denoise(case, model)
    with enable(model, "subblock", density=0.4, dense_steps=0, **OPTIONS) as run:
        sparse = denoise(case, model)
        assert denoise(case, compiled).equal(sparse) and run.report().sparse_calls == 2 * 4 * case.calls
    assert_near(denoise(case, compiled), dense, 1e-5)


# --- wrong use


def test_objects_without_a_known_model_are_refused():
    with pytest.raises(ValueError, match="SimpleNamespace has no transformer to make sparse"):
        enable(SimpleNamespace(models={"decoder": Decoder()}, name="x"))
    with pytest.raises(ValueError, match="supports Decoder"):
        enable(Decoder())


def test_an_adapter_of_the_user_must_name_its_classes():
    case = CASES["trellis 2"]
    known = adapter_of(model_of(case))
    values = {"sites": known.sites, "call": known.call, "grid": known.grid, "step": known.step}
    with pytest.raises(ValueError, match="name their classes as transformers="):
        enable(cascade(), "subblock", family=ModuleAdapter(**values))
    pipeline = cascade()
    only = ModuleAdapter(r"blocks\.0\.self_attn", known.grid, known.step, known.call, transformers=("SLatFlowModel",))
    with enable(pipeline, "subblock", density=0.3, family=only, dense_steps=0, **OPTIONS) as run:
        denoise(FINE, pipeline.models["tex_slat_flow_model_1024"])
    assert run.report().sparse_calls == 4
