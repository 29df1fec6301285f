"""The Triton program behind `block_sparse`: one query block over its list of key blocks.

FlashAttention-2 (T. Dao, arXiv:2307.08691) with a list instead of a range. A row's key blocks come in ascending order,
so at most one of those it visits is cut by the end of the sequence or of the padding, and that one comes last: the
loop over whole blocks masks nothing, and the masked step after it runs at most once per row.

The list is read one step ahead of its use. Read in the same step, it would take a stage of Triton's pipeline for
itself and leave keys and values a single buffer, so that nothing would be fetched while the matrix units work.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import before_end, finish, nothing, scattered, visit


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
    WIDTHS: tl.constexpr,
    TMA: tl.constexpr,
):
    """Attention of one query block.

    Pointers: q, out ``[B, H, N, D]``; k, v ``[B, Hkv, N, D]`` in the plan's order, or where TMA is set descriptors of
    them in cells of ``[1, 1, KEYS, WIDTHS[0]]`` (k_rest, v_rest: ``WIDTHS[1]``, if there is one); lse float32
    ``[B, H, N]``; index, count, order as in Plan, order and lengths possibly None; schedule int32 ``[B * H * Qb]``, the
    rows in the order in which they start. The WIDTHS add up to D. ``scale`` is that of the scores times log2(e).
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
    queries = scattered(q, q_strides, item, head, token, real, WIDTHS)
    keys, values = (k, k_rest), (v, v_rest)

    end = tokens
    if lengths is not None:
        end = tl.load(lengths + item)
    kept = index + item * index_strides[0] + head * index_strides[1] + query_block * index_strides[2]
    live = tl.load(count + item * count_strides[0] + head * count_strides[1] + query_block * count_strides[2])
    whole = before_end(kept, live, end, BLOCK)

    top, total, sums = nothing(BLOCK, WIDTHS)
    TILES: tl.constexpr = BLOCK // KEYS
    steps = whole * TILES
    start = tl.load(kept) * BLOCK
    for step in range(0, steps):
        ahead = tl.minimum(step + 1, steps - 1)
        following = tl.load(kept + ahead // TILES) * BLOCK + ahead % TILES * KEYS
        top, total, sums = visit(
            queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, top, total, sums,
            KEYS, WIDTHS, TMA, False,
        )  # fmt: skip
        start = following
    if whole < live:
        first = tl.load(kept + whole) * BLOCK
        for start in range(first, tl.minimum(first + BLOCK, end), KEYS):
            top, total, sums = visit(
                queries, keys, values, k_strides, v_strides, item, key_head, start, end, scale, top, total, sums,
                KEYS, WIDTHS, TMA, True,
            )  # fmt: skip

    finish(out, lse, out_strides, item, head, heads, tokens, token, real, top, total, sums, WIDTHS)
