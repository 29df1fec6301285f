"""Context parallelism: several processes compute what one does, with the heads of each rank."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.multiprocessing
from torch import Tensor

import dit_sparse as ds
from dit_sparse.engine.forward import TokenLayout
from dit_sparse.engine.interception.parallel import joint_order
from dit_sparse.methods import method
from tiny_models import Call, tiny_models

SETTINGS = dict(dense_steps=0, min_tokens=0, block=16, executor="reference")
MODELS = {
    "WanTransformer3DModel": (4, 8, 8),
    "FluxTransformer2DModel": (1, 12, 16),
    "QwenImageTransformer2DModel": (1, 8, 12),
}
HEADS = 4
SHARE_SCORES = {"dhsa", "proxyattn", "token_select"}  # plan from all heads of a rank together, as in their papers
IMPORTED_ONCE = [f"diffusers.models.transformers.transformer_{name}" for name in ("wan", "flux", "qwenimage")]
PROFILE = ds.PerHead(
    methods=(("a", method("radial", density=0.4)), ("b", method("asa", density=0.6))), layers=("abba", "baaa")
)


def methods(name: str, ranks: int) -> dict[str, ds.Method]:
    """Return the methods to test on a model: on Wan, where a clip has several frames, all of them on two ranks, and one
    of each kind on four."""
    names = ("window", "svg2")
    if name == "WanTransformer3DModel":
        names = ds.METHODS if ranks == 2 else ("radial", "svg", "asa", "svg2", "adaspa", "routed")
    profile = {"profile": PROFILE} if name == "WanTransformer3DModel" else {}
    return {name: method(name, **({} if name == "dense" else {"density": 0.5})) for name in names} | profile


def call_of(name: str) -> Call:
    lengths = (16, 9) if tiny_models()[name].masked else ()
    return Call(MODELS[name], batch=2, slots=16, lengths=lengths)


def build(name: str) -> torch.nn.Module:
    tiny = tiny_models()[name]
    return replace(tiny, config=tiny.config | {"num_attention_heads": HEADS}).build()


def outputs(transformer: torch.nn.Module, name: str, ranks: int) -> dict[str, Tensor]:
    """Return the output of a forward call with every method."""
    results = {}
    for title, one in methods(name, ranks).items():
        with torch.no_grad(), ds.enable(transformer, one, **SETTINGS) as run:
            results[title] = transformer(**tiny_models()[name].arguments(call_of(name)), return_dict=False)[0]
        report = run.report()
        assert title == "dense" or (report.sparse_calls > 0 and not report.dense_calls), (name, title, report)
    return results


def work(rank: int, ranks: int, folder: str) -> None:
    """Compute all outputs in one of several processes."""
    from diffusers import ContextParallelConfig

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU is no accelerator
    results = {}
    for name in MODELS:
        transformer = build(name)
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=ranks))
        results[name] = outputs(transformer, name, ranks)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path):
    expected = {name: outputs(build(name), name, ranks) for name in MODELS}
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    torch.multiprocessing.start_processes(work, (ranks, str(tmp_path)), ranks, start_method="forkserver")
    for rank in range(ranks):
        results = torch.load(tmp_path / f"{rank}.pt")
        different = [
            (name, title, float((results[name][title] - out).abs().max()))
            for name, outs in expected.items()
            for title, out in outs.items()
            if title not in SHARE_SCORES and not torch.allclose(results[name][title], out, atol=1e-4, rtol=1e-4)
        ]
        assert not different


def test_ring_attention_is_refused():
    transformer = build("WanTransformer3DModel")
    ring = type("Config", (), {"context_parallel_config": type("Ring", (), {"ring_degree": 2, "ulysses_degree": 1})})
    transformer._parallel_config = ring
    with pytest.raises(ValueError, match="ring attention is not supported"):
        ds.enable(transformer, "radial", **SETTINGS)
    transformer._parallel_config = None
    with ds.enable(transformer, "radial", **SETTINGS):
        transformer._parallel_config = ring
        with pytest.raises(ValueError, match="ring attention is not supported"):
            transformer(**tiny_models()["WanTransformer3DModel"].arguments(call_of("WanTransformer3DModel")))
    transformer._parallel_config = None


@pytest.mark.parametrize("before, after, references", [(0, 6, 0), (6, 0, 0), (5, 7, 0), (6, 3, 2)])
@pytest.mark.parametrize("ranks", [2, 3])
def test_joint_order_undoes_the_split(ranks, before, after, references):
    """Each rank holds a part of the text, of the references and video, and of the text again."""
    layout = TokenLayout(2, 3, 4, references_before=references)
    grid = ds.Grid(2, 3, 4, before + references, after)
    tokens = torch.arange(grid.tokens)
    parts = tokens.split([before, references + 24, after])
    exchanged = torch.cat([part.tensor_split(ranks)[rank] for rank in range(ranks) for part in parts])
    assert exchanged[joint_order(ranks, grid, layout, tokens.device)].equal(tokens)
    assert joint_order(ranks, ds.Grid(2, 3, 4, references), layout, tokens.device) is None
