"""What goes wrong when a plug-in meets diffusers: each known way, once."""

from __future__ import annotations

import inspect
import logging
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import (
    FirstBlockCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
    WanPipeline,
    WanTransformer3DModel,
)
from diffusers.models.attention_dispatch import attention_backend
from torch import Tensor
from torch.overrides import TorchFunctionMode

import dit_sparse as ds
import tiny_pipelines as tiny
from dit_sparse.engine.intercept import is_intercepted
from dit_sparse.kernels.calibration import CostModel
from dit_sparse.kernels.pick import Choice
from sparse_pipelines import (
    APART,
    STEPS,
    Drifting,
    assert_same_objects,
    built,
    calls_per_step,
    dense_latents,
    grids,
    latents,
    layers,
    near,
    sites,
    sparse,
    sparse_latents,
    trace,
    variant,
)

EVERY_2 = ds.Schedule(dense_steps=1, replan_interval=2, per_branch=True)


def stocks(*names: str):
    return pytest.mark.parametrize("stock", names, indirect=True)


def attentions(stock: tiny.Tiny) -> list[torch.nn.Module]:
    """The diverted modules, while there are any."""
    return [module for part in stock.transformers for module in part.modules() if is_intercepted(module)]


def first_call(stock: tiny.Tiny) -> dict:
    """The arguments of the first transformer call of a generation."""
    calls = []
    hook = stock.pipe.transformer.register_forward_pre_hook(
        lambda module, args, kwargs: calls.append(kwargs), with_kwargs=True
    )
    latents(stock)
    hook.remove()
    return calls[0]


# --- what reaches the model's own processor


def test_signatures_stay_visible(stock):
    """diffusers drops every keyword that a processor's __call__ does not name."""
    before = {
        module: inspect.signature(module.processor.__call__)
        for part in stock.transformers
        for module in part.modules()
        if hasattr(module, "processor")
    }
    with sparse(stock):
        assert len(attentions(stock)) == layers(stock) * len(stock.transformers)
        for module in attentions(stock):
            assert inspect.signature(module.processor.__call__) == before[module]
            assert isinstance(module.processor, type(module.processor).__mro__[1])


def test_no_keyword_is_dropped(stock, caplog):
    diffusers = logging.getLogger("diffusers")
    diffusers.addHandler(caplog.handler)
    try:
        sparse_latents(stock)
    finally:
        diffusers.removeHandler(caplog.handler)
    assert not [message for message in caplog.messages if "not expected" in message or "ignored" in message]


