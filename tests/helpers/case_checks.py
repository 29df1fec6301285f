"""Checks of random attention calls, against float64 attention that is computed here from the plan."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import dit_sparse as ds
from attention_cases import exact_with_tail
from dit_sparse.composition import PerHead, Wrapper, nested_methods
from dit_sparse.method import AttentionOutput, Method
from dit_sparse.methods import method as read_method
from dit_sparse.methods import method_at_density, method_text
from dit_sparse.methods.corrections.rettention import Rettention
from dit_sparse.methods.corrections.routed import Routed
from dit_sparse.methods.corrections.sol import Sol
from dit_sparse.methods.layouts.svg2 import SVG2
from dit_sparse.methods.patterns.vdit import Skip
from dit_sparse.methods.schedules.seqboat import SeqBoat
from dit_sparse.pattern import Union
from random_cases import Case

AnyPlan = ds.Plan | ds.ClusterPlan
TOLERANCE = {torch.float64: 2e-5, torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
REFUSALS = (  # of calls that an executor or a method does not support
    r"executor '\w+' cannot run this call: (requires|returns no|supports at most) ",
    r"\w+ must divide the block of \d+, got ",
    r"padding must be text at the end of the sequence",
    r"\w+ and \w+ would both correct the output",
)


@dataclass(frozen=True, kw_only=True)
class Observed(Wrapper):
    """Calls ``observe(result, out, lse)`` with the output of the executor and that of the inner method's correction."""

    observe: Callable[[AttentionOutput, Tensor, Tensor | None], None] = field(compare=False)

    def correct(self, result: AttentionOutput, *context: Any) -> tuple[Tensor, Tensor | None]:
        out, lse = super().correct(result, *context)
        self.observe(result, out, lse)
        return out, lse


def check(case: Case, device: str = "cpu") -> str | None:
    """Compute a case. Return None, or why the library refuses it.

    Raises:
        AssertionError: the result is wrong, or the message of a refusal.
    """
    calls = []
    try:
        method = method_at_density(case.method, case.density)
        out, _ = attend(case, Observed(inner=method, observe=lambda *call: calls.append(call)), device)
    except (ValueError, RuntimeError) as error:
        return check_refusal(error)
    ((result, corrected, lse),) = calls
    assert out is corrected, "corrected output: it is not returned"
    assert read_method(method_text(method)) == method, f"notation: {method_text(method)} gives another method"
    check_executor(result)
    check_plan(result.plan, method, case.grid)
    check_correction(result, corrected, lse, method)
    check_items(case, result, corrected, device)
    if case.lengths is not None:
        zeros, _ = attend(replace(case, fill="zero"), method, device)
        assert_close("output for other padding", zeros, corrected.double(), result)
    return None


