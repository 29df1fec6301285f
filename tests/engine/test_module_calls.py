"""The layouts of attention functions: q, k and v are read, and outputs written, as the function would return them."""

from __future__ import annotations

import re

import pytest
import torch
import torch.nn.functional as F

from dit_sparse.engine.interception.module_calls import read_call
from plain_modules import SparseTensor

B, H, N, D = 2, 3, 5, 4
Q, K, V = (torch.randn(B, H, N, D) for _ in range(3))
OUT = F.scaled_dot_product_attention(Q, K, V)


def heads_last(*tensors):
    return [x.transpose(1, 2) for x in tensors]


def packed(x):
    """``[T, H, D]`` of the first item."""
    return x[0].transpose(0, 1)


def flash(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, bias=None):
    return q


def varlen(qkv, cu_seqlens, max_seqlen, softmax_scale=None):
    return qkv


def sparse(*args, **kwargs):
    return args


QKV, TENSORS = torch.stack([packed(x) for x in (Q, K, V)], 1), [packed(x) for x in (Q, K, V)]
FORMS = {
    "q, k and v": (flash, True, [Q, K, V], {}, OUT, B),
    "tokens first": (flash, False, heads_last(Q, K, V), {}, OUT.transpose(1, 2), B),
    "by name": (flash, False, heads_last(Q), dict(zip("kv", heads_last(K, V), strict=True)), OUT.transpose(1, 2), B),
    "defaults given": (flash, True, [Q, K, V, 0.0, None, False, None], {}, OUT, B),
    "one tensor": (sparse, True, [torch.stack(heads_last(Q, K, V), 2)], {}, OUT.transpose(1, 2), B),
    "one packed tensor": (varlen, True, [QKV, torch.tensor([0, N]), N], {}, packed(OUT), 1),
    "packed tensors": (sparse, True, TENSORS, {}, packed(OUT), 1),
}


@pytest.mark.parametrize("function, heads_first, args, kwargs, result, batch", FORMS.values(), ids=FORMS)
def test_layouts(function, heads_first, args, kwargs, result, batch):
    call = read_call(function, heads_first, args, kwargs)
    for actual, expected in zip((call.q, call.k, call.v), (Q, K, V), strict=True):
        assert actual.equal(expected[:batch])
    assert call.write(OUT[:batch]).equal(result) and call.read(result).equal(OUT[:batch])
    assert call.write(OUT[:batch]).is_contiguous() and call.scale is None


def test_sparse_tensors():
    x = SparseTensor(QKV, torch.zeros(N, 4))
    call = read_call(sparse, True, [x], {})
    result = call.write(OUT[:1])
    assert isinstance(result, SparseTensor) and result.coords is x.coords and result.feats.equal(packed(OUT))
    assert call.q.equal(Q[:1]) and call.read(result).equal(OUT[:1])
    three = read_call(sparse, True, [x.replace(packed(one)) for one in (Q, K, V)], {})
    assert three.v.equal(V[:1]) and three.write(OUT[:1]).feats.equal(packed(OUT))


def test_the_scale_is_read():
    assert read_call(flash, True, [Q, K, V], {"softmax_scale": 0.3}).scale == 0.3


@pytest.mark.parametrize(
    "function, args, kwargs, reason",
    [
        (flash, [Q, K, V], {"bias": torch.zeros(N, N)}, "the argument bias"),
        (flash, [Q, K, V], {"causal": True}, "the argument causal"),
        (flash, [Q, K, V, 0.1], {}, "the argument dropout_p"),
        (sparse, [Q, K, V, Q], {}, "the argument Tensor"),
        (sparse, [Q, K], {}, "2 inputs"),
        (sparse, [], {}, "0 inputs"),
        (sparse, [Q.transpose(1, 2)], {}, r"an input of shape \[2, 5, 3, 4\]"),
        (sparse, [Q[0, 0]] * 3, {}, r"inputs of shape \[5, 4\]"),
    ],
)
def test_other_calls_say_why(function, args, kwargs, reason):
    assert re.search(reason, read_call(function, True, args, kwargs))