def test_methods_see_the_queries_that_the_model_attends_with(stock):
    """After projection, norm, text and rotary embedding: bit for bit those of the stock call."""

    class Spy(TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            if function is F.scaled_dot_product_attention:
                q, k = (args or tuple(kwargs.values()))[:2]
                calls.append((q, k)) if q.shape[2] == k.shape[2] == grids(stock)[0].tokens else None
            return function(*args, **(kwargs or {}))

    calls, seen = [], []
    with Spy():
        latents(stock)
    with sparse(stock, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: seen.append((q, k)))
        latents(stock)
    assert seen[0][0].equal(calls[0][0]) and seen[0][1].equal(calls[0][1])


def test_mochi_needs_no_set_processor():
    stock = built("mochi")
    module = stock.pipe.transformer.transformer_blocks[0].attn1
    assert not hasattr(module, "set_processor") and not hasattr(stock.pipe.transformer, "set_attn_processor")
    with sparse(stock):
        assert is_intercepted(module)


# --- Wan 2.2


def test_the_second_transformer_goes_on_with_the_steps():
    stock = built("wan22")
    places = {(site.step, site.branch.split()[0]) for site in sites(stock)}
    assert places == {(0, "transformer"), (1, "transformer"), (2, "transformer_2"), (3, "transformer_2")}
    with sparse(stock, density=0.3, dense_steps=3) as run:
        latents(stock)
    assert run.report().dense_calls == {"the schedule": 3 * calls_per_step(stock)}


@pytest.mark.parametrize("missing, ratio", [("transformer", 2.0), ("transformer_2", None)])
def test_either_transformer_may_be_missing(missing, ratio):
    stock = built("wan22")
    pipe = WanPipeline(**stock.pipe.components | {missing: None}, boundary_ratio=ratio)
    pipe.set_progress_bar_config(disable=True)
    other = dict(guidance_scale_2=None)
    stock = replace(stock, pipe=pipe)
    plain, before = latents(stock, **other), trace(stock)
    present = "transformer_2" if missing == "transformer" else "transformer"
    seen = sites(stock, other=other)
    assert {site.branch for site in seen} == {f"{present} cond 0", f"{present} uncond 0"}
    assert {site.step for site in seen} == set(range(STEPS))
    near(sparse_latents(stock, density=1.0, other=other), plain)
    assert_same_objects(trace(stock), before)


# --- one run, several shapes


@stocks("wan", "wan22", "hunyuan_video", "cogvideox", "cogvideox15", "mochi", "ltx")
def test_another_shape_is_planned_anew(stock):
    other = dict(num_frames=stock.kwargs()["num_frames"] - 2 * stock.strides[0], height=192, width=128)
    plain = dense_latents(stock.name), latents(stock, **other)
    for method, density, expected in [
        ("radial", 1.0, plain),
        ("window", 0.3, [sparse_latents(stock, "window", other=change) for change in ({}, other)]),
        (Drifting(), 0.3, [sparse_latents(stock, Drifting(), other=change) for change in ({}, other)]),
    ]:
        with sparse(stock, method, density=density) as run:
            for change, out in [({}, expected[0]), (other, expected[1]), ({}, expected[0])]:
                near(latents(stock, **change), out)
        shapes = {"x".join(map(str, grid)) for grid in (stock.grid, stock.grid_for(**other))}
        assert len(shapes) == 2
        assert {
            word for grid in run.report().grids for word in grid.split() if "x" in word and word != "text"
        } == shapes


# --- memory: per place, until the generation ends


@stocks("wan", "wan22", "hunyuan_video", "cogvideox", "mochi", "ltx")
def test_memory_is_kept_per_place_and_dropped_at_the_end(stock):
    method = Drifting()
    with sparse(stock, method, density=0.3, schedule=APART) as run:
        first, second = latents(stock), latents(stock)
        assert not run._plans._memory and not run._plans._made
    assert first.equal(second)
    for site, steps in method.log:
        begin = 2 if "transformer_2" in site.branch else 1
        assert steps == list(range(begin, site.step)), site
    assert len(method.log) == 2 * 3 * calls_per_step(stock)


@pytest.mark.parametrize("step", [0, 1, 2])
@stocks("wan", "wan22", "hunyuan_video", "mochi", "ltx")
def test_a_generation_that_fails_leaves_nothing_to_the_next(stock, step):
    def fail(pipe, now, timestep, kwargs):
        if now == step:
            raise KeyboardInterrupt
        return kwargs

    schedule = ds.Schedule(dense_steps=0, replan_interval=2)
    expected = sparse_latents(stock, Drifting(), schedule=schedule, dense_steps=0)
    method = Drifting()
    with sparse(stock, method, density=0.3, schedule=schedule, dense_steps=0):
        with pytest.raises(KeyboardInterrupt):
            latents(stock, seed=1, callback_on_step_end=fail)
        method.log.clear()
        assert latents(stock).equal(expected)
    assert method.log[0][1] == []


def test_failing_in_the_first_step_is_noticed_without_a_cache_context():
    def fail(pipe, now, timestep, kwargs):
        raise KeyboardInterrupt

    stock, method = variant("WanVideoToVideoPipeline"), Drifting()
    with sparse(stock, method, density=0.3, dense_steps=0, schedule=APART):
        with pytest.raises(KeyboardInterrupt):
            latents(stock, callback_on_step_end=fail)
        method.log.clear()
        latents(stock)
    assert {site.branch for site, _ in method.log} == {"transformer call 0 0", "transformer call 1 0"}
    assert all(steps == list(range(site.step)) for site, steps in method.log)


def test_an_interrupted_generation_leaves_nothing_to_the_next():
    stock = built("wan")

    def stop(pipe, now, timestep, kwargs):
        pipe._interrupt = True
        return kwargs

    expected = sparse_latents(stock, Drifting(), dense_steps=0)
    with sparse(stock, Drifting(), density=0.3, dense_steps=0) as run:
        latents(stock, seed=1, callback_on_step_end=stop)
        assert run.report().sparse_calls == calls_per_step(stock)
        assert latents(stock).equal(expected)


@pytest.mark.parametrize("call", [0, 1, 3])
@stocks("wan", "cogvideox")
def test_a_transformer_that_fails_leaves_nothing_to_the_next(stock, call):
    calls = iter(range(100))

    def fail(module, args):
        if next(calls) == call:
            raise KeyboardInterrupt

    expected = sparse_latents(stock, Drifting(), dense_steps=0)
    block = attentions_of(stock)[-1]
    with sparse(stock, Drifting(), density=0.3, dense_steps=0):
        hook = block.register_forward_pre_hook(fail)
        try:
            with pytest.raises(KeyboardInterrupt):
                latents(stock, seed=1)
        finally:
            hook.remove()
        assert latents(stock).equal(expected)


def attentions_of(stock: tiny.Tiny) -> list[torch.nn.Module]:
    with sparse(stock):
        return attentions(stock)


@stocks("wan", "cogvideox", "mochi")
def test_plans_are_kept_for_as_long_as_the_schedule_says(stock):
    """Mochi with equal text lengths: both batch items have one grid, and still each its own plan."""
    plans = {}
    with sparse(stock, Drifting(), density=0.3, schedule=EVERY_2) as run:
        run.observe(lambda site, q, k, plan: plans.setdefault((site.layer, site.branch), []).append(plan.index))
        latents(stock, lengths=(9,)) if stock.name == "mochi" else latents(stock)
    assert len(plans) == calls_per_step(stock)
    for first, second, third in plans.values():
        assert first is second and first is not third
    assert len({id(indices[0]) for indices in plans.values()}) == len(plans)


# --- batches


@stocks("cogvideox", "cogvideox15", "ltx", "mochi")
def test_every_item_of_a_batch_has_its_own_plan(stock):
    """Of a bare transformer nobody knows whether its batch holds the branches of guidance."""
    arguments, plans = first_call(stock), []
    tensors = {name for name, value in arguments.items() if isinstance(value, Tensor) and value.shape[:1] == (2,)}
    assert {"hidden_states", "encoder_hidden_states", "timestep"} <= tensors
    transformer = stock.pipe.transformer
    with torch.no_grad(), sparse(transformer, Drifting(), density=0.3, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: plans.append(plan))
        item = lambda i: {name: x[i : i + 1] if name in tensors else x for name, x in arguments.items()}
        alone = [transformer(**item(i))[0] for i in range(2)]
        plans.clear()
        together = transformer(**arguments)[0]
    near(together, torch.cat(alone))
    if stock.name == "mochi":
        assert [len(plan.index) for plan in plans] == [1, 1] * layers(stock)
    else:
        assert [len(plan.index) for plan in plans] == [2] * layers(stock)
        assert any(not plan.block_mask()[0].equal(plan.block_mask()[1]) for plan in plans)


@pytest.mark.parametrize("method", ["radial", "window", Drifting()], ids=["radial", "window", "dynamic"])
def test_padded_text_in_a_batch_is_as_if_alone(method):
    stock = built("hunyuan_video")
    both = stock.kwargs(lengths=(17, 9))
    prompts = {name for name in both if "prompt" in name}
    seeds = lambda: [torch.Generator().manual_seed(seed) for seed in (3, 4)]
    one = lambda i: {name: both[name][i : i + 1] for name in prompts}
    with sparse(stock, method, density=0.3) as run:
        together = latents(stock, lengths=(17, 9), generator=seeds())
        alone = [latents(stock, **one(i), generator=seeds()[i]) for i in range(2)]
        assert run.report().sparse_calls == 3 * 3 * calls_per_step(stock)
    near(together, torch.cat(alone), 1e-4)


@pytest.mark.parametrize("method", ["radial", "window", Drifting()], ids=["radial", "window", "dynamic"])
def test_the_content_of_padding_does_not_matter(method):
    stock = built("hunyuan_video")
    arguments = stock.kwargs(lengths=(17, 9))
    padding = ~arguments["prompt_attention_mask"].bool()
    noisy = arguments["prompt_embeds"].masked_fill(padding[..., None], 7.0)
    out = [
        sparse_latents(stock, method, other=dict(lengths=(17, 9), **change))
        for change in ({}, dict(prompt_embeds=noisy))
    ]
    near(*out, 1e-5)


# --- calls that stay dense, and say so


@pytest.fixture
def executors_are_quick(monkeypatch):
    monkeypatch.setattr(
        "dit_sparse.kernels.pick.cost_model", lambda name, kind: CostModel(100.0 if name == "dense" else 0.0, 0.0, 1e-9)
    )


@pytest.mark.parametrize("executor", ["gather", "auto"])
def test_short_sequences_stay_dense(stock, executor, executors_are_quick):
    plain = dense_latents(stock.name)
    with sparse(stock, density=0.3, min_tokens=10_000, executor=executor) as run:
        assert latents(stock).equal(plain)
    report = run.report()
    reason = "fewer than 10000 tokens"
    assert report.dense_calls == {"the schedule": calls_per_step(stock), reason: 3 * calls_per_step(stock)}
    assert (report.sparse_calls, report.density_achieved, report.density_run) == (0, None, 1.0)
    assert reason in str(report)


@pytest.mark.parametrize("name", ["wan", "hunyuan_video"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_auto_stays_dense_where_that_is_faster(name, dynamic, monkeypatch):
    """By measured costs, which are set here; unless a length from which on to be sparse is given."""
    stock, method, plain = built(name), Drifting() if dynamic else "radial", dense_latents(name)
    costs = {"dense": CostModel(0.0, 0.0, 1e-9)}
    slow = CostModel(1.0, 0.0, 1e-9)
    monkeypatch.setattr("dit_sparse.kernels.pick.cost_model", lambda name, _: costs.get(name, slow))
    settings = dict(dense_steps=0, block=16)
    with ds.enable(stock.pipe, method, **settings) as run:
        assert latents(stock).equal(plain)
    report, reason = run.report(), "faster here, by what was measured"
    assert report.sparse_calls == 0 and report.dense_calls == {reason: STEPS * calls_per_step(stock)}
    assert reason in str(report) and all(choice.startswith("dense: lowest estimated cost") for choice in report.choices)
    if dynamic:
        planned = [(site.layer, site.branch) for site, _ in method.log]
        assert 0 < len(planned) == len(set(planned)) <= 2 * layers(stock), "the plans of one step, then no more"
    with ds.enable(stock.pipe, method, min_tokens=0, **settings) as run:
        latents(stock)
    assert run.report().dense_calls == {}
    costs["dense"] = CostModel(100.0, 0.0, 1e-9)
    with ds.enable(stock.pipe, method, **settings) as run:
        latents(stock)
    assert run.report().dense_calls == {} and all(name in {"cpu", "gather"} for name in run.report().executors)


@dataclass(frozen=True, kw_only=True)
class OfDensity(ds.Method):
    """Random blocks, of a density that is told from outside."""

    now: list = field(default_factory=list, compare=False)

    def plan(self, q: Tensor, k: Tensor, site: ds.Site, memory: dict) -> ds.Plan:
        return ds.methods.method("random_blocks", density=self.now[-1]).plan(q, k, site, memory)


def test_what_auto_chooses_for_a_clip_does_not_depend_on_the_clip_before(monkeypatch):
    stock, costs, method = built("wan"), {"dense": 0.7, "gather": 1.0, "cpu": 2.0}, OfDensity()
    monkeypatch.setattr("dit_sparse.kernels.pick.cost_model", lambda name, kind: CostModel(0.0, 0.0, costs[name]))
    with ds.enable(stock.pipe, method, dense_steps=0, block=16) as run:
        for density, dense, sparse_ in ((0.9, 1, 0), (0.1, 1, 1), (0.9, 2, 1)):
            method.now.append(density)
            latents(stock)
            assert sum(run.report().dense_calls.values()) == dense * STEPS * calls_per_step(stock)
            assert run.report().sparse_calls == sparse_ * STEPS * calls_per_step(stock)


@pytest.mark.parametrize(
    "method, clips",
    [("radial", 1), (Drifting(density=0.3), 1), (ds.methods.method("radial"), 1), (Drifting(), 2)],
    ids=repr,
)
def test_auto_chooses_once_a_layer_and_again_for_a_clip_where_densities_vary(method, clips, monkeypatch):
    stock, picked = built("wan"), []
    monkeypatch.setattr(
        "dit_sparse.engine.run.pick", lambda *call, **more: picked.append(call) or Choice("gather", "it was told")
    )
    with ds.enable(stock.pipe, method, dense_steps=0, block=16):
        for _ in range(2):
            latents(stock)
    assert len(picked) == clips * layers(stock)


ALL_DENSE = dict(executor="auto", dense_steps=STEPS, block=16)


def test_dense_steps_run_by_an_executor_where_that_is_faster(stock, executors_are_quick):
    plain = dense_latents(stock.name)
    with sparse(stock, **ALL_DENSE) as run:
        near(latents(stock), plain, 1e-4)
    ((reason, calls),) = run.report().dense_calls.items()
    assert reason.startswith("the schedule, by the executor ") and calls == STEPS * calls_per_step(stock)
    assert reason.split()[-1] in {"cpu", "gather"} and run.report().sparse_calls == 0
    assert run.report().density_run == 1.0


@pytest.mark.parametrize(
    "method, settings", [("dense", {}), ("radial", {"executor": "gather"}), ("radial", {"executor": "cpu"})]
)
def test_dense_steps_are_untouched_for_the_baseline_and_a_named_executor(method, settings, executors_are_quick):
    """The baseline stays torch's own attention; a named executor was asked to compute the method's plans."""
    stock, plain = built("wan"), dense_latents("wan")
    with sparse(stock, method, **ALL_DENSE | settings) as run:
        assert latents(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule": STEPS * calls_per_step(stock)}


def test_dense_steps_are_untouched_where_an_executor_is_no_faster(monkeypatch):
    stock, plain = built("hunyuan_video"), dense_latents("hunyuan_video")
    costs = {"dense": CostModel(0.0, 0.0, 1e-9)}
    monkeypatch.setattr(
        "dit_sparse.kernels.pick.cost_model", lambda name, kind: costs.get(name, CostModel(0.0, 0.0, 1.1e-9))
    )
    with sparse(stock, **ALL_DENSE) as run:
        assert latents(stock).equal(plain)
    assert run.report().dense_calls == {"the schedule": STEPS * calls_per_step(stock)}


N = 5 * 5 * 7


def hole() -> Tensor:
    return torch.arange(N)[None, None, None] != 40


MASKS = {
    "hole": (hole, "leaves out tokens in the middle"),
    "no text": (lambda: (torch.arange(N) < 150)[None, None, None], "leaves out video tokens"),
    "additive": (lambda: torch.zeros(1, 1, 1, N).masked_fill(~hole(), -1e4), "additive"),
    "pairs": (lambda: torch.ones(N, N, dtype=torch.bool).tril(100)[None, None], "no padding mask over 175 keys"),
}


@contextmanager
def masked(stock: tiny.Tiny, mask: Tensor):
    """Wan, whose self-attention has no mask, with one."""
    hooks = [
        block.attn1.register_forward_pre_hook(lambda module, args: (*args[:2], mask, *args[3:]))
        for block in stock.pipe.transformer.blocks
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("mask, words", MASKS.values(), ids=MASKS)
def test_a_mask_that_is_no_padding_stays_dense(mask, words, caplog):
    stock = built("wan")
    with masked(stock, mask()):
        plain = latents(stock)
        with sparse(stock, density=0.3) as run:
            assert latents(stock).equal(plain)
    assert not plain.equal(dense_latents("wan"))
    (reason,) = run.report().dense_calls.keys() - {"the schedule"}
    assert words in reason and run.report().dense_calls[reason] == 12 and run.report().sparse_calls == 0
    warnings = [record for record in caplog.records if record.name == "dit_sparse"]
    assert [record.getMessage() for record in warnings] == [f"attention stays dense: {reason}"]


def test_a_mask_that_is_no_padding_is_heard_in_dense_steps(executors_are_quick):
    stock = built("wan")
    with masked(stock, hole()):
        plain = latents(stock)
        with sparse(stock, **ALL_DENSE):
            assert latents(stock).equal(plain)


def test_a_mask_that_keeps_all_is_no_obstacle():
    stock = built("wan")
    with masked(stock, torch.ones(1, 1, 1, N, dtype=torch.bool)), sparse(stock, density=1.0) as run:
        near(latents(stock), dense_latents("wan"))
    assert run.report().sparse_calls == 12


def test_gradients_keep_attention_dense(caplog):
    stock = built("wan")
    arguments = first_call(stock)
    arguments["hidden_states"] = arguments["hidden_states"].clone().requires_grad_()
    out = stock.pipe.transformer(**arguments)[0]
    (expected,) = torch.autograd.grad(out.sum(), arguments["hidden_states"])
    with sparse(stock.pipe.transformer, density=0.3, dense_steps=0) as run:
        again = stock.pipe.transformer(**arguments)[0]
        (gradient,) = torch.autograd.grad(again.sum(), arguments["hidden_states"])
        assert again.equal(out) and gradient.equal(expected)
        with torch.no_grad():
            assert not stock.pipe.transformer(**arguments)[0].equal(out)
    reason = "gradients are asked for, and the executors have no backward pass"
    assert run.report().dense_calls == {reason: 2} and run.report().sparse_calls == 2
    assert caplog.messages == [f"attention stays dense: {reason}"]


# --- half precision, and the user's own choices


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("name", ["wan", "wan22_5b_i2v", "hunyuan_video", "cogvideox", "mochi", "ltx"])
def test_half_precision_stays_half(name, dtype):
    stock = tiny.ALL[name]()
    for part in stock.transformers:
        part.to(dtype)
    other = {key: x.to(dtype) for key, x in stock.kwargs().items() if key.endswith("embeds")}
    plain = latents(stock, **other)
    seen, dtypes = [], set()
    with sparse(stock, density=1.0) as run:
        run.observe(lambda site, q, k, plan: seen.append(site.step))
        for module in attentions(stock):
            module.register_forward_hook(
                lambda module, args, out: dtypes.update(x.dtype for x in (out if isinstance(out, tuple) else [out]))
            )
        out = latents(stock, **other)
    assert dtypes == {dtype} and out.dtype == plain.dtype
    assert sorted(set(seen)) == [1, 2, 3] and run.report().sparse_calls == 3 * calls_per_step(stock)
    assert float((out - plain).norm() / plain.norm()) < (0.02 if dtype == torch.float16 else 0.1)


@contextmanager
def backend(transformer: torch.nn.Module, name: str):
    with attention_backend("native"):  # set_attention_backend changes the whole process, reset does not change it back
        transformer.set_attention_backend(name)
        try:
            yield
        finally:
            transformer.reset_attention_backend()


@pytest.mark.parametrize("name", ["native", "_native_math"])
@stocks("wan", "hunyuan_video", "ltx")
def test_the_users_attention_backend_comes_back(stock, name):
    transformer = stock.pipe.transformer
    chosen = lambda: [getattr(p, "_attention_backend", None) for p in transformer.attn_processors.values()]
    unset = chosen()
    with backend(transformer, name):
        plain, with_backend = latents(stock), chosen()
        assert with_backend != unset
        with sparse(stock, density=1.0) as run:
            near(latents(stock), plain)
            assert chosen() == with_backend
        assert run.report().sparse_calls == 3 * calls_per_step(stock)
        (reason,) = run.report().dense_calls
        assert reason == ("the schedule" if name == "native" else "the schedule, by the backend _native_math")
        assert run.report().density_run == pytest.approx(1.0)
    assert chosen() == unset
    run = sparse(stock, density=0.3)
    with backend(transformer, name):
        latents(stock)
        assert chosen() == with_backend
        run.disable()
        assert chosen() == with_backend
    assert chosen() == unset
    assert latents(stock).equal(dense_latents(stock.name))


# --- with what else people switch on


@pytest.fixture
def fresh_compiler():
    yield
    torch.compiler.reset()


PAB = PyramidAttentionBroadcastConfig(
    spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000)
)
CPU = torch.device("cpu")
BESIDE = {
    "torch.compile": lambda pipe: setattr(pipe, "transformer", torch.compile(pipe.transformer, backend="eager")),
    "group offload": lambda pipe: pipe.transformer.enable_group_offload(CPU, CPU, "leaf_level"),
    "layerwise casting": lambda pipe: pipe.transformer.enable_layerwise_casting(torch.float16, torch.float32),
    "fused projections": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "attention broadcast": lambda pipe: pipe.transformer.enable_cache(
        replace(PAB, current_timestep_callback=lambda: pipe.current_timestep)
    ),
    "TaylorSeer": lambda pipe: pipe.transformer.enable_cache(TaylorSeerCacheConfig(cache_interval=2)),
}


@pytest.mark.parametrize("first", ["it", "us"])
@pytest.mark.parametrize("switch", BESIDE.values(), ids=BESIDE)
def test_density_1_changes_nothing_beside(switch, first, fresh_compiler):
    plain, stock = tiny.ALL["wan"](), tiny.ALL["wan"]()
    switch(plain.pipe)
    expected = latents(plain)
    if first == "it":
        switch(stock.pipe)
    with sparse(stock, density=1.0) as run:
        if first == "us":
            switch(stock.pipe)
        near(latents(stock), expected)
    assert run.report().sparse_calls >= calls_per_step(built("wan"))
    assert latents(stock).equal(expected)


@pytest.mark.parametrize("first", ["compile", "enable"])
def test_compiled_blocks_give_the_same(first, fresh_compiler):
    stock = tiny.ALL["wan"]()
    expected = sparse_latents(stock)
    compile = lambda: stock.pipe.transformer.compile_repeated_blocks(fullgraph=False, backend="eager")
    if first == "compile":
        compile()
    with sparse(stock, density=0.3) as run:
        if first == "enable":
            compile()
        near(latents(stock), expected)
    near(latents(stock), dense_latents("wan"))
    assert run.report().sparse_calls == 3 * calls_per_step(stock)


@stocks("wan", "hunyuan_video", "ltx")
def test_first_block_cache_runs_beside_it(stock):
    transformer = stock.pipe.transformer
    before, seen = trace(stock), []
    with sparse(stock, density=0.3, dense_steps=0) as run:
        run.observe(lambda site, q, k, plan: seen.append((site.step, site.layer)))
        transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
        try:
            cached = latents(stock)
            again = latents(stock)
        finally:
            transformer.disable_cache()
    assert cached.isfinite().all() and again.equal(cached) and not cached.equal(sparse_latents(stock, dense_steps=0))
    expected = {(0, layer) for layer in range(layers(stock))} | {(step, 0) for step in range(STEPS)}
    assert set(seen) == expected
    assert latents(stock).equal(dense_latents(stock.name))
    assert {key for key in trace(stock).keys() - before.keys() if "processor" in key} == set()


def test_a_cache_switched_on_first_survives():
    stock = tiny.ALL["wan"]()
    transformer = stock.pipe.transformer
    transformer.enable_cache(FirstBlockCacheConfig(threshold=10.0))
    cached = latents(stock)
    with sparse(stock, density=1.0):
        near(latents(stock), cached)
    assert latents(stock).equal(cached)
    transformer.disable_cache()
    assert latents(stock).equal(dense_latents("wan"))


def test_saving_while_enabled_saves_the_model(tmp_path):
    stock = built("wan")
    transformer = stock.pipe.transformer
    state = {name: x.clone() for name, x in transformer.state_dict().items()}
    with sparse(stock, density=0.3):
        latents(stock)
        assert transformer.state_dict().keys() == state.keys()
        transformer.save_pretrained(tmp_path)
    loaded = WanTransformer3DModel.from_pretrained(tmp_path).state_dict()
    assert loaded.keys() == state.keys() and all(loaded[name].equal(state[name]) for name in state)
