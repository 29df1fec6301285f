"""The Triton program behind `block_sparse`: one query block over its list of key blocks.

FlashAttention-2 (T. Dao, arXiv:2307.08691) with a list instead of a range. A row's key blocks come in ascending order,
so at most one of those it visits is cut by the end of the sequence or of the padding, and that one comes last: the
loop over whole blocks masks nothing, and the masked step after it runs at most once per row.

Head sizes that are no power of two are cut in two columns of tiles, 80 = 64 + 16 and 96 = 64 + 32; `rest` names the
second one, and WIDTH_REST = 0 leaves it out.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles_triton import begin, tile

LN2 = tl.constexpr(0.6931471805599453)


@triton.jit
def forward(
    q,
    k,
    v,
    k_rest,
    v_rest,
    out,
    lse,
    index,
    count,
    order,
    lengths,
    schedule,
    q_strides,
    k_strides,
    v_strides,
    out_strides,
    index_strides,
    count_strides,
    order_strides,
    heads,
    group,
    tokens,
    scale,
    BLOCK: tl.constexpr,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attention of one query block.

    Pointers: q, out ``[B, H, N, D]``; k, v ``[B, Hkv, N, D]`` in the plan's order, or tensor descriptors of them cut
    into tiles of ``[1, 1, KEYS, WIDTH]`` (k_rest, v_rest: ``WIDTH_REST``) where TMA is set; lse float32 ``[B, H, N]``;
    index, count, order as in Plan, order and lengths possibly None; schedule int32 ``[B * H * Qb]``, the rows in the
    order in which they start. ``scale`` is that of the scores times log2(e).
    """
    row = tl.load(schedule + tl.program_id(0))
    blocks = tl.cdiv(tokens, BLOCK)
    query_block, head, item = row % blocks, (row // blocks) % heads, row // (blocks * heads)
    key_head = head // group

    place = query_block * BLOCK + tl.arange(0, BLOCK)
    real = place < tokens
    token = place
    if order is not None:
        token = tl.load(order + item * order_strides[0] + head * order_strides[1] + place, mask=real, other=0)
    columns = tl.arange(0, WIDTH)
    columns_rest = WIDTH + tl.arange(0, max(WIDTH_REST, 1))
    query_rows = q + begin(item, head, q_strides) + token.to(tl.int64)[:, None] * q_strides[2]
    queries = tl.load(query_rows + columns[None, :], mask=real[:, None], other=0.0)
    queries_rest = queries
    if WIDTH_REST:
        queries_rest = tl.load(query_rows + columns_rest[None, :], mask=real[:, None], other=0.0)

    end = tokens
    if lengths is not None:
        end = tl.load(lengths + item)
    kept = index + item * index_strides[0] + head * index_strides[1] + query_block * index_strides[2]
    live = tl.load(count + item * count_strides[0] + head * count_strides[1] + query_block * count_strides[2])
    whole = live
    while (whole > 0) and ((tl.load(kept + tl.maximum(whole - 1, 0)) + 1) * BLOCK > end):
        whole -= 1

    top = tl.full([BLOCK], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    sums = tl.zeros([BLOCK, WIDTH], tl.float32)
    sums_rest = tl.zeros([BLOCK, max(WIDTH_REST, 1)], tl.float32)
    TILES: tl.constexpr = BLOCK // KEYS
    for step in range(0, whole * TILES):
        start = tl.load(kept + step // TILES) * BLOCK + step % TILES * KEYS
        top, total, sums, sums_rest = _visit(
            queries, queries_rest, k, v, k_rest, v_rest, k_strides, v_strides, item, key_head, start, end, scale,
            top, total, sums, sums_rest, KEYS, WIDTH, WIDTH_REST, TMA, False,
        )  # fmt: skip
    if whole < live:
        first = tl.load(kept + whole) * BLOCK
        for start in range(first, tl.minimum(first + BLOCK, end), KEYS):
            top, total, sums, sums_rest = _visit(
                queries, queries_rest, k, v, k_rest, v_rest, k_strides, v_strides, item, key_head, start, end, scale,
                top, total, sums, sums_rest, KEYS, WIDTH, WIDTH_REST, TMA, True,
            )  # fmt: skip

    share = tl.where(total > 0, 1 / total, 0.0)[:, None]
    out_rows = out + begin(item, head, out_strides) + token.to(tl.int64)[:, None] * out_strides[2]
    tl.store(out_rows + columns[None, :], (sums * share).to(out.dtype.element_ty), mask=real[:, None])
    if WIDTH_REST:
        tl.store(out_rows + columns_rest[None, :], (sums_rest * share).to(out.dtype.element_ty), mask=real[:, None])
    lse_row = lse + (item.to(tl.int64) * heads + head) * tokens
    tl.store(lse_row + token, (top + tl.log2(total)) * LN2, mask=real)


@triton.jit
def _visit(
    queries,
    queries_rest,
    k,
    v,
    k_rest,
    v_rest,
    k_strides,
    v_strides,
    item,
    head,
    start,
    end,
    scale,
    top,
    total,
    sums,
    sums_rest,
    KEYS: tl.constexpr,
    WIDTH: tl.constexpr,
    WIDTH_REST: tl.constexpr,
    TMA: tl.constexpr,
    CUT: tl.constexpr,
):
    """Take one tile of keys into the running softmax; CUT: hide those from ``end`` on. Everything is base 2."""
    keys = tile(k, k_strides, item, head, start, end, 0, KEYS, WIDTH, TMA, CUT)
    scores = tl.dot(queries, keys.T, input_precision="ieee")
    if WIDTH_REST:
        keys_rest = tile(k_rest, k_strides, item, head, start, end, WIDTH, KEYS, WIDTH_REST, TMA, CUT)
        scores = tl.dot(queries_rest, keys_rest.T, scores, input_precision="ieee")
    if CUT:
        scores = tl.where((start + tl.arange(0, KEYS) < end)[None, :], scores, float("-inf"))
    higher = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - higher[:, None])
    shrink = tl.exp2(top - higher)
    total = total * shrink + tl.sum(weights, 1)
    values = tile(v, v_strides, item, head, start, end, 0, KEYS, WIDTH, TMA, CUT)
    weights = weights.to(values.dtype)
    sums = tl.dot(weights, values, sums * shrink[:, None], input_precision="ieee")
    if WIDTH_REST:
        values_rest = tile(v_rest, v_strides, item, head, start, end, WIDTH, KEYS, WIDTH_REST, TMA, CUT)
        sums_rest = tl.dot(weights, values_rest, sums_rest * shrink[:, None], input_precision="ieee")
    return higher, total, sums, sums_rest
