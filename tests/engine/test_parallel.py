"""Context parallelism: several processes compute what one does, with the heads of each rank."""

from __future__ import annotations

import multiprocessing
import os
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from types import SimpleNamespace

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


@dataclass(frozen=True)
class Case:
    """A tiny model under context parallelism.

    Attributes:
        name: its class.
        grid: frames, height and width in tokens.
        heads: attention heads.
        slots: text tokens, with padding.
        anything: whether heads and text tokens are not divisible by the ranks. Video tokens are, because gloo gathers
            equal sizes only.
    """

    name: str
    grid: tuple[int, int, int]
    heads: int = 4
    slots: int = 16
    anything: bool = False

    def build(self) -> torch.nn.Module:
        tiny = tiny_models()[self.name]
        return replace(tiny, config=tiny.config | {"num_attention_heads": self.heads}).build()

    def arguments(self) -> dict:
        tiny = tiny_models()[self.name]
        call = Call(self.grid, batch=2, slots=self.slots, lengths=(self.slots, 9) if tiny.masked else ())
        if self.name in ("CogVideoXTransformer3DModel", "ConsisIDTransformer3DModel"):
            angles = torch.arange(prod(self.grid))[:, None] / torch.arange(1, 17)
            return tiny.arguments(call) | {"image_rotary_emb": (angles.cos(), angles.sin())}
        return tiny.arguments(call)


CASES = {
    "wan": Case("WanTransformer3DModel", (4, 8, 8)),
    "flux": Case("FluxTransformer2DModel", (1, 12, 16)),
    "qwen": Case("QwenImageTransformer2DModel", (1, 8, 12)),
    "hunyuan": Case("HunyuanVideoTransformer3DModel", (4, 4, 8)),
    "cogvideox": Case("CogVideoXTransformer3DModel", (4, 4, 8)),
    "consisid": Case("ConsisIDTransformer3DModel", (4, 4, 8)),
    "odd hunyuan": Case("HunyuanVideoTransformer3DModel", (3, 4, 8), 7, 15, anything=True),
    "odd cogvideox": Case("CogVideoXTransformer3DModel", (3, 4, 8), 7, 15, anything=True),
}
SHARE_SCORES = {"dhsa", "proxyattn", "token_select"}  # plan from all heads of a rank together, as in their papers
IMPORTED_ONCE = [
    f"diffusers.models.transformers.{name}"
    for name in ("transformer_wan", "transformer_flux", "transformer_hunyuan_video", "cogvideox_transformer_3d")
]
PROFILE = ds.PerHead(
    methods=(("a", method("radial", density=0.4)), ("b", method("asa", density=0.6))), layers=("abba", "baaa")
)


def methods(case: Case, ranks: int) -> dict[str, ds.Method]:
    """Return the methods to test on a model: on Wan all of them on two ranks and some on four; on the others one of
    each kind."""
    names, profile = ("dense", "window", "svg2"), {"profile": PROFILE} if case.heads == 4 else {}
    if case.name == "WanTransformer3DModel":
        names = ds.METHODS if ranks == 2 else ("radial", "svg", "asa", "svg2", "adaspa", "routed")
    elif case.grid[0] == 1:
        profile = {}
    return {name: method(name, **({} if name == "dense" else {"density": 0.5})) for name in names} | profile


def outputs(transformer: torch.nn.Module, case: Case, ranks: int) -> dict[str, Tensor]:
    """Return the output of a forward call without sparse attention, and with every method."""
    compute = torch.no_grad()(lambda: transformer(**case.arguments(), return_dict=False)[0])
    results = {"stock": compute()}
    for title, one in methods(case, ranks).items():
        with ds.enable(transformer, one, **SETTINGS) as run:
            results[title] = compute()
        report = run.report()
        assert title == "dense" or (report.sparse_calls > 0 and not report.dense_calls), (case, title, report)
    return results | {"restored": compute()}


def work(rank: int, ranks: int, folder: str) -> None:
    """Compute all outputs in one of several processes."""
    from diffusers import ContextParallelConfig

    os.environ |= {"MASTER_ADDR": "127.0.0.1", "RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_RANK": str(rank)}
    store = torch.distributed.FileStore(f"{folder}/store", ranks)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=ranks)
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers divides by it, and a CPU is no accelerator
    results = {}
    for title, case in CASES.items():
        transformer = case.build()
        config = ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=case.anything)
        ds.enable_parallelism(transformer, config)
        results[title] = outputs(transformer, case, ranks)
    torch.save(results, f"{folder}/{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


@pytest.mark.parametrize("ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_compute_what_one_process_does(ranks: int, tmp_path: Path):
    expected = {title: outputs(case.build(), case, ranks) for title, case in CASES.items()}
    multiprocessing.set_forkserver_preload(IMPORTED_ONCE)
    torch.multiprocessing.start_processes(work, (ranks, str(tmp_path)), ranks, start_method="forkserver")
    for rank in range(ranks):
        results = torch.load(tmp_path / f"{rank}.pt")
        different = [
            (case, title, float((results[case][title] - out).abs().max()))
            for case, outs in expected.items()
            for title, out in outs.items()
            if title not in SHARE_SCORES and not torch.allclose(results[case][title], out, atol=1e-4, rtol=1e-4)
        ]
        assert not different


def parallel_config(**degrees: int) -> SimpleNamespace:
    return SimpleNamespace(**{"ring_degree": 1, "ulysses_degree": 1, "ulysses_anything": False} | degrees)


def test_ring_attention_is_refused():
    case = CASES["wan"]
    transformer, ring = case.build(), SimpleNamespace(context_parallel_config=parallel_config(ring_degree=2))
    with pytest.raises(ValueError, match="ring attention is not supported"):
        ds.enable_parallelism(transformer, ring)
    transformer._parallel_config = ring
    with pytest.raises(ValueError, match="ring attention is not supported"):
        ds.enable(transformer, "radial", **SETTINGS)
    transformer._parallel_config = None
    with ds.enable(transformer, "radial", **SETTINGS):
        transformer._parallel_config = ring
        with pytest.raises(ValueError, match="ring attention is not supported"):
            transformer(**case.arguments())


@pytest.mark.parametrize(
    "case, changes, message",
    [
        (CASES["hunyuan"], {"image_condition_type": "token_replace"}, "modulate the tokens of the first frame"),
        (Case("MochiTransformer3DModel", (4, 4, 8)), {}, "neither diffusers nor its family has a plan"),
        (replace(CASES["cogvideox"], heads=3), {}, "3 heads .* cannot be divided evenly by ulysses_degree=2"),
    ],
)
def test_models_without_a_plan_are_refused(case, changes, message):
    transformer = case.build()
    transformer.register_to_config(**changes)
    processors = [module.processor for module in transformer.modules() if hasattr(module, "processor")]
    with pytest.raises(ValueError, match=message):
        ds.enable_parallelism(transformer, parallel_config(ulysses_degree=2))
    assert processors == [module.processor for module in transformer.modules() if hasattr(module, "processor")]


def test_processors_that_attend_to_one_rank_only_are_refused():
    """diffusers accepts a ``cp_plan`` for CogVideoX, whose processors exchange nothing."""
    transformer = CASES["cogvideox"].build()
    transformer._parallel_config = SimpleNamespace(context_parallel_config=parallel_config(ulysses_degree=2))
    with pytest.raises(ValueError, match=r"CogVideoXAttnProcessor2_0 would .* call dit_sparse.enable_parallelism"):
        ds.enable(transformer, "radial", **SETTINGS)


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
