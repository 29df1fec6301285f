"""Batches, padded text, attention masks and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sparse_pipelines import (
    STEPS,
    RunningMean,
    assert_near,
    attention_mask,
    cached_pipeline,
    calls_per_step,
    count_layers,
    enable_sparse,
    first_transformer_call,
    for_pipelines,
    generate,
    generate_dense,
    generate_sparse,
)


@for_pipelines("cogvideox", "cogvideox15", "ltx", "mochi")
def test_every_batch_item_has_its_own_plan(stock):
    """A bare transformer does not tell whether its batch holds the branches of guidance."""
    arguments, plans = first_transformer_call(stock), []
    tensors = {name for name, value in arguments.items() if isinstance(value, Tensor) and value.shape[:1] == (2,)}
    assert {"hidden_states", "encoder_hidden_states", "timestep"} <= tensors
    transformer = stock.pipe.transformer
    with torch.no_grad(), enable_sparse(transformer, RunningMean(), density=0.6, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: plans.append(plan))
        item = lambda i: {name: x[i : i + 1] if name in tensors else x for name, x in arguments.items()}
        alone = [transformer(**item(i))[0] for i in range(2)]
        plans.clear()
        together = transformer(**arguments)[0]
    assert_near(together, torch.cat(alone))
    if stock.name == "mochi":
        assert [len(plan.index) for plan in plans] == [1, 1] * count_layers(stock)
    else:
        assert [len(plan.index) for plan in plans] == [2] * count_layers(stock)
        assert any(not plan.block_mask()[0].equal(plan.block_mask()[1]) for plan in plans)


@pytest.mark.parametrize("method", ["radial", "window", RunningMean()], ids=["radial", "window", "dynamic"])
def test_padded_prompts_in_a_batch_give_the_results_of_single_prompts(method):
    stock = cached_pipeline("hunyuan_video")
    both = stock.kwargs(lengths=(17, 9))
    prompts = {name for name in both if "prompt" in name}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    prompt = lambda i: {name: both[name][i : i + 1] for name in prompts}
    with enable_sparse(stock, method, density=0.3) as run:
        together = generate(stock, lengths=(17, 9), generator=seeds())
        alone = [generate(stock, **prompt(i), generator=seeds()[i]) for i in range(2)]
        assert run.report().sparse_calls == 3 * 3 * calls_per_step(stock)
    assert_near(together, torch.cat(alone), 1e-4)


@pytest.mark.parametrize(
    "method", ["window", "svg", "svg2", "vdit", "adaspa", "pbs", "sparge", "sol", "pooled(asa)", "rettention(svg)"]
)
def test_content_of_padding_has_no_effect(method):
    """Padded text is computed as rows, so its values reach q and k; neither the plan nor the correction reads them."""
    stock = cached_pipeline("hunyuan_video")
    arguments = stock.kwargs(lengths=(1, 2))
    padding = ~arguments["prompt_attention_mask"].bool()
    noisy = arguments["prompt_embeds"].masked_fill(padding[..., None], 50.0)
    out = [
        generate_sparse(stock, method, density=0.5, other=dict(lengths=(1, 2), **change))
        for change in ({}, dict(prompt_embeds=noisy))
    ]
    assert_near(*out, 1e-5)


TOKENS = 5 * 5 * 7


def mask_with_hole() -> Tensor:
    return torch.arange(TOKENS)[None, None, None] != 40


MASKS = {
    "hole": (mask_with_hole, "excludes video tokens"),
    "no text": (lambda: (torch.arange(TOKENS) < 150)[None, None, None], "excludes video tokens"),
    "additive": (lambda: torch.zeros(1, 1, 1, TOKENS).masked_fill(~mask_with_hole(), -1.0), "adds a bias"),
    "pairs": (
        lambda: torch.ones(TOKENS, TOKENS, dtype=torch.bool).tril(100)[None, None],
        "allows different keys for different queries",
    ),
}


@pytest.mark.parametrize("mask, words", MASKS.values(), ids=MASKS)
def test_other_masks_than_padding_stay_dense(mask, words, caplog):
    stock = cached_pipeline("wan")
    with attention_mask(stock, mask()):
        plain = generate(stock)
        with enable_sparse(stock, density=0.3) as run:
            assert generate(stock).equal(plain)
    assert not plain.equal(generate_dense("wan"))
    (reason,) = run.report().dense_calls.keys() - {"the schedule"}
    assert words in reason and run.report().dense_calls[reason] == 12 and run.report().sparse_calls == 0
    warnings = [record for record in caplog.records if record.name == "dit_sparse"]
    assert [record.getMessage() for record in warnings] == [f"attention stays dense: {reason}"]


def test_other_masks_than_padding_apply_in_dense_steps(executor_costs):
    stock = cached_pipeline("wan")
    with attention_mask(stock, mask_with_hole()):
        plain = generate(stock)
        with enable_sparse(stock, executor="auto", dense_steps=STEPS):
            assert generate(stock).equal(plain)


def test_mask_without_padding_allows_sparse_attention():
    stock = cached_pipeline("wan")
    with attention_mask(stock, torch.ones(1, 1, 1, TOKENS, dtype=torch.bool)), enable_sparse(stock, density=1.0) as run:
        assert_near(generate(stock), generate_dense("wan"))
    assert run.report().sparse_calls == 12


def test_gradients_keep_attention_dense(caplog):
    stock = cached_pipeline("wan")
    arguments = first_transformer_call(stock)
    arguments["hidden_states"] = arguments["hidden_states"].clone().requires_grad_()
    out = stock.pipe.transformer(**arguments)[0]
    (expected,) = torch.autograd.grad(out.sum(), arguments["hidden_states"])
    with enable_sparse(stock.pipe.transformer, density=0.3, dense_steps=0) as run:
        again = stock.pipe.transformer(**arguments)[0]
        (gradient,) = torch.autograd.grad(again.sum(), arguments["hidden_states"])
        assert again.equal(out) and gradient.equal(expected)
        with torch.no_grad():
            assert not stock.pipe.transformer(**arguments)[0].equal(out)
    reason = "gradients are required, and the executors have no backward pass"
    assert run.report().dense_calls == {reason: 2} and run.report().sparse_calls == 2
    assert caplog.messages == [f"attention stays dense: {reason}"]
