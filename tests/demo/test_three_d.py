"""The demo of solids: its files, result and errors."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from dit_sparse import SparseAttnProcessor
from dit_sparse.bundled.shapes_3d.model import PromptEncoder, SLatFlowModel, save_weights
from dit_sparse.bundled.shapes_3d.prompts import parse
from dit_sparse.bundled.shapes_3d.solids import make_solid, surface_cells
from dit_sparse.cli.main import app
from dit_sparse.demo.solids import solid_demo
from dit_sparse.demo.solids.solid_demo import FILES, KEPT_COLOUR, QUERY_COLOUR, SolidDemo, mask_colours

trimesh = pytest.importorskip("trimesh")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("model")
    model = SLatFlowModel(dim=64, heads=2, layers=2, cond_dim=16)
    torch.nn.init.normal_(model.out_layer.weight, std=0.1)
    save_weights(folder, model, PromptEncoder(16))
    return folder


@pytest.fixture(autouse=True)
def small_pictures(monkeypatch):
    for name, value in (("PICTURE_SIZE", 48), ("VIDEO_SIZE", 48), ("VIDEO_FRAMES", 2)):
        monkeypatch.setattr(solid_demo, name, value)
    monkeypatch.setattr(solid_demo, "compare_shapes", partial(solid_demo.compare_shapes, points=500, size=32))


def test_the_command_writes_meshes_and_pictures(model, tmp_path):
    options = ["--three-d", "--model", str(model), "--out", str(tmp_path), "--resolution", "12", "--steps", "4"]
    outcome = CliRunner().invoke(
        app, ["demo", *options, "--method", "window", "--density", "0.5", "--executor", "gather"]
    )
    assert outcome.exit_code == 0, outcome.output
    assert all((tmp_path / name).exists() for name in FILES)
    for name in ("dense.glb", "sparse.glb"):
        assert trimesh.load(tmp_path / name, force="mesh").is_watertight
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["cells"] > 300 and 0.2 < result["density_achieved"] < 0.7
    assert result["chamfer"] < 1 and result["normal_consistency"] > 0.5 and result["colour_psnr"] > 5
    assert "chamfer distance (cells)" in outcome.output
    assert np.ptp(np.asarray(Image.open(tmp_path / "mask.png")).astype(int)) > 100


def test_a_dense_demo_is_dense(model, tmp_path):
    call = {"resolution": 8, "num_inference_steps": 2}
    result = SolidDemo(SparseAttnProcessor("dense"), tmp_path, call=call, model=model).run(lambda name: lambda *_: None)
    assert result["chamfer"] < 1e-4 and result["density_run"] == 1 and not (tmp_path / "mask.png").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--three-d", "--resolution", "15"], "even number of cells"),
        (["--three-d", "--prompt", "a dog"], "shapes-3d makes a ball"),
        (["--three-d", "--steps", "1"], "at least 2 steps"),
        (["--resolution", "16"], "--resolution needs --three-d"),
    ],
)
def test_bad_options_are_refused(options, message, model, tmp_path):
    extra = ["--model", str(model)] if "--three-d" in options else []
    outcome = CliRunner().invoke(app, ["demo", *options, *extra, "--out", str(tmp_path)])
    assert outcome.exit_code == 2 and message in outcome.output


def test_a_folder_without_a_model_is_refused(tmp_path):
    demo = SolidDemo(SparseAttnProcessor("dense"), tmp_path, model=tmp_path)
    with pytest.raises(ValueError, match="no folder of shapes-3d"):
        demo.run(lambda name: lambda *_: None)


def test_the_mask_marks_the_query_and_its_keys():
    cells = surface_cells(make_solid(parse("a red box"), 0), 12)
    query, kept = cells.coordinates[40].numpy(), cells.coordinates[[40, 300]].numpy()
    colours = mask_colours(cells, query, kept)
    assert torch.allclose(colours[40], torch.tensor(QUERY_COLOUR))
    assert torch.allclose(colours[300], torch.tensor(KEPT_COLOUR))
    assert (colours[:, 0] - torch.tensor(KEPT_COLOUR)).abs().sum(1).lt(1e-4).sum() == 1
