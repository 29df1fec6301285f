"""Executors that call other packages: xFormers' own kernel, interpreted; for the others stand-ins that do naively what
the packages document, so that what is handed over, and what comes back, is checked against float64."""

from __future__ import annotations

import importlib
import sys
from contextlib import nullcontext
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from attention_cases import (
    TOLERANCE,
    assert_near,
    cluster_token_mask,
    exact,
    lacking,
    qkv,
    random_cluster_plan,
    random_plan,
    token_mask,
)
from dit_sparse.kernels.executors import EXECUTORS, executor, flash4, flashinfer_sparse, paged, pages, xformers_paged
from dit_sparse.kernels.gpu import launching


def shuffled(*lead: int, tokens: int, fixed: int = 0) -> torch.Tensor:
    """An order whose last ``fixed`` tokens stay, where padding lies."""
    places = torch.rand(*lead, tokens - fixed, generator=torch.Generator().manual_seed(3)).argsort(-1)
    return torch.cat([places, torch.arange(tokens - fixed, tokens).expand(*lead, -1)], -1)


PLANS = {
    "one list for all": (dict(tokens=96), dict()),
    "ragged end": (dict(tokens=75), dict(heads=2)),
    "batch, a list a head": (dict(tokens=75, batch=2), dict(batch=2, heads=2)),
    "an order a head": (dict(tokens=75, batch=2), dict(heads=2, order=shuffled(1, 2, tokens=75))),
    "grouped heads": (dict(tokens=75, heads=4, key_heads=2), dict(heads=4)),
    "padding": (dict(tokens=75, batch=2), dict(heads=2, lengths=[75, 35], order=shuffled(tokens=75, fixed=40))),
}
every_plan = pytest.mark.parametrize("name", PLANS)
unpadded = pytest.mark.parametrize("name", [name for name in PLANS if name != "padding"])


def case(name: str):
    inputs, plan = PLANS[name]
    return qkv(**inputs), random_plan(inputs["tokens"], 16, **plan)


def assert_exact(module: ModuleType, tensors, plan, mask=token_mask) -> None:
    q, k, v = tensors
    for scale in (None, 0.3):
        out, lse = module.attend(q, k, v, plan, scale)
        expected, log_sum_exp = exact(q, k, v, mask(plan, *q.shape[:2]), scale)
        assert out.shape == q.shape and lse.shape == q.shape[:3]
        assert_near(out, expected, 2e-6)
        assert_near(lse, log_sum_exp, 2e-6)


def attention_of_one_head(q, k, v, scale):
    """``[M, D] x [L, D]``: out and the natural log-sum-exp."""
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


# --- pages


@every_plan
def test_a_sequence_of_pages_holds_the_keys_of_its_row(name):
    """Without any kernel: walking the tables gives the plan's token pairs back, and only those."""
    (q, k, _), plan = case(name)
    batch, heads, tokens, _ = q.shape
    number = torch.arange(1, tokens + 1, dtype=torch.float32)[:, None].expand(batch, k.shape[1], -1, 1)
    call = pages.paged(number.repeat_interleave(heads // k.shape[1], 1), number, number, plan)
    assert call.table.dtype == call.used.dtype == call.starts.dtype == torch.int32
    mask = torch.zeros(batch * heads, tokens, tokens, dtype=torch.bool)
    for sequence, (table, used) in enumerate(zip(call.table.tolist(), call.used.tolist(), strict=True)):
        queries = call.queries[call.starts[sequence] : call.starts[sequence + 1], 0, 0].long() - 1
        keys = call.keys[table].flatten()[:used].long() - 1
        head = sequence // plan.blocks
        assert not mask[head, queries[:, None], keys].any()
        mask[head, queries[:, None], keys] = True
    assert torch.equal(mask.view(batch, heads, tokens, tokens), token_mask(plan, batch, heads))


def naive_pages(q, k, v, starts, used, table, scale):
    """Paged attention sequence by sequence. One without keys gives what no one should use, as real kernels do."""
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:1], torch.inf)
    for row, length, begin, end in zip(table, used.tolist(), starts[:-1], starts[1:], strict=True):
        keys, values = (x[row].flatten(0, 1)[:length, 0] for x in (k, v))
        if length:
            out[begin:end, 0], lse[begin:end] = attention_of_one_head(q[begin:end, 0], keys, values, scale)
    return out, lse


