"""`enable_parallelism`: context parallelism for the families that diffusers has no plan for, too."""

from __future__ import annotations

import re
from functools import cache, partial
from typing import Any

import torch
from torch import nn

from ..pipelines.family import Family, ParallelPlan, class_names
from .interception.forward_hook import HookCallback
from .interception.intercept import interception_of
from .interception.parallel import check_parallelism, refuse_ring
from .interception.parallel_processor import parallel_class, replace_class
from .transformers import find_transformers


def enable_parallelism(model: Any, config: Any) -> None:
    """Split the tokens of a transformer over several processes by Ulysses context parallelism.

    Every process runs the same script with the same seed, for instance under ``torchrun``, after
    ``torch.distributed.init_process_group``. Transformers that have a plan in diffusers are enabled by their own method
    of this name. For HunyuanVideo, CogVideoX and ConsisID the plan is that of their family, and their processors are
    replaced by ones that exchange tokens. Sparse attention may be enabled before or after.

    Args:
        model: a pipeline, all of whose transformers are split, or a transformer.
        config: a ``diffusers.ContextParallelConfig(ulysses_degree=...)``. Without ``ulysses_anything=True``, the text
            tokens, the video tokens and the heads must each be divisible by the degree.

    Raises:
        ValueError: the configuration uses ring attention, the heads are not divisible by the degree, or a transformer
            has no plan, with the reason.

    Example:
        >>> pipe = HunyuanVideoPipeline.from_pretrained("hunyuanvideo-community/HunyuanVideo").to("cuda")
        >>> dit_sparse.enable_parallelism(pipe, ContextParallelConfig(ulysses_degree=2))
        >>> run = dit_sparse.enable(pipe)
    """
    config = getattr(config, "context_parallel_config", config)
    if not hasattr(config, "ulysses_degree"):
        raise ValueError(f"config must be a diffusers.ContextParallelConfig, got {type(config).__name__}")
    refuse_ring(config)
    # All transformers are checked before the first one is changed.
    found = [(transformer, family) for _, _, transformer, family in find_transformers(model, None)]
    parts = [(transformer, _plan(transformer, family), family) for transformer, family in found]
    for transformer, family in found:
        _check_heads(transformer, family, config)
    for transformer, plan, family in parts:
        if plan is None:
            transformer.enable_parallelism(config=config)
        else:
            _enable(transformer, plan, family, config)


def _plan(transformer: nn.Module, family: Any) -> ParallelPlan | None:
    """Return the plan of the family, or None if the class has one in diffusers.

    Raises:
        ValueError: there is no plan, with the reason.
    """
    name, hint = type(transformer).__name__, ""
    if getattr(transformer, "_parallel_config", None) is not None:
        raise ValueError(f"context parallelism of {name} is enabled already")
    if getattr(transformer, "_cp_plan", None) is not None:
        return None
    plan = None
    if isinstance(family, Family):
        plan = family.parallel_plan(class_names(type(transformer)), transformer.config)
    if plan is None or isinstance(plan, str):
        hint = f": {plan}" if plan else ": neither diffusers nor its family has a plan for it"
        raise ValueError(f"{name} does not support context parallelism{hint}")
    return plan


def _sites(transformer: nn.Module, family: Family) -> list[nn.Module]:
    return [module for path, module in transformer.named_modules() if re.fullmatch(family.sites, path)]


def _check_heads(transformer: nn.Module, family: Any, config: Any) -> None:
    heads, ranks = getattr(_sites(transformer, family)[0], "heads", 0), config.ulysses_degree
    share = -(-heads // ranks)
    missing = share * ranks - heads
    if missing and not config.ulysses_anything:
        raise ValueError(
            f"the {heads} heads of {type(transformer).__name__} cannot be divided evenly by ulysses_degree={ranks}; "
            "choose a divisor, or set ulysses_anything=True"
        )
    if missing and missing >= share:
        raise ValueError(
            f"the {heads} heads of {type(transformer).__name__} are too few for ulysses_degree={ranks}: "
            f"diffusers gives every rank {share} of them, which leaves the last rank without"
        )


def _enable(transformer: nn.Module, plan: ParallelPlan, family: Family, config: Any) -> None:
    sites = _sites(transformer, family)
    class_of = cache(partial(parallel_class, config=config, text=family.text, mask_argument=family.mask))
    processors = []
    for module in sites:
        interception = interception_of(module)
        stock = module.processor if interception is None else interception.stock_processor
        processors.append(replace_class(stock, class_of(type(stock))))
    transformer.enable_parallelism(config=config, cp_plan=_to_diffusers(plan))
    for module, processor in zip(sites, processors, strict=True):
        processor._parallel_config = transformer._parallel_config
        module.processor = processor  # an interception is installed again at the next forward call
    transformer.register_forward_pre_hook(HookCallback(partial(_check, sites)))


def _check(sites: list[nn.Module], transformer: nn.Module, *_: Any) -> None:
    if not torch.compiler.is_compiling():
        check_parallelism(transformer, sites)


def _to_diffusers(plan: ParallelPlan) -> dict[str, Any]:
    """Return a plan in the form of diffusers."""
    from diffusers.models._modeling_parallel import ContextParallelInput, ContextParallelOutput

    def split(name: str | int, dim: int | tuple[int, ...]) -> Any:
        if isinstance(dim, tuple):
            return [split(name, one) for one in dim]
        return ContextParallelInput(split_dim=dim, split_output=isinstance(name, int))

    def entry(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: split(name, dim) for name, dim in value.items()}
        dims = value if isinstance(value, tuple) else (value,)
        return [ContextParallelOutput(gather_dim=dim) for dim in dims]

    return {name: entry(value) for name, value in plan.items()}
