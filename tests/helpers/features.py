"""Features of diffusers that change a transformer, and what becomes of each together with sparse attention.

``python tests/helpers/features.py`` writes ``eval/results/cpu/features.json``; then
``python -m dit_sparse.eval.report.readme`` fills the table of docs/models.md.
"""

from __future__ import annotations

import copy
import functools
import logging
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor, nn

import dit_sparse as ds
from dit_sparse.output.environment import conditions
from dit_sparse.output.files import save_json
from tiny_models import Call, TinyModel, first_output, tiny_model, tiny_models

SETTINGS = dict(dense_steps=0, min_tokens=0, block=16, executor="reference")
TIMESTEPS = (900.0, 600.0, 300.0)
MODELS = (
    "WanTransformer3DModel", "SkyReelsV2Transformer3DModel", "HunyuanVideoTransformer3DModel",
    "HunyuanVideo15Transformer3DModel", "HunyuanVideoFramepackTransformer3DModel", "HeliosTransformer3DModel",
    "CogVideoXTransformer3DModel", "MochiTransformer3DModel", "LTXVideoTransformer3DModel",
    "LTX2VideoTransformer3DModel", "CosmosTransformer3DModel", "Kandinsky5Transformer3DModel",
    "FluxTransformer2DModel", "Flux2Transformer2DModel", "QwenImageTransformer2DModel", "SD3Transformer2DModel",
    "ZImageTransformer2DModel",
)  # fmt: skip
TARGET = Path(__file__).parents[2] / "eval" / "results" / "cpu" / "features.json"
ORDERS = ("feature first", "sparse attention first")
CPU = torch.device("cpu")


def cache(name: str, **settings) -> Callable[[nn.Module], None]:
    """Return the function that enables one of diffusers' caches."""

    def enable_cache(transformer: nn.Module) -> None:
        import diffusers.hooks

        transformer.enable_cache(getattr(diffusers.hooks, f"{name}Config")(**settings))

    return enable_cache


def add_lora(transformer: nn.Module) -> None:
    from peft import LoraConfig

    transformer.add_adapter(LoraConfig(r=2, target_modules=r".*\.(to_q|to_k|to_v|to_query|to_key|to_value)"))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in transformer.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1, generator=generator)
    transformer.requires_grad_(False)


def fuse_lora(transformer: nn.Module) -> None:
    add_lora(transformer)
    transformer.fuse_lora()


def quantize(transformer: nn.Module) -> None:
    from optimum import quanto

    quanto.quantize(transformer, weights=quanto.qint8)
    quanto.freeze(transformer)


def skip_layer(transformer: nn.Module) -> None:
    from diffusers.hooks import LayerSkipConfig, apply_layer_skip

    blocks = ("transformer_blocks", "blocks", "layers", "visual_transformer_blocks")
    fqn = next(name for name in blocks if hasattr(transformer, name))
    apply_layer_skip(transformer, LayerSkipConfig(indices=[0], fqn=fqn, dropout=1.0))


BROADCAST = dict(spatial_attention_block_skip_range=2, spatial_attention_timestep_skip_range=(0, 1000))

FEATURES: dict[str, Callable[[nn.Module], None]] = {
    "fused projections": lambda transformer: transformer.fuse_qkv_projections(),
    "LoRA": add_lora,
    "fused LoRA": fuse_lora,
    "layerwise casting": lambda transformer: transformer.enable_layerwise_casting(torch.float16, torch.float32),
    "group offload": lambda transformer: transformer.enable_group_offload(CPU, CPU, "leaf_level"),
    "int8 weights (quanto)": quantize,
    "attention backend": lambda transformer: transformer.set_attention_backend("_native_math"),
    "FirstBlockCache": cache("FirstBlockCache", threshold=0.05),
    "TaylorSeer": cache("TaylorSeerCache", cache_interval=2),
    "MagCache": cache("MagCache", num_inference_steps=len(TIMESTEPS), mag_ratios=torch.ones(len(TIMESTEPS))),
    "attention broadcast": cache("PyramidAttentionBroadcast", **BROADCAST, current_timestep_callback=lambda: 500),
    "layer skip": skip_layer,
    "gradient checkpointing": lambda transformer: transformer.enable_gradient_checkpointing(),
}


