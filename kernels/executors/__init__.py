"""Executors: one module for each way to compute attention for a plan.

Every executor module has:

``attend(q, k, v, plan, scale=None) -> (out, lse)``
    Softmax attention of ``q [B, H, N, D]`` over the kept blocks or clusters of ``k, v [B, Hkv, N, D]``; Hkv divides H.
    ``scale``, any finite number, multiplies the scores, None: ``D ** -0.5``. ``out [B, H, N, D]`` has q's dtype;
    ``lse`` is the natural log-sum-exp of the kept scores, float32 ``[B, H, N]``, or None if the executor does not
    compute it. The pooled terms of a plan with a tail are keys as well; an executor that does not compute them merges
    them (`dit_sparse.kernels.tail.with_tail`). A query without any valid key gets 0 and -inf. Rows of padding may hold
    NaN: executors that are not ``THIRD_PARTY`` never read them as keys and values of other rows.
``why_not(q, k, plan) -> str | None``
    None if ``attend`` supports the call; otherwise the unmet requirement: ``requires CUDA, got cpu tensors``.
``LSE: bool``
    Whether ``attend`` returns a log-sum-exp.
``CLUSTERS: bool``
    Whether ``attend`` accepts a `ClusterPlan`. All executors but ``block_ragged`` accept a `Plan`.
``THIRD_PARTY: bool``, optional
    Whether the attention kernel belongs to another package. Such an executor runs only after it has passed
    `calibration.self_check`.
"""

from __future__ import annotations

import importlib
from types import ModuleType

from dit_sparse.grid import short_repr

ON_GPU = ("block_sparse", "block_ragged", "flex", "paged", "xformers_paged", "flash4", "flashinfer_sparse")
EXECUTORS = ("reference", "gather", "cpu", *ON_GPU)


def executor(name: str) -> ModuleType:
    """Return the executor module with this name.

    Raises:
        ValueError: ``name`` is not in ``EXECUTORS``.
    """
    if not isinstance(name, str) or name not in EXECUTORS:
        raise ValueError(f"executor must be one of auto, {', '.join(EXECUTORS)}, got {short_repr(name)}")
    return importlib.import_module(f"{__name__}.{name}")
