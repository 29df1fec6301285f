"""The Triton kernels: in the interpreter where there is no GPU, else on it; and compiled for GPUs that are not here."""

from __future__ import annotations

import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from importlib.metadata import version as version_of
from pathlib import Path

import pytest
import torch

from attention_cases import HALF, TOLERANCE, assert_near, exact, lacking, poisoned, qkv, random_plan, token_mask
from dit_sparse import Plan
from dit_sparse.eval.bench.compile_report import ATTENTION_KERNELS, MI300, rows_in_subprocess
from dit_sparse.eval.bench.disassembly import count_main_loop
from dit_sparse.kernels.executors import block_sparse
from dit_sparse.kernels.gpu import launching
from dit_sparse.kernels.gpu.architectures import AMD, ARCHITECTURES, architecture
from dit_sparse.kernels.permute import permuted
from dit_sparse.kernels.planning import block_mass
from dit_sparse.plan import reorder

pytestmark = pytest.mark.usefixtures("triton_preferred")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
EXACT = torch.float16 if DEVICE == "cuda" else torch.float32
KERNELS = {"block_sparse", "block_ragged", "block_mass", "assign", "means", "permute", "select"}
OLDEST = "3.6.0"  # Triton that pyproject.toml allows
BARRIERS = {90: 5, 100: 11}  # in a step of the main loop; elsewhere 2. Blackwell's tiles go through shared memory
SPILLED = 160  # bytes a thread may spill; a kernel of head_dim 256 holds 256 sums in 255 registers


