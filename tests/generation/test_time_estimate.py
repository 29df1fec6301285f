"""Laws of the time that a clip is expected to take."""

import json
import math
import shutil
from pathlib import Path

import pytest

from dit_sparse import SparseAttnProcessor
from dit_sparse.bundled import BUNDLED, BUNDLED_CALL, model_source
from dit_sparse.generation.time_estimate import estimate_time

ROOT = Path(__file__).parents[2]


def estimate(method="radial", model=BUNDLED, density=None, dense_steps=0.0, **call):
    processor = SparseAttnProcessor(method, density=density, dense_steps=dense_steps)
    return estimate_time(model, BUNDLED_CALL | call, processor)


def test_time_grows_with_steps_branches_density_and_tokens():
    one = estimate(density=0.25)
    twice = estimate(density=0.25, num_inference_steps=2 * BUNDLED_CALL["num_inference_steps"])
    assert (twice.dense, twice.sparse) == pytest.approx((2 * one.dense, 2 * one.sparse))
    assert estimate(guidance_scale=1.0).dense == pytest.approx(one.dense / 2)
    assert 0.25 * one.dense < one.sparse < estimate(density=0.5).sparse < one.dense
    assert estimate(density=0.25, dense_steps=0.5).sparse == pytest.approx((one.dense + one.sparse) / 2)
    assert estimate(density=0.25, dense_steps=1.0).sparse == pytest.approx(one.dense)
    wide = estimate(density=0.25, width=2 * BUNDLED_CALL["width"])
    assert wide.tokens == 2 * one.tokens and 2 * one.dense < wide.dense < 4 * one.dense


def test_tokens_are_those_of_the_pipeline():
    result = json.loads((ROOT / "docs/examples/1/result.json").read_text())
    assert estimate().tokens == math.prod(map(int, result["grid"].split("x")))


def test_tokens_of_a_causal_autoencoder(tmp_path):
    """Wan 2.1: 81 frames of 480 x 832 are 21 x 30 x 52 tokens, and 80 frames are rounded to 81."""
    source = Path(model_source(BUNDLED))
    for name in ("model_index.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        shutil.copy(source / name, tmp_path / name)
    config = json.loads((tmp_path / "transformer/config.json").read_text()) | {"patch_size": [1, 2, 2]}
    (tmp_path / "transformer/config.json").write_text(json.dumps(config))
    for frames in (80, 81):
        size = {"num_frames": frames, "height": 480, "width": 832}
        assert estimate(model=str(tmp_path), **size).tokens == 21 * 30 * 52


def test_what_is_not_known_is_not_estimated(tmp_path):
    assert estimate("profile:shapes-wan-i2v", dense_steps=None).sparse is None
    assert estimate(num_frames=None) is None
    assert estimate(model="some/model-on-the-hub") is None
    assert estimate(model=str(tmp_path)) is None