@every_plan
def test_paged_by_torch(name, monkeypatch):
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, seqused_k, block_table):
        assert cu_seq_k is None and return_aux.lse and k.shape[1] == 16 and q.ndim == 3
        assert max_q == cu_seq_q.diff().max() and max_k >= seqused_k.max()
        return naive_pages(q, k, v, cu_seq_q, seqused_k, block_table, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert_exact(paged, *case(name))


@every_plan
def test_paged_by_xformers(name, monkeypatch):
    def bias(q_seqlen, kv_seqlen, block_tables, page_size, device):
        assert isinstance(q_seqlen, list) and isinstance(kv_seqlen, list) and page_size == 16
        assert block_tables.device == device
        starts = F.pad(torch.tensor(q_seqlen).cumsum(0), (1, 0))
        return SimpleNamespace(starts=starts, used=torch.tensor(kv_seqlen), table=block_tables)

    def forward(q, k, v, attn_bias, scale, op):
        assert q.shape[0] == k.shape[0] == 1 and op == "triton"
        k, v = (x[0].unflatten(0, (-1, 16)) for x in (k, v))
        out, lse = naive_pages(q[0], k, v, attn_bias.starts, attn_bias.used, attn_bias.table, scale)
        return out[None], lse[None, None]

    missing = SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: False))
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(PagedBlockDiagonalPaddedKeysMask=SimpleNamespace(from_seqlens=bias)),
        memory_efficient_attention_forward_requires_grad=forward,
        flash=missing, flash3=missing, triton_splitk=SimpleNamespace(FwOp="triton"),
    )  # fmt: skip
    stand_in(monkeypatch, "xformers.ops", fmha=fmha)
    assert_exact(xformers_paged, *case(name))


@pytest.fixture(scope="module")
def xformers_kernel():
    """xFormers itself, from the folder where `make test` puts the package: its Triton kernel, interpreted on the CPU.
    What else its import brings stays: parts of torch can be imported only once."""
    folder = Path(sys.prefix, "beside", "xformers-0.0.35")
    if not folder.is_dir():
        lacking("xFormers is not beside the environment: make .venv/beside/xformers-0.0.35")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("xformers.ops").fmha.triton_splitk.FwOp
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