def generate(tiny: TinyModel, transformer: nn.Module, steps: int = len(TIMESTEPS)) -> list[Tensor]:
    """Return the outputs of a few steps, in the cache context of diffusers where the transformer has one."""
    outputs = []
    for timestep in TIMESTEPS[:steps]:
        arguments = tiny.arguments(Call(tiny.grids[0]))
        name = next(name for name in ("timestep", "t", "timesteps") if name in arguments)
        arguments[name] = arguments[name] / 500 * timestep
        context = transformer.cache_context("cond") if hasattr(transformer, "cache_context") else nullcontext()
        with context:
            outputs.append(first_output(transformer(**arguments, return_dict=False)))
    return outputs


@functools.cache
def _with_feature(name: str, feature: str) -> list[Tensor] | str:
    """Return the outputs with a feature alone, or the error of diffusers."""
    transformer = copy.deepcopy(tiny_model(name))
    try:
        FEATURES[feature](transformer)
        return generate(tiny_models()[name], transformer)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@torch.no_grad()
def verdict(name: str, feature: str, order: str) -> str:
    """Return what happens to a feature and sparse attention together.

    Returns:
        "right": density 1 gives the output of the feature alone, a density of 0.5 is met, and `disable` leaves the
        feature alone; "dense": the output is right, but no call was sparse, which the report says; "-": diffusers does
        not support the feature for this class; otherwise what is wrong.
    """
    expected = _with_feature(name, feature)
    if isinstance(expected, str):
        return "-"
    tiny = tiny_models()[name]
    sparse = True
    for density, steps in ((1.0, len(TIMESTEPS)), (0.5, 1)):
        transformer = copy.deepcopy(tiny_model(name))
        if order == ORDERS[0]:
            FEATURES[feature](transformer)
        with ds.enable(transformer, "random_blocks", density=density, **SETTINGS) as run:
            if order == ORDERS[1]:
                FEATURES[feature](transformer)
            outputs = generate(tiny, transformer, steps)
        report = run.report()
        sparse = sparse and report.sparse_calls > 0
        if density == 1.0 and not _close(outputs, expected):
            return "wrong at density 1"
        if density == 0.5 and report.sparse_calls and abs(report.density_achieved - 0.5) > 0.02:
            return f"density {report.density_achieved:.2f} for 0.5"
    if not sparse:
        return "dense" if report.dense_calls else "silently dense"
    return "right" if _is_left_alone(name, feature) else "wrong after disable"


@functools.cache
def _is_left_alone(name: str, feature: str) -> bool:
    """Return whether a feature gives the same output after sparse attention was enabled and disabled."""
    transformer = copy.deepcopy(tiny_model(name))
    FEATURES[feature](transformer)
    with ds.enable(transformer, "random_blocks", density=0.5, **SETTINGS):
        pass
    return _close(generate(tiny_models()[name], transformer), _with_feature(name, feature))


def verdicts(name: str, feature: str) -> str:
    """Return the verdict, or both if the order in which feature and sparse attention are enabled matters."""
    return " / ".join(dict.fromkeys(verdict(name, feature, order) for order in ORDERS))


def _close(outputs: list[Tensor], expected: list[Tensor]) -> bool:
    pairs = zip(outputs, expected, strict=True)
    return all(torch.allclose(x.float(), y.float(), rtol=1e-3, atol=1e-4 * float(y.abs().max())) for x, y in pairs)


if __name__ == "__main__":
    logging.disable(logging.WARNING)
    cells = {feature: {name: verdicts(name, feature) for name in MODELS} for feature in FEATURES}
    save_json(TARGET, {**conditions("cpu"), "settings": SETTINGS, "cells": cells})