def shuffled(*lead: int, tokens: int, fixed: int = 0) -> torch.Tensor:
    """A random order whose last ``fixed`` places, where padding may lie, stay."""
    free = torch.rand(*lead, tokens - fixed, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return torch.cat([free, torch.arange(tokens - fixed, tokens).expand(*lead, fixed)], -1)


# shape of q, k, v; shape of the plan; blocks of 128 go through tensor descriptors in the interpreter and on Hopper
CASES = {
    "ragged": (dict(tokens=300), dict()),
    "whole blocks": (dict(tokens=256), dict()),
    "fewer tokens than a block": (dict(tokens=37), dict()),
    "one token in the last block": (dict(tokens=257, heads=1), dict(density=1.0)),
    "items and heads apart": (dict(tokens=300, batch=2), dict(batch=2, heads=2)),
    "lengths": (dict(tokens=300, batch=3, heads=1), dict(lengths=[300, 129, 1])),
    "order": (dict(tokens=300), dict(order=shuffled(tokens=300))),
    "order for each head, grouped heads": (
        dict(tokens=300, heads=4, key_heads=2),
        dict(heads=4, order=shuffled(1, 4, tokens=300)),
    ),
    "grouped heads in a batch": (dict(tokens=300, batch=2, heads=4, key_heads=2), dict(batch=2, heads=4)),
    "order and lengths": (
        dict(tokens=300, batch=2, heads=1),
        dict(order=shuffled(tokens=300, fixed=180), lengths=[120, 300]),
    ),
    "head_dim 80": (dict(tokens=150, dim=80), dict()),
    "head_dim 96": (dict(tokens=150, dim=96), dict()),
    "head_dim 128": (dict(tokens=150, dim=128), dict()),
    "head_dim 256": (dict(tokens=150, heads=1, dim=256), dict()),
}


def case(name: str, block: int, dtype: torch.dtype = EXACT) -> tuple[list[torch.Tensor], Plan]:
    tensors, plan = CASES[name]
    q, k, v = (x.to(DEVICE) for x in qkv(**{"dim": 64} | tensors, dtype=dtype))
    return [q, k, v], random_plan(tensors["tokens"], block, **plan).to(DEVICE)


def check(q, k, v, plan, scale=None) -> None:
    assert block_sparse.why_not(q, k, plan) is None
    with poisoned():
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


@pytest.mark.parametrize("block", [16, 32])
@pytest.mark.parametrize("shape", ["ragged", "order and lengths", "head_dim 80"])
def test_block_sparse_on_small_blocks(shape, block):
    (q, k, v), plan = case(shape, block)
    check(q[:, :1], k[:, :1], v[:, :1], replace(plan, index=plan.index[:, :1], count=plan.count[:, :1]))


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_in_half_precision(block, dtype):
    (q, k, v), plan = case("ragged", block, dtype)
    check(q, k, v, plan, scale=0.2)


@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_never_reads_padding_into_the_result(block):
    (q, k, v), plan = case("lengths", block)
    clean, _ = block_sparse.attend(q, k, v, plan)
    for item, length in enumerate(plan.lengths.tolist()):
        k[item, :, length:] = v[item, :, length:] = torch.nan
    assert torch.equal(block_sparse.attend(q, k, v, plan)[0], clean)


@pytest.mark.parametrize("block", [64, 128])
def test_block_sparse_reads_and_keeps_any_memory_layout(block):
    (q, k, v), plan = case("ragged", block)
    q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
    check(q, k, v, plan)
    assert block_sparse.attend(q, k, v, plan)[0].stride() == q.stride(), "as diffusers lays it out"
    check(*(torch.stack([x, x + 1], -1)[..., 0] for x in (q, k, v)), plan)
    shared = k[:, :1].expand(-1, 2, -1, -1)
    check(q, shared, v, plan)


def test_long_rows_start_first_among_heads_that_share_the_cache():
    count = random_plan(1000, 64, heads=6).count.expand(2, 6, -1)
    blocks = count.shape[-1]
    for company in (1, 4, 100):
        rows = launching.longest_first(count, company)
        assert rows.dtype == torch.int32 and torch.equal(rows.sort().values, torch.arange(count.numel()).int())
        for group in rows.long().split(company * blocks):
            assert (group // blocks).unique().numel() == min(company, 12)
            lengths = count.flatten()[group]
            assert torch.equal(lengths, lengths.sort(descending=True).values)


def test_the_longest_rows_of_a_launch_start_first():
    (q, k, v), plan = case("order for each head, grouped heads", 64)
    arguments, *_ = block_sparse.launch(q, k, v, plan, None, launching.machine(q.device))
    count = plan.count.expand(1, 4, -1)
    assert torch.equal(arguments["schedule"], launching.longest_first(count, 1)) and count.unique().numel() > 1


def test_block_sparse_says_what_it_lacks(monkeypatch):
    (q, k, _), plan = case("ragged", 64)
    why_not = block_sparse.why_not
    assert "it computes in" in why_not(q.double(), k.double(), plan)
    assert "head_dim must be one of 16, 32, 64, 80, 96, 128, 256, not 40" in why_not(q[..., :40], k[..., :40], plan)
    assert "a block must have 16, 32, 64, 128 tokens, not 48" in why_not(q, k, replace(plan, block=48))
    assert "no backward pass" in why_not(q.clone().requires_grad_(), k, plan)
    monkeypatch.setattr(launching, "machine", lambda _: architecture(75))
    assert "compute capability 8.0 or newer" in why_not(q, k, plan)
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    assert "it runs on a GPU and the tensors are on cpu" in why_not(q.cpu(), k.cpu(), plan)


def test_every_capability_from_ampere_on_has_an_architecture():
    assert architecture(75) is None
    assert architecture(87) is ARCHITECTURES[86] and architecture(103) is ARCHITECTURES[100]
    for found in ARCHITECTURES.values():
        for block in block_sparse.BLOCKS:
            for dim in launching.DIMS:
                tiling = found.tiling(block, dim)
                assert block % tiling.keys == 0 and sum(tiling.columns(block, dim)) == dim


@pytest.mark.timeout(900)
@pytest.mark.parametrize("version, capabilities", [(None, (80, 89, 90, 100, 120)), (OLDEST, (80, 90))])
def test_compiles_for_every_architecture_and_fits(version, capabilities):
    """One test a version, so that one worker compiles, two architectures at a time."""
    pytest.importorskip("triton")
    folder = version and Path(sys.prefix, "beside", f"triton-{version}")
    if folder and not folder.is_dir():
        lacking(f"Triton {version} is not beside the environment: make .venv/beside/triton-{version}")
    with ThreadPoolExecutor(2) as pool:
        compiled = pool.map(partial(rows_in_subprocess, triton=folder), capabilities)
        for capability, found in zip(capabilities, compiled, strict=True):
            assert {row["triton"] for row in found} == {version or version_of("triton")}
            check_compiled(capability, found)


@pytest.mark.timeout(600)
def test_compiles_for_amd_and_fits(monkeypatch):
    pytest.importorskip("triton")
    found = rows_in_subprocess(MI300)
    assert {row["kernel"] for row in found} == KERNELS
    for row in found:
        assert row["shared_memory"] <= AMD.shared_memory and row["spilled"] == 0, row
        assert ("v_mfma" in row["instructions"]) == (row["features"] != "no products"), row
    monkeypatch.setattr(launching, "interpreted", lambda: False)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    assert launching.machine.__wrapped__(torch.device("cuda")) is AMD


def check_compiled(capability: int, found: list[dict]) -> None:
    matrix = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(capability, "mma.sync")
    assert {row["kernel"] for row in found} == KERNELS
    assert {(row["block"], row["head_dim"]) for row in found} >= {(64, 64), (64, 256), (128, 80), (128, 128)}
    for row in found:
        assert row["registers"] * 32 * row["warps"] <= 65_536, f"a processor has no room for one program: {row}"
        assert row["spilled"] <= SPILLED and row["shared_memory"] <= ARCHITECTURES[capability].shared_memory, row
        assert not row["serialized"], f"every product waits for the one before it: {row}"
        if row["features"] == "no products":
            continue
        if row["kernel"] in ATTENTION_KERNELS:
            assert row["loop"]["barriers"] <= BARRIERS.get(capability, 2), f"warps share the rows of a product: {row}"
            assert row["loop"]["spilled"] == 0 or row["head_dim"] == 256, row
        few_rows = "16 queries" in row["features"] or row["block"] < 64  # too few for the larger units
        if row["head_dim"] <= 128 and not few_rows:
            assert row["buffers"] >= 2, f"nothing is fetched while it computes: {row}"
        assert ("mma.sync" if few_rows else matrix) in row["instructions"], row
        by_descriptor = capability in (90, 100) and row["kernel"] != "assign" and row["block"] >= 64
        assert ("cp.async.bulk.tensor" in row["instructions"]) == by_descriptor, row


def test_the_main_loop_is_the_first_innermost_one_that_multiplies():
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


def paid(q, k, plan, rows, scale=None) -> tuple[torch.Tensor, torch.Tensor]:
    """LSE ``[B, H, N]`` and what the queries of each block pay to each key block, from the whole softmax in float64."""
    batch, heads, tokens, dim = q.shape
    k = k.double().repeat_interleave(heads // k.shape[1], 1)
    end = torch.full((batch,), tokens) if plan.lengths is None else plan.lengths
    place = torch.arange(tokens).expand(batch, heads, -1) if plan.order is None else plan.order.argsort(-1)
    place = place.expand(batch, heads, -1)
    scores = q.double() @ k.mT * (dim**-0.5 if scale is None else scale)
    scores = scores.masked_fill((place >= end[:, None, None])[:, :, None], -torch.inf)
    looks = (place % (plan.block // rows) == 0) & (place < end[:, None, None])
    group = torch.nn.functional.one_hot(place // plan.block, plan.blocks).double()
    looked = group * looks[..., None]
    mass = looked.mT @ scores.softmax(-1) @ group / looked.sum(-2).clamp(min=1)[..., None]
    return scores.logsumexp(-1).float(), mass


@pytest.mark.parametrize("block, rows", [(64, 64), (64, 16), (128, 32), (64, 4)])
@pytest.mark.parametrize("shape", MASS_CASES)
def test_block_mass_agrees_with_float64(shape, block, rows):
    (q, k, _), plan = case(shape, block)
    lse, expected = paid(q.cpu(), k.cpu(), plan.to("cpu"), rows)
    layout = dict(order=plan.order, lengths=plan.lengths)
    with poisoned():
        mass = block_mass.block_mass(q, k, lse.to(DEVICE), block, rows=rows, **layout)
        retained = block_mass.retained_mass(q, k, lse.to(DEVICE), plan, rows=rows)
    assert_near(mass.cpu(), expected, TOLERANCE[q.dtype])
    assert_near(retained.cpu(), (expected * plan.to("cpu").block_mask()).sum(-1), TOLERANCE[q.dtype])


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_block_mass_in_half_precision(dtype):
    (q, k, _), plan = case("ragged", 64, dtype)
    lse, expected = paid(q.cpu(), k.cpu(), plan.to("cpu"), 64)
    assert_near(block_mass.block_mass(q, k, lse.to(DEVICE), 64).cpu(), expected, TOLERANCE[dtype])


def in_plain_pytorch(monkeypatch) -> None:
    """And some query blocks at a time."""
    monkeypatch.setattr(block_mass, "_by_triton", lambda *_: False)
    monkeypatch.setattr(launching, "scores_at_once", lambda x: 1 << 15)


def test_block_mass_in_plain_pytorch_is_the_same(monkeypatch):
    in_plain_pytorch(monkeypatch)
    for shape in MASS_CASES:
        (q, k, _), plan = case(shape, 64)
        lse, expected = paid(q.cpu(), k.cpu(), plan.to("cpu"), 32, scale=0.1)
        layout = dict(order=plan.order, lengths=plan.lengths, rows=32, scale=0.1)
        assert_near(block_mass.block_mass(q, k, lse.to(DEVICE), 64, **layout).cpu(), expected, TOLERANCE[q.dtype])


@pytest.mark.parametrize("rows", [64, 16])
def test_the_first_block_mass_finds_its_log_sum_exp(rows):
    for shape in ("ragged", "one token in the last block", "order for each head, grouped heads"):
        (q, k, _), plan = case(shape, 64)
        lse, expected = paid(q.cpu(), k.cpu(), Plan.dense(plan.tokens, 64), rows)
        mass, found = block_mass.first_block_mass(q, k, 64, rows=rows)
        looks = torch.arange(plan.tokens) % (64 // rows) == 0
        assert_near(mass.cpu(), expected, TOLERANCE[q.dtype])
        assert_near(found.cpu(), lse * looks, TOLERANCE[q.dtype])


def test_the_first_block_mass_in_plain_pytorch_is_the_same(monkeypatch):
    in_plain_pytorch(monkeypatch)
    for rows in (64, 16, 1):
        test_the_first_block_mass_finds_its_log_sum_exp(rows)


@pytest.mark.parametrize("plain", [False, True])
def test_queries_that_see_nothing_pay_nothing(plain, monkeypatch):
    if plain:
        in_plain_pytorch(monkeypatch)
    (q, k, _), plan = case("ragged", 64)
    lse, _ = paid(q.cpu(), k.cpu(), Plan.dense(plan.tokens, 64), 64)
    lse[..., 64:128] = -torch.inf
    mass = block_mass.block_mass(q, k, lse.to(DEVICE), 64)
    assert not mass[..., 1, :].any() and mass.isfinite().all() and (mass[..., 2, :] > 0).all()


@pytest.mark.parametrize("plain", [False, True])
def test_block_mass_hides_padding_and_needs_rows_that_divide_the_block(plain, monkeypatch):
    if plain:
        in_plain_pytorch(monkeypatch)
    (q, k, _), plan = case("lengths", 64)
    lse, _ = paid(q.cpu(), k.cpu(), plan.to("cpu"), 64)
    clean = block_mass.block_mass(q, k, lse.to(DEVICE), 64, lengths=plan.lengths)
    for item, length in enumerate(plan.lengths.tolist()):
        q[item, :, length:] = k[item, :, length:] = torch.nan
    assert torch.equal(block_mass.block_mass(q, k, lse.to(DEVICE), 64, lengths=plan.lengths), clean)
    for rows in (0, 48, 128):
        with pytest.raises(ValueError, match="rows must divide the block of 64 tokens"):
            block_mass.block_mass(q, k, lse, 64, rows=rows)


@pytest.mark.parametrize(
    "shape, order",
    [
        (dict(tokens=300), shuffled(tokens=300)),
        (dict(tokens=37, batch=2, heads=4, key_heads=2, dim=48), shuffled(2, 4, tokens=37)),
        (dict(tokens=130, batch=2, heads=3, key_heads=1, dim=5), shuffled(1, 3, tokens=130)),
        (dict(tokens=70, heads=2, dim=96), shuffled(1, 1, tokens=70)),
        (dict(tokens=70, heads=2, dim=80, dtype=torch.float16), shuffled(1, 2, tokens=70)),
    ],
)
def test_permute_moves_whole_rows(shape, order):
    _, k, v = (x.to(DEVICE) for x in qkv(**shape))
    with poisoned():
        moved = permuted(order.to(DEVICE), k, v)
        laid = permuted(order.to(DEVICE), k.transpose(1, 2).contiguous().transpose(1, 2))
    for copy, x in zip((*moved, *laid), (k, v, k), strict=True):
        assert torch.equal(copy, reorder(x, order.to(DEVICE)))
    assert permuted(None, k)[0] is k
    asked = permuted(order.to(DEVICE), k.requires_grad_())[0]
    assert torch.equal(asked, moved[0]) and asked.requires_grad
