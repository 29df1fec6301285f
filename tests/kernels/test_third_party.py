"""Executors that call other packages, against float64 attention.

The Triton kernel of xFormers runs in Triton's interpreter. The other packages are replaced by simple implementations of
their documented functions, which check the arguments.
"""

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
    qkv,
    random_cluster_plan,
    random_order,
    random_plan,
    skip_or_fail,
    token_mask,
)
from dit_sparse.kernels.executors import EXECUTORS, executor, flash4, flashinfer_sparse, paged, pages, xformers_paged
from dit_sparse.kernels.gpu import launching

PLANS = {
    "one list for all heads": (dict(tokens=96), dict()),
    "ragged last block": (dict(tokens=75), dict(heads=2)),
    "lists per item and head": (dict(tokens=75, batch=2), dict(batch=2, heads=2)),
    "an order per head": (dict(tokens=75, batch=2), dict(heads=2, order=random_order(1, 2, tokens=75))),
    "grouped heads": (dict(tokens=75, heads=4, key_heads=2), dict(heads=4)),
    "padding": (dict(tokens=75, batch=2), dict(heads=2, lengths=[75, 35], order=random_order(tokens=75, fixed=40))),
}
for_every_plan = pytest.mark.parametrize("name", PLANS)
without_padding = pytest.mark.parametrize("name", [name for name in PLANS if name != "padding"])


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
    """Return output and natural log-sum-exp of ``q [M, D]`` over ``k, v [L, D]``."""
    scores = q.double() @ k.double().mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    return (scores.softmax(-1) @ v.double()).to(q.dtype), scores.logsumexp(-1).float()


# --- pages


@for_every_plan
def test_page_tables_contain_the_token_pairs_of_the_plan(name):
    (q, k, _), plan = case(name)
    batch, heads, tokens, _ = q.shape
    token = torch.arange(1, tokens + 1, dtype=torch.float32)[:, None].expand(batch, k.shape[1], -1, 1)
    inputs = pages.paged_inputs(token.repeat_interleave(heads // k.shape[1], 1), token, token, plan)
    starts = inputs.query_starts
    assert inputs.page_table.dtype == inputs.num_keys.dtype == starts.dtype == torch.int32
    mask = torch.zeros(batch * heads, tokens, tokens, dtype=torch.bool)
    for sequence, (table, num_keys) in enumerate(
        zip(inputs.page_table.tolist(), inputs.num_keys.tolist(), strict=True)
    ):
        queries = inputs.queries[starts[sequence] : starts[sequence + 1], 0, 0].long() - 1
        keys = inputs.keys[table].flatten()[:num_keys].long() - 1
        head = sequence // plan.blocks
        assert not mask[head, queries[:, None], keys].any()
        mask[head, queries[:, None], keys] = True
    assert torch.equal(mask.view(batch, heads, tokens, tokens), token_mask(plan, batch, heads))


def paged_attention(q, k, v, starts, num_keys, page_table, scale):
    """Compute paged attention. Sequences without keys get NaN and inf, which callers must not use."""
    out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:1], torch.inf)
    for row, length, begin, end in zip(page_table, num_keys.tolist(), starts[:-1], starts[1:], strict=True):
        keys, values = (x[row].flatten(0, 1)[:length, 0] for x in (k, v))
        if length:
            out[begin:end, 0], lse[begin:end] = attention_of_one_head(q[begin:end, 0], keys, values, scale)
    return out, lse


@for_every_plan
def test_paged(name, monkeypatch):
    def varlen_attn(q, k, v, cu_seq_q, cu_seq_k, max_q, max_k, *, return_aux, scale, seqused_k, block_table):
        assert cu_seq_k is None and return_aux.lse and k.shape[1] == 16 and q.ndim == 3
        assert max_q == cu_seq_q.diff().max() and max_k >= seqused_k.max()
        return paged_attention(q, k, v, cu_seq_q, seqused_k, block_table, scale)

    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", varlen_attn)
    assert_exact(paged, *case(name))