FOR_XFORMERS = {
    "lists and orders a head, grouped heads": (
        dict(tokens=150, heads=4, key_heads=2),
        dict(heads=4, order=shuffled(1, 4, tokens=150)),
    ),
    "padding in a batch": (
        dict(tokens=150, batch=2, heads=1),
        dict(lengths=[150, 70], order=shuffled(tokens=150, fixed=80)),
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="interprets a kernel, which Triton decides when it is imported")
@pytest.mark.parametrize("name", FOR_XFORMERS)
def test_the_kernel_of_xformers_agrees_with_float64(name, xformers_kernel, monkeypatch):
    monkeypatch.setattr(xformers_kernel, "SUPPORTED_DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    inputs, given = FOR_XFORMERS[name]
    q, k, v = qkv(**inputs, dim=64, dtype=torch.float16)
    plan = random_plan(inputs["tokens"], 64, **given)
    out, lse = xformers_paged.attend(q, k, v, plan, 0.2)
    expected, log_sum_exp = exact(q, k, v, token_mask(plan, *q.shape[:2]), 0.2)
    assert_near(out, expected, TOLERANCE[torch.float16])
    assert_near(lse, log_sum_exp, TOLERANCE[torch.float16])


# --- lists


@unpadded
def test_flash_attention_4(name, monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale, block_sparse_tensors, return_lse):
        assert return_lse and not block_sparse_tensors.mask_block_cnt.any()
        (rows, columns), count = block_sparse_tensors.block_size, block_sparse_tensors.full_block_cnt
        index = block_sparse_tensors.full_block_idx
        assert index.dtype == count.dtype == torch.int32 and index.is_contiguous() and count.is_contiguous()
        out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
        groups = q.shape[2] // k.shape[2]
        for b, h, i in torch.cartesian_prod(*map(torch.arange, (q.shape[0], q.shape[2], count.shape[-1]))).tolist():
            lists = min(b, index.shape[0] - 1), min(h, index.shape[1] - 1), i
            kept = index[lists][: count[lists]].tolist()
            keys, values = (
                torch.cat([x[b, j * columns : (j + 1) * columns, h // groups] for j in kept]) for x in (k, v)
            )
            here = slice(i * rows, (i + 1) * rows)
            out[b, here, h], lse[b, h, here] = attention_of_one_head(q[b, here, h], keys, values, softmax_scale)
        return out, lse

    stand_in(monkeypatch, "flash_attn.cute.interface", flash_attn_func=flash_attn_func)
    stand_in(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=SimpleNamespace)
    assert_exact(flash4, *case(name))


class Wrapper:
    """What FlashInfer's wrappers share here: they plan, then run, and give the log-sum-exp to base 2."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def attend(self, q, k, v, queries, keys):
        out, lse = attention_of_one_head(q[queries], k[keys], v[keys], self.scale)
        return out, lse / torch.tensor(2.0).log()


class Fixed(Wrapper):
    def plan(self, indptr, indices, m, n, rows, columns, query_heads, key_heads, dim, sm_scale, **dtypes):
        assert (
            indptr.dtype == indices.dtype == torch.int32
            and m % rows == n % columns == 0
            and len(indptr) == m // rows + 1
        )
        assert query_heads == key_heads == 1 and dtypes["q_data_type"] == dtypes["o_data_type"]
        self.rows, self.columns, self.scale = rows, columns, sm_scale
        self.lists = [x.long() for x in indices.split(indptr.diff().tolist())]

    def run(self, q, k, v, return_lse):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        for i, kept in enumerate(self.lists):
            here = slice(i * self.rows, (i + 1) * self.rows)
            keys = (kept[:, None] * self.columns + torch.arange(self.columns)).flatten()
            out[here, 0], lse[here, 0] = self.attend(q[:, 0], k[:, 0], v[:, 0], here, keys)
        return out, lse


class Variable(Wrapper):
    def plan(self, keep, rows, columns, query_heads, key_heads, dim, sm_scale, q_data_type):
        assert keep.shape == (key_heads, rows.shape[1], columns.shape[1]) and query_heads == key_heads
        self.keep, self.rows, self.columns, self.scale = keep, rows, columns, sm_scale

    def run(self, q, k, v, return_lse):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        for head, keep in enumerate(self.keep):
            columns = torch.arange(k.shape[1]).split(self.columns[head].tolist())
            for here, kept in zip(torch.arange(q.shape[1]).split(self.rows[head].tolist()), keep, strict=True):
                keys = torch.cat([columns[j] for j in kept.nonzero().flatten().tolist()])
                out[head, here], lse[head, here] = self.attend(q[head], k[head], v[head], here, keys)
        return out, lse


@pytest.fixture
def flashinfer_stand_in(monkeypatch):
    wrappers = dict(BlockSparseAttentionWrapper=Fixed, VariableBlockSparseAttentionWrapper=Variable)
    stand_in(monkeypatch, "flashinfer", **wrappers)


@unpadded
def test_flashinfer_on_blocks(name, flashinfer_stand_in):
    assert_exact(flashinfer_sparse, *case(name))


def test_flashinfer_on_clusters(flashinfer_stand_in):
    plan = random_cluster_plan(75, batch=2, heads=2)
    assert_exact(flashinfer_sparse, qkv(75, batch=2), plan, cluster_token_mask)


def stand_in(monkeypatch, name: str, **content) -> None:
    """Put a module into ``sys.modules``, its parents too."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        if part not in sys.modules or depth == len(parts):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


# --- why not


def test_they_say_what_they_lack():
    q, _, _ = qkv(75)
    plan = random_plan(75, 16)
    assert "runs on a GPU and the tensors are on cpu" in paged.why_not(q, q, plan)
    for module, package in (
        (xformers_paged, "xformers"),
        (flash4, "flash-attn-4"),
        (flashinfer_sparse, "flashinfer-python"),
    ):
        reason = module.why_not(q, q, plan)
        assert f"the package {package} is not installed" in reason or "on a GPU" in reason


def test_they_run_only_after_a_self_check():
    checked = {name for name in EXECUTORS if getattr(executor(name), "THIRD_PARTY", False)}
    assert checked == {"flex", "paged", "xformers_paged", "flash4", "flashinfer_sparse"}


def test_flash_attention_4_takes_the_blocks_of_its_tiles(monkeypatch):
    monkeypatch.setattr(flash4, "_installed", lambda: True)
    monkeypatch.setattr(launching, "why_not_elsewhere", lambda *_: None)
    q, _, _ = qkv(600)
    for major, blocks in ((9, [64, 128]), (10, [256]), (11, [256]), (8, []), (12, [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        taken = [size for size in (64, 128, 256) if flash4.why_not(q, q, random_plan(600, size)) is None]
        assert taken == blocks
    assert "blocks of 64 or 128 on compute capability 9; 256 on" in flash4.why_not(q, q, random_plan(600, 32))


def test_small_pages_need_flash_attention_3(monkeypatch):
    assert "wants pages of a multiple of 256 tokens, not blocks of 64" in paged._page_size(random_plan(300, 64))
    assert paged._page_size(random_plan(300, 256)) is None
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    assert paged._page_size(random_plan(300, 64)) is None


def test_pages_of_xformers_are_multiples_of_its_tiles(monkeypatch):
    monkeypatch.setattr(launching, "why_not_elsewhere", lambda *_: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    q, _, _ = qkv(300)
    taken = [block for block in (16, 32, 64, 128) if xformers_paged.why_not(q, q, random_plan(300, block)) is None]
    assert taken == [64, 128]