def check_pipeline(case: Case, stock: Any) -> str | None:
    """Generate videos of one or two prompts with the method, density, block and executor of a case by a pipeline of
    ``tiny_pipelines``, some under autocast, and again with other padding. Returns and raises as `check`."""
    calls, rng = [], random.Random(case.number)
    lengths = tuple(rng.randint(1, 12) for _ in range(rng.choice((1, 1, 2))))
    autocast = lambda: torch.autocast("cpu", torch.bfloat16, enabled=case.number % 5 == 4)
    schedule = ds.Schedule(rng.choice((0, 1, 0.5)), rng.choice((0, 1)), rng.choice((1, 2)), rng.random() < 0.3)
    settings = dict(schedule=schedule, block=max(16, case.block // 16 * 16), executor=case.executor, min_tokens=0)

    def observe(result: AttentionOutput, out: Tensor, lse: Tensor | None) -> None:
        check_executor(result)
        calls.append(result.plan)

    def generate(method: str | Method, density: float | None = None, **other: Tensor) -> tuple[Tensor, ds.Run]:
        with ds.enable(stock.pipe, method, density=density, **settings) as run, autocast():
            return stock.pipe(**stock.kwargs(lengths=lengths) | other, output_type="latent").frames, run

    try:
        method = method_at_density(case.method, case.density)
        video, run = generate(Observed(inner=method, observe=observe))
        again, _ = generate(case.method, case.density, **other_padding(stock.kwargs(lengths=lengths)))
    except (ValueError, RuntimeError) as error:
        return check_refusal(error)
    assert video.isfinite().all(), "video: it is not finite"
    assert again.equal(video), "video: the text of the method, or other padding, gives another one"
    assert run.report().sparse_calls == len(calls), f"report: {run.report().sparse_calls} calls instead of {len(calls)}"
    with autocast():
        dense = stock.pipe(**stock.kwargs(lengths=lengths), output_type="latent").frames
    computes_all = all(plan.block_mask().all() for plan in calls) and not holds(method, Skip)
    error = float((video - dense).norm() / dense.norm())
    assert error < (0.1 if case.number % 5 == 4 else 1e-3) or not computes_all, (
        f"video: it differs by {error:.1e} from dense, though no pair is dropped"
    )
    return None


def other_padding(arguments: dict) -> dict:
    """Return the prompt embeddings of a pipeline call with other values after each prompt, if they have a mask."""
    embeds, mask = arguments["prompt_embeds"], arguments.get("prompt_attention_mask")
    return {} if mask is None else {"prompt_embeds": embeds.masked_fill(~mask.bool()[..., None], 9.0)}


def attend(case: Case, method: str | Method, device: str, items: list[int] | None = None) -> tuple[Tensor, Tensor]:
    """Call `dit_sparse.attention`, or for some items of the batch with keys and values for every head."""
    q, k, v, lengths = case.tensors(device)
    if items is not None:
        k, v = (x.repeat_interleave(case.heads // case.key_heads, 1) for x in (k, v))
        q, k, v, lengths = (x if x is None else x[items] for x in (q, k, v, lengths))
    settings = dict(grid=case.grid, lengths=lengths, block=case.block, executor=case.executor, scale=case.scale)
    return ds.attention(q, k, v, method=method, density=case.density if isinstance(method, str) else None, **settings)


def check_refusal(error: ValueError | RuntimeError) -> str:
    """Return the message of an error. It must be one of `REFUSALS`, in one sentence."""
    message = str(error)
    assert any(re.match(pattern, message) for pattern in REFUSALS), f"refusal: {type(error).__name__}: {message}"
    assert "\n" not in message and not re.search(r"\. [A-Z]", message), f"refusal: several sentences: {message}"
    return message


def check_executor(result: AttentionOutput) -> None:
    """Check output and log-sum-exp of the executor against attention over the kept keys and the pooled tail in
    float64."""
    if result.plan.tail is None:
        out, lse = naive_attention(result, token_mask(result))
    else:
        tensors = (x.to("cpu") for x in (result.q, result.k, result.v, result.plan))
        out, lse = (x.to(result.q.device) for x in exact_with_tail(*tensors, result.scale))
    assert result.out.dtype == result.q.dtype, f"output: it is {result.out.dtype} for {result.q.dtype}"
    assert_close("output", result.out, out, result)
    if result.lse is not None:
        assert_close("log-sum-exp", result.lse, lse, result)


def check_plan(plan: AnyPlan, method: Method, grid: ds.Grid) -> None:
    """Check that a plan keeps text, that video attends to video, that copies are equal, and the density."""
    tokens = torch.arange(grid.tokens, device=plan.index.device)
    mask = plan.token_mask(tokens)
    text = (tokens < grid.before) | (tokens >= grid.before + grid.video)
    assert mask[:, :, text].all() and mask[..., text].all(), "text: a pair with text is dropped"
    assert mask[:, :, ~text][..., ~text].any(-1).all(), "rows: a video token attends to no video token"
    assert abs(plan.density - float(mask.double().mean())) < 1e-6, "density: it is not that of the mask"
    assert plan.full().token_mask(tokens).all(), "full(): a pair is dropped"
    assert plan.to("meta").index.is_meta and plan.to(tokens.device).token_mask(tokens).equal(mask), "to(): masks differ"
    repeated = mask if len(mask) == 1 else torch.cat([mask, mask])
    assert plan.repeat_batch().token_mask(tokens).equal(repeated), "repeat_batch(): masks differ"
    if method.density is not None and all(part.density_exception is None for part in nested_methods(method)):
        check_density(plan, mask, text, method, grid)


def check_density(plan: AnyPlan, mask: Tensor, text: Tensor, method: Method, grid: ds.Grid) -> None:
    """Check that a plan meets the density of its method to .01, to two pairs of blocks in each group of ``sparsed``, or
    to half a cluster in every row, unless the pairs that the method always keeps exceed it."""
    queries, keys = (float(sizes.max()) / plan.tokens for sizes in (plan.query_sizes, plan.key_sizes))
    groups = max(getattr(part, "groups", 1) for part in nested_methods(method))
    tolerance = max(0.01, keys / 2 if isinstance(plan, ds.ClusterPlan) else 2 * queries * keys * groups)
    required = required_density(plan, text, method, grid)
    most = max(method.density, required) + tolerance
    found = f"density: it is {plan.density:.3f} for {method.density} and {required:.3f} of required pairs"
    assert method.density - tolerance <= plan.density <= most, found
    assert method.density < 1 or mask.all(), "density: a pair is dropped at density 1"


def required_density(plan: AnyPlan, text: Tensor, method: Method, grid: ds.Grid) -> float:
    """Return the fraction of the pairs that a method keeps at any density: groups that hold text, the own block, its
    neighbors (sol), the own segment (pbs), the best group of each row (svg2, routed), and all patterns of a union but
    one."""
    queries, keys = (labels.double() for labels in (plan.query_group, plan.key_group))
    has_text = lambda labels: (labels[..., None] == labels[..., None, text]).any(-1)
    required, base = has_text(queries)[..., None] | has_text(keys)[..., None, :], list(nested_methods(method))[-1]
    if isinstance(base, SVG2 | Routed):
        return float(required.double().mean()) + float(plan.key_sizes.max()) / plan.tokens
    segment = getattr(base, "segment_blocks", 1)
    distance = (queries // segment)[..., None] - (keys // segment)[..., None, :]
    required = required | (distance.abs() <= isinstance(base, Sol))
    for part in (part for one in nested_methods(method) if isinstance(one, Union) for part in one.parts[1:]):
        tokens = torch.zeros(1, 1, plan.tokens, 1)
        required = required | part.plan(tokens, tokens, tokens, ds.Site(grid, plan.block), {}).token_mask(
            torch.arange(plan.tokens)
        )
    return float(required.double().mean())


def check_correction(result: AttentionOutput, out: Tensor, lse: Tensor | None, method: Method) -> None:
    """Check the corrected output of a first call against the formula of the correction in float64."""
    corrections = [part for part in nested_methods(method) if isinstance(part, Rettention | SeqBoat | Sol | Skip)]
    if holds(method, PerHead):
        return
    if not corrections:
        expected = result.out, result.lse
    elif isinstance(corrections[0], Skip):
        expected = torch.zeros_like(result.out), result.lse
    elif isinstance(corrections[0], Rettention | SeqBoat):  # computes the dense output at the first call
        expected = naive_attention(result, valid_tokens(result)[:, :, None])
    else:
        expected = naive_tail(result)
    assert_close("corrected output", out, expected[0], result)
    if lse is not None:
        assert_close("corrected log-sum-exp", lse, expected[1], result)


def check_items(case: Case, result: AttentionOutput, out: Tensor, device: str) -> None:
    """Check that some items of the batch in another order, keys for every head and the text of the method give the same
    output."""
    items = list(range(case.batch))[::-1][case.number % case.batch :]
    again, _ = attend(case, case.method, device, items)
    plan = result.plan if result.plan.lengths is None else result.plan.with_lengths(result.plan.lengths[items])
    part = replace(result, q=result.q[items], k=result.k[items], v=result.v[items], plan=plan)
    assert_close(f"items {items} of the batch", again, out[items].double(), part)


def naive_attention(result: AttentionOutput, mask: Tensor) -> tuple[Tensor, Tensor]:
    """Return output and log-sum-exp of masked attention in float64; 0 and -inf for a row without keys."""
    q, k, v, scale = float64_inputs(result)
    scores = (q @ k.mT * scale).masked_fill(~mask, -torch.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ v, scores.logsumexp(-1)


def naive_tail(result: AttentionOutput) -> tuple[Tensor, Tensor]:
    """Return attention over the kept keys and the mean key of every block that Sol drops, in one softmax."""
    q, k, v, scale = float64_inputs(result)
    plan, groups = result.plan, result.plan.key_sizes.shape[-1]
    member = F.one_hot(plan.key_group.expand(q.shape[:3]), groups) * valid_tokens(result)[..., None].double()
    size = member.sum(2)
    mean = lambda x: member.mT @ x / size.clamp(min=1)[..., None]
    keys, values = mean(k), mean(v)
    # the mean of the query block takes the place of the query, but for an offset of all keys
    offset = (k.sum(2) / size.sum(-1, keepdim=True))[:, :, None]
    logits = (member @ mean(q) @ (keys - offset).mT + q @ offset.mT) * scale + size.log()[:, :, None]
    rows = plan.query_group.expand(q.shape[:3])[..., None].expand(-1, -1, -1, groups)
    logits = logits.masked_fill(plan.block_mask().expand(*q.shape[:2], -1, -1).gather(2, rows), -torch.inf)
    scores = torch.cat([(q @ k.mT * scale).masked_fill(~token_mask(result), -torch.inf), logits], -1)
    return scores.softmax(-1).nan_to_num(0.0) @ torch.cat([v, values], 2), scores.logsumexp(-1)


def float64_inputs(result: AttentionOutput) -> tuple[Tensor, Tensor, Tensor, float]:
    """Return q, k and v in float64 with all heads and zeros as padding, and the scale."""
    heads, valid = result.q.shape[1], valid_tokens(result)[..., None]
    tensors = (x.double().repeat_interleave(heads // x.shape[1], 1) for x in (result.q, result.k, result.v))
    scale = result.q.shape[-1] ** -0.5 if result.scale is None else result.scale
    return *(torch.where(valid, x, 0.0) for x in tensors), scale


def valid_tokens(result: AttentionOutput) -> Tensor:
    """Return which tokens are not padding, bool ``[B|1, 1, N]``."""
    plan, position = result.plan, torch.arange(result.q.shape[2], device=result.q.device)
    lengths = torch.tensor([plan.tokens]) if plan.lengths is None else plan.lengths
    return (position < lengths.to(position.device)[:, None])[:, None]


def token_mask(result: AttentionOutput) -> Tensor:
    """Return the kept pairs without padded keys, bool ``[B, H, N, N]``."""
    mask = result.plan.token_mask(torch.arange(result.q.shape[2], device=result.q.device))
    return mask.expand(*result.q.shape[:2], -1, -1) & valid_tokens(result)[:, :, None]


def holds(method: Method, *kinds: type) -> bool:
    """Return whether a method is of one of these kinds, or a method inside it."""
    return any(isinstance(part, kinds) for part in nested_methods(method))


def assert_close(name: str, actual: Tensor, expected: Tensor, result: AttentionOutput) -> None:
    """Assert that the rows of real tokens are equal, up to the rounding of scores and, in an output, of values."""
    q, k, v, scale = float64_inputs(result)
    rounding = 1e-6 * abs(scale) * float(q.norm(dim=-1).max() * k.norm(dim=-1).max())
    allowed = rounding + 1e-4 if actual.ndim == 3 else (TOLERANCE[actual.dtype] + rounding) * float(v.abs().max())
    rows = valid_tokens(result).expand(actual.shape[:3])
    actual, expected = actual[rows].double(), expected[rows].double()
    assert not actual.isnan().any(), f"{name}: {int(actual.isnan().sum())} of {actual.numel()} values are NaN"
    infinite = expected.isinf()
    assert actual[infinite].equal(expected[infinite]), f"{name}: infinite values differ"
    error = float((actual - expected).masked_fill(infinite, 0.0).abs().max())
    assert error <= allowed, f"{name}: the largest error is {error:.2e}, allowed {allowed:.2e}"