@for_every_plan
def test_xformers_paged(name, monkeypatch):
    def bias(q_seqlen, kv_seqlen, block_tables, page_size, device):
        assert isinstance(q_seqlen, list) and isinstance(kv_seqlen, list) and page_size == 16
        assert block_tables.device == device
        starts = F.pad(torch.tensor(q_seqlen).cumsum(0), (1, 0))
        return SimpleNamespace(starts=starts, num_keys=torch.tensor(kv_seqlen), page_table=block_tables)

    def forward(q, k, v, attn_bias, scale, op):
        assert q.shape[0] == k.shape[0] == 1 and op == "triton"
        k, v = (x[0].unflatten(0, (-1, 16)) for x in (k, v))
        out, lse = paged_attention(q[0], k, v, attn_bias.starts, attn_bias.num_keys, attn_bias.page_table, scale)
        return out[None], lse[None, None]

    unavailable = SimpleNamespace(FwOp=SimpleNamespace(is_available=lambda: False))
    fmha = SimpleNamespace(
        attn_bias=SimpleNamespace(PagedBlockDiagonalPaddedKeysMask=SimpleNamespace(from_seqlens=bias)),
        memory_efficient_attention_forward_requires_grad=forward,
        flash=unavailable, flash3=unavailable, triton_splitk=SimpleNamespace(FwOp="triton"),
    )  # fmt: skip
    fake_module(monkeypatch, "xformers.ops", fmha=fmha)
    assert_exact(xformers_paged, *case(name))


@pytest.fixture(scope="module")
def xformers_kernel():
    """The Triton operator of xFormers, imported from the folder where `make test` installs the package. Other modules
    that the import loads remain, because parts of PyTorch can be imported only once."""
    folder = Path(sys.prefix, "packages", "xformers-0.0.35")
    if not folder.is_dir():
        skip_or_fail("requires xFormers in .venv/packages: run make .venv/packages/xformers-0.0.35")
    sys.path.insert(0, str(folder))
    yield importlib.import_module("xformers.ops").fmha.triton_splitk.FwOp
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "xformers"]:
        del sys.modules[name]


XFORMERS_CASES = {
    "lists and orders per head, grouped heads": (
        dict(tokens=150, heads=4, key_heads=2),
        dict(heads=4, order=random_order(1, 4, tokens=150)),
    ),
    "padding in a batch": (
        dict(tokens=150, batch=2, heads=1),
        dict(lengths=[150, 70], order=random_order(tokens=150, fixed=80)),
    ),
}


@pytest.mark.skipif(torch.cuda.is_available(), reason="requires Triton's interpreter")
@pytest.mark.parametrize("name", XFORMERS_CASES)
def test_xformers_triton_kernel_agrees_with_float64(name, xformers_kernel, monkeypatch):
    monkeypatch.setattr(xformers_kernel, "SUPPORTED_DEVICES", {"cpu"})
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    inputs, plan = XFORMERS_CASES[name]
    q, k, v = qkv(**inputs, dim=64, dtype=torch.float16)
    plan = random_plan(inputs["tokens"], 64, **plan)
    out, lse = xformers_paged.attend(q, k, v, plan, 0.2)
    expected, log_sum_exp = exact(q, k, v, token_mask(plan, *q.shape[:2]), 0.2)
    assert_near(out, expected, TOLERANCE[torch.float16])
    assert_near(lse, log_sum_exp, TOLERANCE[torch.float16])


# --- FlashAttention-4 and FlashInfer


