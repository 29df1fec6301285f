"""dit_sparse.attention: what it takes, what it refuses, what it gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from attention_cases import BlockMeans, assert_near, exact, make, plan_of, qkv, token_mask
from dit_sparse import METHODS, Grid, Method, Plan, attention

GRID = Grid(3, 5, 4, after=7)
Q, K, V = qkv(GRID.tokens, batch=2, heads=4)


@dataclass(frozen=True, kw_only=True)
class Untouchable(Method):
    """Fails when it is asked for a plan: a bad call has to be refused before."""

    def plan(self, q, k, v, site, memory):
        raise AssertionError("work was done before the inputs were checked")


LOOSE = lambda q=Q, k=K, v=V, **more: dict(q=q, k=k, v=v, grid=GRID, method=Untouchable()) | more

ALIKE = lambda change: dict(zip("qkv", map(change, (Q, K, V)), strict=True))

BAD = {
    "three dimensions": (LOOSE(q=Q[0]), r"\[batch, heads, tokens, head_dim\]"),
    "k of another length": (LOOSE(k=K[:, :, 1:]), "k and v must match q"),
    "v of another length": (LOOSE(v=V[:, :, 1:]), "k and v must match q"),
    "another batch": (LOOSE(k=K[:1], v=V[:1]), "k and v must match q"),
    "another head_dim": (LOOSE(k=K[..., :16], v=V[..., :16]), "k and v must match q"),
    "heads that do not divide": (LOOSE(k=K[:, :3], v=V[:, :3]), "must divide that of q"),
    "no key heads": (LOOSE(k=K[:, :0], v=V[:, :0]), "must divide that of q"),
    "no items": (LOOSE(**ALIKE(lambda x: x[:0])), r"must not be empty, got q \[0, 4, 67, 32\]"),
    "no heads": (LOOSE(q=Q[:, :0]), "must not be empty"),
    "no head_dim": (LOOSE(**ALIKE(lambda x: x[..., :0])), "must not be empty"),
    "numpy": (LOOSE(q=Q.numpy()), "q, k and v must be torch tensors, got ndarray"),
    "nothing": (LOOSE(v=None), "q, k and v must be torch tensors, got NoneType"),
    "meta tensors": (LOOSE(**ALIKE(lambda x: x.to("meta"))), "must hold values, got tensors of the device 'meta'"),
    "another grid": (LOOSE(grid=Grid(3, 5, 4)), "3x5x4 has 60 tokens, but q has 67"),
    "a tuple as grid": (
        LOOSE(grid=(3, 5, 4)),
        r"grid must be a dit_sparse.Grid, .*\), got tuple",
    ),
    "a text as grid": (LOOSE(grid="3x5x4"), "grid must be a dit_sparse.Grid, .* got str"),
    "mixed dtypes": (LOOSE(k=K.bfloat16()), "the same floating-point dtype .* torch.bfloat16 on cpu"),
    "integers": (LOOSE(**ALIKE(torch.Tensor.int)), "the same floating-point dtype"),
    "complex numbers": (LOOSE(**ALIKE(torch.Tensor.cfloat)), "the same floating-point dtype"),
    "8-bit numbers": (LOOSE(**ALIKE(lambda x: x.to(torch.float8_e4m3fn))), "the same floating-point dtype"),
    "another device": (LOOSE(k=K.to("meta"), v=V.to("meta")), "the same device"),
    "lengths of another batch": (LOOSE(lengths=torch.tensor([67])), "for each batch item, got torch.int64"),
    "no length": (LOOSE(lengths=torch.tensor([67, 0])), "from 1 to 67"),
    "too long": (LOOSE(lengths=torch.tensor([67, 68])), "from 1 to 67"),
    "lengths as floats": (LOOSE(lengths=torch.tensor([67.0, 60.0])), "a whole number from 1 to 67 .* torch.float32"),
    "lengths as a list": (LOOSE(lengths=[67, 60]), "lengths must be a tensor .* got list"),
    "a padding mask as lengths": (LOOSE(lengths=torch.tensor([True, True])), "lengths must be a tensor .* torch.bool"),
    "gradients": (LOOSE(q=Q.clone().requires_grad_()), "no backward pass"),
    "no block": (LOOSE(block=0), "block must be a whole number of tokens from 1 to 4096, got 0"),
    "negative block": (LOOSE(block=-16), "block"),
    "half a token": (LOOSE(block=1.5), "block must be a whole number of tokens from 1 to 4096, got 1.5"),
    "true block": (LOOSE(block=True), "block must be a whole number of tokens from 1 to 4096, got True"),
    "huge block": (
        LOOSE(block=2**63),
        "block must be a whole number of tokens from 1 to 4096, got 9223372036854775808",
    ),
    "huge scale": (LOOSE(scale=10**400), "scale must be a finite number or None"),
    "executor as list": (LOOSE(method="radial", executor=[1]), "executor must be one of"),
    "block as text": (LOOSE(block="64"), "block must be a whole number of tokens from 1 to 4096, got '64'"),
    "scale of nan": (LOOSE(scale=float("nan")), "scale must be a finite number or None, got nan"),
    "scale as text": (LOOSE(scale="1"), "scale must be a finite number or None, got '1'"),
    "unknown method": (LOOSE(method="radail"), "no method 'radail'"),
    "a number as method": (LOOSE(method=3), "method must be a text or a dit_sparse.Method"),
    "density above one": (LOOSE(method="radial", density=1.5), "density must be in"),
    "density as text": (LOOSE(method="radial", density="x"), "density of radial must be a number or none, got 'x'"),
    "unknown executor": (LOOSE(method="radial", executor="cuda"), "executor must be one of .* got 'cuda'"),
    "no executor": (LOOSE(method="radial", executor=None), "executor must be one of .* got None"),
}


@pytest.mark.parametrize("arguments, words", BAD.values(), ids=BAD)
def test_bad_input_is_refused_in_one_sentence(arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        attention(**arguments)
    assert "\n" not in str(error.value)


def test_padding_that_reaches_into_a_reordered_video_is_refused():
    """A curve would scatter padded video tokens over the blocks, and a tail would no longer be a tail."""
    lengths = torch.tensor([67, 50])
    with pytest.raises(ValueError, match="padding"):
        attention(Q, K, V, grid=GRID, method="window", density=0.5, lengths=lengths)
    for method, most in {"window": 60, "radial": 50}.items():
        out, _ = attention(Q, K, V, grid=GRID, method=method, density=1.0, lengths=torch.tensor([67, most]))
        assert_near(out[1], F.scaled_dot_product_attention(Q[1], K[1, :, :most], V[1, :, :most]), 1e-5)


@pytest.mark.parametrize("method", ["dense", "window", "radial", "random_blocks"])
@pytest.mark.parametrize("executor", ["auto", "reference", "gather"])
def test_result_is_attention_over_the_plan(method, executor):
    out, lse = attention(Q, K, V, grid=GRID, method=method, density=0.4, block=16, executor=executor)
    plan = plan_of(make(method, density=0.4), GRID, 16, Q, K)
    expected, log_sum_exp = exact(Q, K, V, token_mask(plan, 2, 4))
    assert_near(out, expected, 1e-5)
    assert_near(lse, log_sum_exp, 1e-5)


@pytest.mark.parametrize(
    "dtype, tolerance",
    [(torch.float64, 1e-5), (torch.float32, 1e-5), (torch.bfloat16, 1e-2), (torch.float16, 2e-3)],
    ids=str,
)
def test_float_dtypes_stay(dtype, tolerance):
    q, k, v = (x.to(dtype) for x in (Q, K, V))
    out, lse = attention(q, k, v, grid=GRID, density=1.0, block=16)
    assert (out.dtype, lse.dtype) == (dtype, torch.float32)
    assert_near(out, F.scaled_dot_product_attention(q.double(), k.double(), v.double()), tolerance)


@pytest.mark.parametrize("key_heads", [1, 2, 4])
@pytest.mark.parametrize("method", ["window", "radial", "random_blocks", BlockMeans(density=0.5)], ids=str)
def test_grouped_heads_equal_repeated_ones(key_heads, method):
    k, v = K[:, :key_heads], V[:, :key_heads]
    grouped = attention(Q, k, v, grid=GRID, method=method, density=0.5, block=16, executor="gather")
    repeated = (x.repeat_interleave(4 // key_heads, 1) for x in (k, v))
    whole = attention(Q, *repeated, grid=GRID, method=method, density=0.5, block=16, executor="gather")
    for mine, plain in zip(grouped, whole, strict=True):
        assert_near(mine, plain, 1e-6)


@pytest.mark.parametrize("method", ["dense", "window", "radial"])
def test_padded_items_equal_shorter_ones(method):
    """Item 1 ends 4 text tokens early: its real part is what the shorter sequence alone gives."""
    lengths, short = torch.tensor([67, 63]), Grid(3, 5, 4, after=3)
    out, lse = attention(Q, K, V, grid=GRID, method=method, density=1.0, block=16, lengths=lengths)
    cut = (x[1:, :, :63] for x in (Q, K, V))
    alone, alone_lse = attention(*cut, grid=short, method=method, density=1.0, block=16)
    assert_near(out[1:, :, :63], alone, 1e-5)
    assert_near(lse[1:, :, :63], alone_lse, 1e-5)
    assert_near(out[:1], F.scaled_dot_product_attention(Q[:1], K[:1], V[:1]), 1e-5)


@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("method", [name for name in METHODS if name != "dense"])
def test_padding_may_hold_anything(method, value):
    lengths = torch.tensor([67, 63])
    padding = (torch.arange(67) >= lengths[:, None])[:, None, :, None]
    results = [
        attention(*tensors, grid=GRID, method=method, density=0.5, block=16, lengths=lengths)
        for tensors in ([x.masked_fill(padding, filling) for x in (Q, K, V)] for filling in (0.0, value))
    ]
    real = ~padding[..., 0].expand(2, 4, -1)
    for clean, other in zip(*results, strict=True):
        assert other[real].equal(clean[real]) and clean[real].isfinite().all()


@pytest.mark.parametrize("method", METHODS)
def test_padded_text_leaves_no_row_empty(method):
    """Text that is all padding: rows of the video attend to the video, rows of the text to the whole video."""
    grid, lengths = Grid(3, 5, 4, after=90), torch.tensor([60, 61])
    q, k, v = qkv(grid.tokens, batch=2)
    out, lse = attention(q, k, v, grid=grid, method=method, density=0.1, block=16, lengths=lengths)
    assert lse.isfinite().all() and (out != 0).any(-1).all()
    full, full_lse = attention(q, k, v, grid=grid, method="dense", block=16, lengths=lengths)
    assert_near(out[:, :, 60:], full[:, :, 60:], 1e-5)
    assert_near(lse[:, :, 60:], full_lse[:, :, 60:], 1e-5)


@pytest.mark.parametrize("scale", [0.5, 0.05, 0.0, -0.3, 1])
def test_scale_is_passed_on(scale):
    out, _ = attention(Q, K, V, grid=GRID, density=1.0, scale=scale)
    assert_near(out, F.scaled_dot_product_attention(Q, K, V, scale=scale), 1e-5)


def test_gradients_may_be_wanted_elsewhere():
    with torch.no_grad():
        out, _ = attention(Q.clone().requires_grad_(), K, V, grid=GRID)
    assert not out.requires_grad


@dataclass(frozen=True, kw_only=True)
class Remembering(Method):
    """Notes something while it plans and uses it in the correction."""

    def plan(self, q, k, v, site, memory):
        memory["heads"] = q.shape[1]
        return Plan.dense(site.grid.tokens, site.block)

    def correct(self, done, site, memory):
        return done.out * memory["heads"], done.lse


def test_correction_remembers_the_plan_and_has_the_last_word():
    out, _ = attention(Q, K, V, grid=GRID, method=Remembering())
    assert_near(out, 4 * F.scaled_dot_product_attention(Q, K, V), 1e-5)


def test_method_decides_its_own_density():
    what = BlockMeans(density=1.0)
    out, _ = attention(Q, K, V, grid=GRID, method=what, density=0.1)
    assert_near(out, F.scaled_dot_product_attention(Q, K, V), 1e-5)


def test_block_of_another_integer_type_leaves_later_calls_alone():
    """Plans are cached by block, and numpy's 16 equals 16."""
    grid = Grid(2, 3, 5)
    q, k, v = qkv(grid.tokens)
    first, _ = attention(q, k, v, grid=grid, method="radial", density=0.5, block=np.int64(16), executor="gather")
    assert attention(q, k, v, grid=grid, method="radial", density=0.5, block=16, executor="gather")[0].equal(first)
