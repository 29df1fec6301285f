"""The Triton kernels against float64, on a GPU or in the interpreter; and their compiled code for all architectures."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import torch

from attention_cases import (
    HALF_DTYPES,
    TOLERANCE,
    assert_near,
    exact,
    nan_filled_memory,
    qkv,
    random_order,
    random_plan,
    skip_or_fail,
    token_mask,
)
from dit_sparse import Plan
from dit_sparse.eval.bench.compile_report import ATTENTION_KERNELS, MI300, rows_in_subprocess
from dit_sparse.eval.bench.disassembly import count_main_loop
from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import AMD, ARCHITECTURES, architecture
from dit_sparse.kernels.permute import permute_tokens
from dit_sparse.kernels.planning import block_mass
from dit_sparse.order import reorder

pytestmark = pytest.mark.usefixtures("triton_preferred")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.float16 if DEVICE == "cuda" else torch.float32
KERNELS = {
    "block_sparse",
    "block_ragged",
    "block_mass",
    "mass_and_spread",
    "pooling_error",
    "nearest_centroid",
    "cluster_mean",
    "permute_rows",
    "select_top",
}
POINTER_KERNELS = ("nearest_centroid", "mass_and_spread", "pooling_error")  # load keys by pointers on all GPUs
OLDEST_TRITON = "3.6.0"  # allowed by pyproject.toml
MAX_BARRIERS = {90: 5, 100: 11}  # in a step of the main loop, otherwise 2; on sm100 tiles go through shared memory
MAX_SPILLED = 160  # bytes of a thread; with head_dim 256 a thread accumulates 256 values in 255 registers


# Arguments of qkv and random_plan. Blocks of 128 use tensor descriptors in the interpreter and on Hopper.
CASES = {
    "ragged": (dict(tokens=300), dict()),
    "whole blocks": (dict(tokens=256), dict()),
    "fewer tokens than a block": (dict(tokens=37), dict()),
    "one token in the last block": (dict(tokens=257, heads=1), dict(density=1.0)),
    "separate items and heads": (dict(tokens=300, batch=2), dict(batch=2, heads=2)),
    "lengths": (dict(tokens=300, batch=3, heads=1), dict(lengths=[300, 129, 1])),
    "order": (dict(tokens=300), dict(order=random_order(tokens=300))),
    "order for each head, grouped heads": (
        dict(tokens=300, heads=4, key_heads=2),
        dict(heads=4, order=random_order(1, 4, tokens=300)),
    ),
    "grouped heads in a batch": (dict(tokens=300, batch=2, heads=4, key_heads=2), dict(batch=2, heads=4)),
    "order and lengths": (
        dict(tokens=300, batch=2, heads=1),
        dict(order=random_order(tokens=300, fixed=180), lengths=[120, 300]),
    ),
    "head_dim 80": (dict(tokens=150, dim=80), dict()),
    "head_dim 96": (dict(tokens=150, dim=96), dict()),
    "head_dim 128": (dict(tokens=150, dim=128), dict()),
    "head_dim 256": (dict(tokens=150, heads=1, dim=256), dict()),
}


def case(name: str, block: int, dtype: torch.dtype = DTYPE) -> tuple[list[torch.Tensor], Plan]:
    tensors, plan = CASES[name]
    q, k, v = (x.to(DEVICE) for x in qkv(**{"dim": 64} | tensors, dtype=dtype))
    return [q, k, v], random_plan(tensors["tokens"], block, **plan).to(DEVICE)


def check(q, k, v, plan, scale=None) -> None:
    assert block_sparse.why_not(q, k, plan) is None
    with nan_filled_memory():
        out, lse = block_sparse.attend(q, k, v, plan, scale)
    mask = token_mask(plan.to("cpu"), *q.shape[:2])
    expected, log_sum_exp = exact(q.cpu(), k.cpu(), v.cpu(), mask, scale)
    assert_near(out.cpu(), expected, TOLERANCE[q.dtype])
    assert_near(lse.cpu(), log_sum_exp, TOLERANCE[q.dtype])


@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("shape", CASES)
def test_block_sparse_agrees_with_float64(shape, block):
    (q, k, v), plan = case(shape, block)
    check(q, k, v, plan)


@pytest.mark.parametrize(
    "shape, block", [("ragged", 16), ("order and lengths", 16), ("order and lengths", 32), ("head_dim 80", 32)]
)
def test_block_sparse_with_small_blocks(shape, block):
    (q, k, v), plan = case(shape, block)
    check(q[:, :1], k[:, :1], v[:, :1], replace(plan, index=plan.index[:, :1], count=plan.count[:, :1]))


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_in_half_precision(block, dtype):
    (q, k, v), plan = case("ragged", block, dtype)
    check(q, k, v, plan, scale=0.2)


@pytest.mark.parametrize("block", [64, 128])
def test_padding_does_not_affect_block_sparse(block):
    (q, k, v), plan = case("lengths", block)
    clean, _ = block_sparse.attend(q, k, v, plan)
    for item, length in enumerate(plan.lengths.tolist()):
        k[item, :, length:] = v[item, :, length:] = torch.nan
    assert torch.equal(block_sparse.attend(q, k, v, plan)[0], clean)


@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_supports_and_keeps_any_memory_layout(block):
    (q, k, v), plan = case("ragged", block)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, k, v, plan)
    assert block_sparse.attend(q, k, v, plan)[0].stride() == q.stride(), "the layout of diffusers"
    check(*(torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v)), plan)
    shared = k[:, :1].expand(-1, 2, -1, -1)
    check(q, shared, v, plan)


def test_schedule_starts_the_longest_programs_of_each_group_of_heads_first():
    count = random_plan(1000, 64, heads=6).count.expand(2, 6, -1)
    blocks = count.shape[-1]
    for heads_at_once in (1, 4, 100):
        rows = launching.schedule_longest_first(count, heads_at_once)
        assert rows.dtype == torch.int32 and torch.equal(rows.sort().values, torch.arange(count.numel()).int())
        for group in rows.long().split(heads_at_once * blocks):
            assert (group // blocks).unique().numel() == min(heads_at_once, 12)
            lengths = count.flatten()[group]
            assert torch.equal(lengths, lengths.sort(descending=True).values)


def test_block_sparse_schedules_the_longest_programs_first():
    (q, k, v), plan = case("order for each head, grouped heads", 64)
    arguments, *_ = block_sparse.launch_arguments(q, k, v, plan, None, launching.device_architecture(q.device))
    count = plan.count.expand(1, 4, -1)
    assert torch.equal(arguments["schedule"], launching.schedule_longest_first(count, 1))
    assert count.unique().numel() > 1


def test_block_sparse_why_not(monkeypatch):
    (q, k, _), plan = case("ragged", 64)
    why_not = block_sparse.why_not
    assert "the same for all inputs, got torch.float64" in why_not(q.double(), k.double(), plan)
    assert "requires a head_dim of 16, 32, 64, 80, 96, 128, 256, got 40" in why_not(q[..., :40], k[..., :40], plan)
    assert "requires blocks of 16, 32, 64, 128 tokens, got 48" in why_not(q, k, replace(plan, block=48))
    assert "has no backward pass" in why_not(q.clone().requires_grad_(), k, plan)
    monkeypatch.setattr(launching, "device_architecture", lambda _: architecture(75))
    assert "compute capability 8.0 or newer" in why_not(q, k, plan)
    monkeypatch.setattr(launching, "is_interpreted", lambda: False)
    assert why_not(q.cpu(), k.cpu(), plan) == "requires CUDA, got cpu tensors"


def test_compute_capabilities_from_ampere_on_have_launch_settings():
    assert architecture(75) is None
    assert architecture(87) is ARCHITECTURES[86] and architecture(103) is ARCHITECTURES[100]
    for settings in ARCHITECTURES.values():
        for block in block_sparse.BLOCKS:
            for dim in launching.HEAD_DIMS:
                tiling = settings.tiling(block, dim)
                assert block % tiling.keys == 0 and sum(tiling.tile_widths(block, dim)) == dim


@pytest.mark.timeout(900)
@pytest.mark.parametrize(
    "version, capabilities, demanding",
    [(None, (90,), False), (None, (80, 89, 100, 120), True), (OLDEST_TRITON, (90,), True)],
)
def test_compiles_within_limits_for_every_nvidia_architecture(version, capabilities, demanding):
    """All launches for Hopper, whose programs have the most variants; elsewhere those that need the most registers or
    shared memory. A launch takes about a second."""
    pytest.importorskip("triton")
    folder = version and Path(sys.prefix, "packages", f"triton-{version}")
    if folder and not folder.is_dir():
        skip_or_fail(f"requires Triton {version} in .venv/packages: run make .venv/packages/triton-{version}")
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(partial(rows_in_subprocess, triton=folder, demanding=demanding), capabilities)
        for capability, rows in zip(capabilities, compiled, strict=True):
            assert {row["triton"] for row in rows} == {version or version_of("triton")}
            check_compiled(capability, rows)


@pytest.mark.timeout(600)
def test_compiles_within_limits_for_amd(monkeypatch):
    pytest.importorskip("triton")
    rows = rows_in_subprocess(MI300, demanding=True)
    assert {row["kernel"] for row in rows} == KERNELS
    for row in rows:
        assert row["shared_memory"] <= AMD.shared_memory and row["spilled"] <= MAX_SPILLED, row
        assert ("v_mfma" in row["instructions"]) == (row["features"] != "no products"), row
    monkeypatch.setattr(launching, "is_interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launching.device_architecture.__wrapped__(torch.device("cuda")) is AMD


def check_compiled(capability: int, rows: list[dict]) -> None:
    matrix_instruction = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    assert {row["kernel"] for row in rows} == KERNELS
    assert {(row["block"], row["head_dim"]) for row in rows} >= {(64, 64), (64, 256), (128, 80), (128, 128)}
    for row in rows:
        assert row["registers"] * 32 * row["warps"] <= 65_536, f"one program exceeds the registers of an SM: {row}"
        assert row["spilled"] <= MAX_SPILLED and row["shared_memory"] <= ARCHITECTURES[capability].shared_memory, row
        assert not row["serialized"], f"every matrix product waits for the previous one: {row}"
        if row["features"] == "no products":
            continue
        if row["kernel"] in ATTENTION_KERNELS:
            assert row["loop"]["barriers"] <= MAX_BARRIERS.get(capability, 2), f"rows are split over warps: {row}"
            assert row["loop"]["spilled"] == 0 or row["head_dim"] == 256, row
        few_rows = "16 queries" in row["features"] or row["block"] < 64  # too few for wgmma and tcgen05
        if row["head_dim"] <= 128 and not few_rows:
            assert row["buffers"] >= 2, f"loads do not overlap with computation: {row}"
        assert ("mma.sync" if few_rows else matrix_instruction) in row["instructions"], row
        uses_tma = capability in (90, 100) and row["kernel"] not in POINTER_KERNELS and row["block"] >= 64
        assert ("cp.async.bulk.tensor" in row["instructions"]) == uses_tma, row


def test_main_loop_is_the_first_innermost_loop_with_matrix_products():
    code = """
        .L_x_0:
        /*0010*/                   LDG.E R2, desc[UR4][R2.64] ;
        /*0020*/               @P1 BRA `(.L_x_0) ;
        .L_x_1:
        /*0030*/                   MOV R1, R2 ;
        .L_x_2:
        /*0040*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0050*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;
        /*0060*/               @P0 STL [R1], R4 ;
        /*0070*/              @!P2 BRA.U `(.L_x_2) ;
        /*0080*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0090*/               @P3 BRA `(.L_x_1) ;
        /*00a0*/                   EXIT ;
    """
    assert count_main_loop(code) == {"instructions": 4, "products": 1, "barriers": 1, "spilled": 1}
    assert count_main_loop(code.replace("HMMA", "FADD")) == {}


MASS_CASES = [name for name in CASES if name not in ("head_dim 128", "head_dim 96")]
ROWS = [(64, 64), (64, 16), (128, 32), (64, 4)]  # block and queries of a block; two pairs for each case


def lse_and_mass(q, k, plan, rows, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the LSE ``[B, H, N]`` and the block mass ``[B, H, Qb, Qb]``, from the full softmax in float64."""
    batch, heads, tokens, dim = q.shape
    k = k.double().repeat_interleave(heads // k.shape[1], 1)
    end = torch.full((batch,), tokens) if plan.lengths is None else plan.lengths
    position = torch.arange(tokens) if plan.order is None else plan.order.argsort(-1)
    position = position.expand(batch, heads, -1)
    scores = q.double() @ k.mT * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill((position >= end[:, None, None])[:, :, None], -torch.inf)
    is_sampled = (position % (plan.block // rows) == 0) & (position < end[:, None, None])
    key_block = torch.nn.functional.one_hot(position // plan.block, plan.blocks).double()
    query_block = key_block * is_sampled[..., None]
    mass = query_block.mT @ scores.softmax(-1) @ key_block / query_block.sum(-2).clamp(min=1)[..., None]
    return scores.logsumexp(-1).float(), mass


@pytest.mark.parametrize(
    "shape, block, rows", [(shape, *ROWS[(n + k) % 4]) for n, shape in enumerate(MASS_CASES) for k in (0, 2)]
)
def test_block_mass_agrees_with_float64(shape, block, rows):
    (q, k, _), plan = case(shape, block)
    lse, expected = lse_and_mass(q.cpu(), k.cpu(), plan.to("cpu"), rows)
    layout = dict(order=plan.order, lengths=plan.lengths)
    with nan_filled_memory():
        mass = block_mass.block_mass(q, k, lse.to(DEVICE), block, rows=rows, **layout)
        retained = block_mass.retained_mass(q, k, lse.to(DEVICE), plan, rows=rows)
    assert_near(mass.cpu(), expected, TOLERANCE[q.dtype])
    assert_near(retained.cpu(), (expected * plan.to("cpu").block_mask()).sum(-1), TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", HALF_DTYPES, ids=str)
def test_block_mass_in_half_precision(dtype):
    (q, k, _), plan = case("ragged", 64, dtype)
    lse, expected = lse_and_mass(q.cpu(), k.cpu(), plan.to("cpu"), 64)
    assert_near(block_mass.block_mass(q, k, lse.to(DEVICE), 64).cpu(), expected, TOLERANCE[dtype])


def use_pytorch(monkeypatch) -> None:
    """Compute the block mass in PyTorch, in chunks of several query blocks."""
    monkeypatch.setattr(block_mass, "_supports_triton", lambda *_: False)
    monkeypatch.setattr(launching, "chunk_elements", lambda x: 1 << 15)


def test_block_mass_in_pytorch_agrees_with_float64(monkeypatch):
    use_pytorch(monkeypatch)
    for shape in MASS_CASES:
        (q, k, _), plan = case(shape, 64)
        lse, expected = lse_and_mass(q.cpu(), k.cpu(), plan.to("cpu"), 32, scale=0.1)
        layout = dict(order=plan.order, lengths=plan.lengths, rows=32, scale=0.1)
        assert_near(block_mass.block_mass(q, k, lse.to(DEVICE), 64, **layout).cpu(), expected, TOLERANCE[q.dtype])


@pytest.mark.parametrize("rows", [64, 16])
def test_block_mass_and_lse(rows):
    for shape in ("ragged", "one token in the last block", "order for each head, grouped heads"):
        (q, k, _), plan = case(shape, 64)
        lse, expected = lse_and_mass(q.cpu(), k.cpu(), Plan.dense(plan.tokens, 64), rows)
        mass, sampled_lse = block_mass.block_mass_and_lse(q, k, 64, rows=rows)
        is_sampled = torch.arange(plan.tokens) % (64 // rows) == 0
        assert_near(mass.cpu(), expected, TOLERANCE[q.dtype])
        assert_near(sampled_lse.cpu(), lse * is_sampled, TOLERANCE[q.dtype])


def test_block_mass_and_lse_in_pytorch(monkeypatch):
    use_pytorch(monkeypatch)
    for rows in (64, 16, 1):
        test_block_mass_and_lse(rows)


@pytest.mark.parametrize("pytorch", [False, True])
def test_queries_without_keys_have_no_mass(pytorch, monkeypatch):
    if pytorch:
        use_pytorch(monkeypatch)
    (q, k, _), plan = case("ragged", 64)
    lse, _ = lse_and_mass(q.cpu(), k.cpu(), Plan.dense(plan.tokens, 64), 64)
    lse[..., 64:128] = -torch.inf
    mass = block_mass.block_mass(q, k, lse.to(DEVICE), 64)
    assert not mass[..., 1, :].any() and mass.isfinite().all() and (mass[..., 2, :] > 0).all()


@pytest.mark.parametrize("pytorch", [False, True])
def test_block_mass_excludes_padding_and_requires_rows_that_divide_the_block(pytorch, monkeypatch):
    if pytorch:
        use_pytorch(monkeypatch)
    (q, k, _), plan = case("lengths", 64)
    lse, _ = lse_and_mass(q.cpu(), k.cpu(), plan.to("cpu"), 64)
    clean = block_mass.block_mass(q, k, lse.to(DEVICE), 64, lengths=plan.lengths)
    for item, length in enumerate(plan.lengths.tolist()):
        q[item, :, length:] = k[item, :, length:] = torch.nan
    assert torch.equal(block_mass.block_mass(q, k, lse.to(DEVICE), 64, lengths=plan.lengths), clean)
    for rows in (0, 48, 128):
        with pytest.raises(ValueError, match=f"rows must divide the block of 64 tokens, got {rows}"):
            block_mass.block_mass(q, k, lse, 64, rows=rows)


@pytest.mark.parametrize(
    "shape, order",
    [
        (dict(tokens=300), random_order(tokens=300)),
        (dict(tokens=37, batch=2, heads=4, key_heads=2, dim=48), random_order(2, 4, tokens=37)),
        (dict(tokens=130, batch=2, heads=3, key_heads=1, dim=5), random_order(1, 3, tokens=130)),
        (dict(tokens=70, heads=2, dim=96), random_order(1, 1, tokens=70)),
        (dict(tokens=70, heads=2, dim=80, dtype=torch.float16), random_order(1, 2, tokens=70)),
    ],
)
def test_permute_tokens(shape, order):
    _, k, v = (x.to(DEVICE) for x in qkv(**shape))
    with nan_filled_memory():
        copies = permute_tokens(order.to(DEVICE), k, v)
        token_major = permute_tokens(order.to(DEVICE), k.transpose(1, 2).contiguous().transpose(1, 2))
    for copy, x in zip((*copies, *token_major), (k, v, k), strict=True):
        assert torch.equal(copy, reorder(x, order.to(DEVICE)))
    assert permute_tokens(None, k)[0] is k
    differentiable = permute_tokens(order.to(DEVICE), k.requires_grad_())[0]
    assert torch.equal(differentiable, copies[0]) and differentiable.requires_grad