@without_padding
def test_flash_attention_4(name, monkeypatch):
    def flash_attn_func(q, k, v, softmax_scale, block_sparse_tensors, return_lse):
        assert return_lse and not block_sparse_tensors.mask_block_cnt.any()
        (rows, columns), count = block_sparse_tensors.block_size, block_sparse_tensors.full_block_cnt
        index = block_sparse_tensors.full_block_idx
        assert index.dtype == count.dtype == torch.int32 and index.is_contiguous() and count.is_contiguous()
        out, lse = torch.full_like(q, torch.nan), torch.full((q.shape[0], q.shape[2], q.shape[1]), torch.nan)
        groups = q.shape[2] // k.shape[2]
        for b, h, i in torch.cartesian_prod(*map(torch.arange, (q.shape[0], q.shape[2], count.shape[-1]))).tolist():
            row = min(b, index.shape[0] - 1), min(h, index.shape[1] - 1), i
            kept = index[row][: count[row]].tolist()
            keys, values = (
                torch.cat([x[b, j * columns : (j + 1) * columns, h // groups] for j in kept]) for x in (k, v)
            )
            queries = slice(i * rows, (i + 1) * rows)
            out[b, queries, h], lse[b, h, queries] = attention_of_one_head(
                q[b, queries, h], keys, values, softmax_scale
            )
        return out, lse

    fake_module(monkeypatch, "flash_attn.cute.interface", flash_attn_func=flash_attn_func)
    fake_module(monkeypatch, "flash_attn.cute.block_sparsity", BlockSparseTensorsTorch=SimpleNamespace)
    assert_exact(flash4, *case(name))


class Wrapper:
    """Base of the FlashInfer wrappers, which return the log-sum-exp to base 2."""

    def __init__(self, workspace):
        assert workspace.dtype == torch.uint8

    def attend(self, q, k, v, queries, keys):
        out, lse = attention_of_one_head(q[queries], k[keys], v[keys], self.scale)
        return out, lse / torch.tensor(2.0).log()


class FixedBlocks(Wrapper):
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
            queries = slice(i * self.rows, (i + 1) * self.rows)
            keys = (kept[:, None] * self.columns + torch.arange(self.columns)).flatten()
            out[queries, 0], lse[queries, 0] = self.attend(q[:, 0], k[:, 0], v[:, 0], queries, keys)
        return out, lse


class VariableBlocks(Wrapper):
    def plan(self, keep, rows, columns, query_heads, key_heads, dim, sm_scale, q_data_type):
        assert keep.shape == (key_heads, rows.shape[1], columns.shape[1]) and query_heads == key_heads
        self.keep, self.rows, self.columns, self.scale = keep, rows, columns, sm_scale

    def run(self, q, k, v, return_lse):
        out, lse = torch.full_like(q, torch.nan), torch.full(q.shape[:2], torch.nan)
        for head, keep in enumerate(self.keep):
            columns = torch.arange(k.shape[1]).split(self.columns[head].tolist())
            rows = torch.arange(q.shape[1]).split(self.rows[head].tolist())
            for queries, kept in zip(rows, keep, strict=True):
                keys = torch.cat([columns[j] for j in kept.nonzero().flatten().tolist()])
                out[head, queries], lse[head, queries] = self.attend(q[head], k[head], v[head], queries, keys)
        return out, lse


@pytest.fixture
def fake_flashinfer(monkeypatch):
    wrappers = dict(BlockSparseAttentionWrapper=FixedBlocks, VariableBlockSparseAttentionWrapper=VariableBlocks)
    fake_module(monkeypatch, "flashinfer", **wrappers)


@without_padding
def test_flashinfer_on_blocks(name, fake_flashinfer):
    assert_exact(flashinfer_sparse, *case(name))


def test_flashinfer_on_clusters(fake_flashinfer):
    plan = random_cluster_plan(75, batch=2, heads=2)
    assert_exact(flashinfer_sparse, qkv(75, batch=2), plan, cluster_token_mask)


def fake_module(monkeypatch, name: str, **content) -> None:
    """Add a module and its parents to ``sys.modules``."""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        part = ".".join(parts[:depth])
        if part not in sys.modules or depth == len(parts):
            monkeypatch.setitem(sys.modules, part, ModuleType(part))
    for key, value in content.items():
        setattr(sys.modules[name], key, value)


# --- why_not


def test_why_not_on_a_cpu():
    q, _, _ = qkv(75)
    plan = random_plan(75, 16)
    assert paged.why_not(q, q, plan) == "requires CUDA, got cpu tensors"
    for module, package in (
        (xformers_paged, "xformers"),
        (flash4, "flash-attn-4"),
        (flashinfer_sparse, "flashinfer-python"),
    ):
        reason = module.why_not(q, q, plan)
        assert f"requires the package {package}" in reason or "requires CUDA" in reason


def test_third_party_executors():
    third_party = {name for name in EXECUTORS if getattr(executor(name), "THIRD_PARTY", False)}
    assert third_party == {"flex", "paged", "xformers_paged", "flash4", "flashinfer_sparse"}


def test_block_sizes_of_flash_attention_4(monkeypatch):
    monkeypatch.setattr(flash4, "_is_installed", lambda: True)
    monkeypatch.setattr(launching, "why_not_third_party", lambda *_: None)
    q, _, _ = qkv(600)
    for major, blocks in ((9, [64, 128]), (10, [256]), (11, [256]), (8, []), (12, [])):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _, major=major: (major, 0))
        supported = [size for size in (64, 128, 256) if flash4.why_not(q, q, random_plan(600, size)) is None]
        assert supported == blocks
    assert "blocks of 64 or 128 tokens on compute capability 9; 256 tokens on" in flash4.why_not(
        q, q, random_plan(600, 32)
    )


def test_small_pages_require_flash_attention_3(monkeypatch):
    assert "requires blocks of a multiple of 256 tokens with FlashAttention-2, got 64" in paged._unsupported_page_size(
        random_plan(300, 64)
    )
    assert paged._unsupported_page_size(random_plan(300, 256)) is None
    monkeypatch.setattr("torch.nn.attention.current_flash_attention_impl", lambda: "FA3")
    assert paged._unsupported_page_size(random_plan(300, 64)) is None


def test_block_sizes_of_xformers(monkeypatch):
    monkeypatch.setattr(launching, "why_not_third_party", lambda *_: None)
    monkeypatch.setattr("importlib.util.find_spec", lambda _: True)
    q, _, _ = qkv(300)
    supported = [block for block in (16, 32, 64, 128) if xformers_paged.why_not(q, q, random_plan(300, block)) is None]
    assert supported == [64, 128]
