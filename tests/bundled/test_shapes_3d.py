"""shapes-3d: prompts, solids, model, training and judge."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

import dit_sparse as ds
from dit_sparse.bundled import SOLID_PROMPT, solid_model_folder
from dit_sparse.bundled.shapes_3d.card import write_card
from dit_sparse.bundled.shapes_3d.concentration import BlockAttention, measure_concentration, sort_cells
from dit_sparse.bundled.shapes_3d.judge import compare_shapes, judge, judge_model
from dit_sparse.bundled.shapes_3d.model import CONDITION, PromptEncoder, SLatFlowModel
from dit_sparse.bundled.shapes_3d.pipeline import Shape, Shapes3DPipeline
from dit_sparse.bundled.shapes_3d.prompts import held_out_scenes, parse, random_scene
from dit_sparse.bundled.shapes_3d.solids import Solid, make_solid, surface_cells
from dit_sparse.bundled.shapes_3d.sparse_tensor import SparseTensor
from dit_sparse.bundled.shapes_3d.surface import CHANNELS, Surface, fine_surface
from dit_sparse.bundled.shapes_3d.train import CHECKPOINT, MODEL, train
from dit_sparse.bundled.shapes_3d.training.batches import CURRICULUM, Stage, make_batch
from dit_sparse.bundled.shapes_3d.training.trainer import Trainer
from dit_sparse.bundled.training.schedule import Budget

CONFIG = {"dim": 64, "heads": 2, "layers": 2, "cond_dim": 16}
TINY = (Stage(1.0, ((1, 8), (2, 8))),)
PROMPT = "a striped red torus on a blue box"


def true_shape(prompt: str = PROMPT, resolution: int = 20, seed: int = 1) -> Shape:
    scene = parse(prompt)
    solid = make_solid(scene, 0)
    cells = surface_cells(solid, resolution)
    return Shape(prompt, solid, cells, fine_surface(scene, cells, seed))


@pytest.fixture
def pipeline() -> Shapes3DPipeline:
    torch.manual_seed(0)
    model = SLatFlowModel(**CONFIG).eval().requires_grad_(False)
    torch.nn.init.normal_(model.out_layer.weight, std=0.1)
    return Shapes3DPipeline(model, PromptEncoder(CONFIG["cond_dim"]))


def test_a_prompt_describes_its_scene():
    for seed in range(200):
        scene = random_scene(random.Random(seed))
        assert parse(scene.prompt) == scene
    assert parse("Two big STRIPED red tori, standing on one blue box").prompt == "two striped red tori on a blue box"


@pytest.mark.parametrize("prompt", ["", "a red dog", "four red balls", "a red ball on a blue cone", "a ball on a box"])
def test_other_prompts_are_refused(prompt):
    with pytest.raises(ValueError, match="shapes-3d makes a ball"):
        parse(prompt)


def test_training_never_sees_a_held_out_prompt():
    held_out = {scene.prompt for scene in held_out_scenes(40)}
    assert all(parse(prompt).is_held_out for prompt in held_out)
    seen = [scene for number in range(60) for scene in make_batch(TINY[0], number, scale=4).scenes if scene is not None]
    assert len(seen) > 250 and not any(scene.is_held_out for scene in seen)


def test_the_coarse_condition_does_not_show_the_grain():
    one, other = true_shape(seed=1), true_shape(seed=2)
    assert torch.equal(one.cells.condition(), other.cells.condition())
    assert (one.surface.colours - other.surface.colours).abs().mean() > 0.05


def test_solids_and_surfaces_are_mirrored():
    shape = true_shape("four dotted teal gems on a white cylinder")
    place = {tuple(cell): row for row, cell in enumerate(shape.cells.coordinates.tolist())}
    mirror = torch.tensor([place[-x - 1, y, -z - 1] for x, y, z in shape.cells.coordinates.tolist()])
    turned = shape.surface.colours[mirror].view(-1, 2, 2, 2, 3).flip(1, 3).view(-1, 8, 3)
    assert torch.allclose(turned, shape.surface.colours, atol=1e-5)


def test_channels_hold_the_surface():
    shape = true_shape()
    channels = shape.surface.channels(shape.cells)
    again = Surface.from_channels(channels, shape.cells)
    assert channels.shape[1] == CHANNELS
    assert torch.allclose(again.distances, shape.surface.distances, atol=1e-5)
    assert torch.allclose(again.colours, shape.surface.colours, atol=1e-5)


@pytest.mark.parametrize("resolution", [7, 9, 98, 16.0])
def test_other_resolutions_are_refused(resolution):
    with pytest.raises(ValueError, match="even number of cells from 8 to 96"):
        surface_cells(make_solid(parse(PROMPT), 0), resolution)


def test_permuting_cells_permutes_the_output(pipeline):
    cells = true_shape(resolution=12).cells
    noise, order = torch.randn(len(cells.coordinates), CHANNELS), torch.randperm(len(cells.coordinates))
    shuffled = replace(cells, **{name: getattr(cells, name)[order] for name in ("coordinates", "distances", "part")})
    expected = pipeline.denoise(parse(PROMPT), cells, noise, 2)[order]
    assert torch.allclose(pipeline.denoise(parse(PROMPT), shuffled, noise[order], 2), expected, atol=1e-5)


def test_packed_items_do_not_mix(pipeline):
    generator = torch.Generator().manual_seed(0)
    values = lambda count, channels: torch.randn(count, channels, generator=generator)
    cells = [true_shape(prompt, 10).cells for prompt in (PROMPT, "a red ball")]
    feats, coarse = ([values(len(one.coordinates), n) for one in cells] for n in (CHANNELS, CONDITION))
    coordinates, cond = [one.coordinates for one in cells], values(4, 16).view(2, 2, 16)
    t = torch.tensor([300.0, 900.0])
    both = pipeline.model(SparseTensor.pack(feats, coordinates), t, cond, SparseTensor.pack(coarse, coordinates)).feats
    for item, own in enumerate(both.split([len(one) for one in feats])):
        alone = [SparseTensor.pack([parts[item]], [coordinates[item]]) for parts in (feats, coarse)]
        assert torch.allclose(pipeline.model(alone[0], t[item, None], cond[item, None], alone[1]).feats, own, atol=1e-5)


def test_the_adapter_of_trellis_makes_it_sparse(pipeline):
    call = {"resolution": 12, "num_inference_steps": 4}
    make = lambda: pipeline(PROMPT, generator=torch.Generator().manual_seed(0), **call).surface.colours
    dense = make()
    run = ds.enable(pipeline, "window", density=1.0, min_tokens=0, dense_steps=0)
    assert torch.allclose(make(), dense, atol=1e-5)
    run.disable()
    run = ds.enable(pipeline, "svg2", density=0.4, min_tokens=0, dense_steps=1)
    sparse, report = make(), run.report()
    run.disable()
    assert report.sparse_calls == 3 * CONFIG["layers"] and report.density_achieved < 0.5
    assert 1e-4 < (sparse - dense).abs().mean() < 0.3
    assert torch.equal(make(), dense)


def test_guidance_of_one_is_the_prompt_alone(pipeline):
    make = lambda scale: (
        pipeline(PROMPT, 8, 2, guidance_scale=scale, generator=torch.Generator().manual_seed(0)).surface.colours
    )
    assert not torch.allclose(make(1.0), make(3.0), atol=1e-4)


@pytest.mark.parametrize("call", [{"num_inference_steps": 0}, {"guidance_scale": -1}, {"num_inference_steps": 2.5}])
def test_bad_arguments_are_refused(pipeline, call):
    with pytest.raises(ValueError, match=next(iter(call))):
        pipeline(PROMPT, **call)


def test_a_saved_model_is_loaded(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path / "model")
    loaded = Shapes3DPipeline.from_pretrained(tmp_path / "model")
    make = lambda pipe: pipe(PROMPT, 8, 2, generator=torch.Generator().manual_seed(0)).surface.colours
    assert torch.allclose(make(loaded), make(pipeline), atol=0.01)
    with pytest.raises(ValueError, match=r"needs config\.json"):
        Shapes3DPipeline.from_pretrained(tmp_path)


def test_a_resumed_training_equals_an_uninterrupted_one(tmp_path):
    start = lambda: Trainer(Budget(steps=4), TINY, CONFIG)
    whole = start()
    for _ in range(4):
        whole.step()
    first = start()
    for _ in range(2):
        first.step()
    first.save(tmp_path / CHECKPOINT)
    second = start()
    second.load(tmp_path / CHECKPOINT)
    train(second, tmp_path, MODEL)
    for expected, weight in zip(whole.average.parameters(), second.average.parameters(), strict=True):
        assert torch.equal(weight, expected)
    assert Shapes3DPipeline.from_pretrained(tmp_path / "shapes-3d").model.config == CONFIG
    third = start()
    third.load_weights(tmp_path / "shapes-3d")
    for expected, weight in zip(second.average.parameters(), third.modules.parameters(), strict=True):
        assert torch.allclose(weight, expected, atol=1e-2)


def test_the_curriculum_covers_the_budget():
    assert CURRICULUM[-1].until == 1 and [stage.until for stage in CURRICULUM] == sorted(s.until for s in CURRICULUM)


def test_attention_on_all_blocks_is_dense():
    q, k, v = torch.randn(3, 1, 2, 150, 16).unbind(0)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    for mask in ("dense", "best", "random"):
        with BlockAttention(mask) as attention:
            out = torch.nn.functional.scaled_dot_product_attention(q, k, v)
        assert torch.allclose(out, expected, atol=1e-5) == (mask == "dense")
        assert attention.masses[0].shape == (2,) and (attention.masses[0] > 0.3).all()


def test_sorted_cells_are_the_same_cells():
    cells = true_shape(resolution=12).cells
    ordered = sort_cells(cells)
    assert sorted(ordered.coordinates.tolist()) == sorted(cells.coordinates.tolist())
    assert not torch.equal(ordered.coordinates, cells.coordinates)


def defects(shape: Shape) -> list[str]:
    return [name for name, right in vars(judge(shape)[0]).items() if not right]


def with_surface(shape: Shape, **changes) -> Shape:
    return replace(shape, surface=replace(shape.surface, **changes))


@pytest.mark.parametrize("prompt", [PROMPT, "two checked orange cones on a striped green cylinder", "a white gem"])
def test_the_judge_accepts_training_data(prompt):
    assert defects(true_shape(prompt, 24)) == []


def test_the_judge_finds_planted_defects():
    shape = true_shape(resolution=24)
    colours, coarse = shape.surface.colours, shape.cells.distances
    noise = 0.1 * torch.randn(colours.shape[:2], generator=torch.Generator().manual_seed(0))
    assert "colour" in defects(with_surface(shape, colours=colours.flip(-1)))
    plain = true_shape("a red torus on a blue box", 24)
    assert "pattern" in defects(with_surface(shape, colours=plain.surface.colours))
    assert "relief" in defects(with_surface(shape, distances=coarse))
    assert "agreement" in defects(with_surface(shape, distances=coarse + noise))
    stray = lambda p: (p - torch.tensor([0.0, 0.8, 0.0])).norm(dim=-1) - 0.08
    solid = Solid((lambda p: torch.minimum(shape.solid.parts[0](p), stray(p)), shape.solid.parts[1]))
    assert defects(replace(shape, solid=solid)) == ["one_body"]


def test_comparisons_measure_the_difference():
    shape, other = true_shape(), true_shape(seed=2)
    same, different = (compare_shapes(one, shape, points=1000, size=64) for one in (shape, other))
    assert same["colour_psnr"] == np.inf and same["chamfer"] < 1e-4 and same["normal_consistency"] > 0.999
    assert different["colour_psnr"] < 25 and 0.05 < different["chamfer"] < 0.4


def test_the_card_is_written_from_the_reports(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    (tmp_path / "reports").mkdir()
    training = {"steps": 7, "cpu_minutes": 3, "fraction": 0.5, "device": "one CPU thread", "resolutions": [8, 40]}
    scenes, call = held_out_scenes(1), {"resolution": 8, "num_inference_steps": 2}
    reports = {
        "training": training,
        "concentration": measure_concentration(pipeline, 10, scenes, steps=2),
        "judge": judge_model(pipeline, scenes, **call),
    }
    for name, report in reports.items():
        (tmp_path / "reports" / f"{name}.json").write_text(json.dumps(report))
    write_card(tmp_path)
    card = (tmp_path / "README.md").read_text()
    assert "7 steps, 3 minutes of processor time" in card and "stopped after 50 %" in card
    assert f"| {reports['concentration']['mean']:.2f} | 0.65 |" in card


def test_the_shipped_weights_make_the_solid_of_the_prompt():
    folder = solid_model_folder()
    assert (folder / "model.safetensors").stat().st_size < 8e6
    generator = torch.Generator().manual_seed(0)
    shape = Shapes3DPipeline.from_pretrained(folder)(SOLID_PROMPT, 16, 6, generator=generator)
    verdict, _ = judge(shape)
    assert verdict.colour and verdict.watertight
