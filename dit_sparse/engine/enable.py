"""Turning a pipeline sparse and back."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from torch import nn

from ..kernels.executors import executor as executor_named
from ..method import Method
from ..methods import method as method_named
from ..pipelines.family import Family, SetAttnProcessor, family_of
from ..schedule import Schedule
from .run import Run, Settings

if TYPE_CHECKING:
    from ..profiling.head_profile import Profile

DEFAULT_DENSITY = 0.25


class SparseAttnProcessor:
    """What to do, as a value: for ``pipe.set_attn_processor``, and behind :func:`enable`."""

    def __init__(
        self,
        method: str | Method = "radial",
        *,
        density: float | None = None,
        schedule: Schedule | None = None,
        dense_steps: int | float | None = None,
        dense_layers: int | float | None = None,
        executor: str = "auto",
        block: int | None = None,
        min_tokens: int | None = None,
        steps: int | None = None,
        **settings: Any,
    ) -> None:
        """
        Args:
            method: a name from ``dit_sparse.METHODS``, with ``settings`` of its own, or a Method.
            density: fraction of the query-key pairs to compute; 0.25 where neither it nor a setting is given.
            schedule: when to stay dense; ``dense_steps`` and ``dense_layers`` are short for parts of it.
            executor: what computes the plans: "auto", or a name that runs or raises. "auto" computes dense steps, too,
                where an executor is faster at all pairs than torch's own attention.
            block: tokens in a block, 16 to 256; None: 64 below 32,768 tokens, else 128.
            min_tokens: shorter sequences stay dense. None: "auto" stays dense wherever that is faster by what was
                measured on this machine; 0: nothing stays dense for its length.
            steps: number of denoising steps, needed only where neither pipeline nor scheduler tells it.

        Raises:
            ValueError: anything unknown or out of range, in one sentence.
        """
        schedule = schedule or Schedule()
        given = {"dense_steps": dense_steps, "dense_layers": dense_layers}
        schedule = replace(schedule, **{name: value for name, value in given.items() if value is not None})
        if executor != "auto":
            executor_named(executor)
        if block is not None and (block < 16 or block > 256 or block % 16):
            raise ValueError(f"block is a multiple of 16 from 16 to 256 tokens, not {block}")
        self.settings = Settings(_resolve(method, density, settings), schedule, executor, block, min_tokens, steps)
        self._made_for: Profile | None = None

    @classmethod
    def from_profile(cls, profile: str | Path | Profile, **settings: Any) -> SparseAttnProcessor:
        """What a profile says: a name of ``profiles/``, or a file. ``settings`` are those of the constructor that do
        not concern methods; steps and layers to keep dense come from the profile where they are not given.

        Raises:
            ValueError: no such profile, a damaged or newer one.
        """
        from ..profiling.head_profile import Profile  # pydantic takes longer to import than the rest

        profile = profile if isinstance(profile, Profile) else Profile.load(profile)
        made = cls(profile.mixture(), **{"schedule": profile.when()} | settings)
        made._made_for = profile
        return made

    def attach(self, model: Any) -> Run:
        """Make ``model``, a diffusers pipeline or transformer, sparse.

        Raises:
            ValueError: nobody knows its family, or the profile is made for another model.
        """
        transformers = list(_transformers(model))
        for _, part, _ in transformers if self._made_for else ():
            if self._made_for.transformer not in (cls.__name__ for cls in type(part).__mro__):
                raise ValueError(
                    f"the profile {self._made_for.model} is made for a {self._made_for.transformer}, "
                    f"not a {type(part).__name__}"
                )
        timesteps = lambda: getattr(getattr(model, "scheduler", None), "timesteps", None)  # it may be exchanged later
        return Run(self.settings, timesteps, lambda: _guided(model), transformers)


def enable(
    model: Any, method: str | Method = "radial", *, profile: str | Path | Profile | None = None, **settings: Any
) -> Run:
    """Make a diffusers pipeline, or a bare transformer, sparse.

    Takes the arguments of :class:`SparseAttnProcessor`, or a ``profile`` in the place of a method. The returned run
    reports, and ``run.disable()`` (or leaving ``with``) restores the model bit for bit. A run that is active on the
    model already is ended first.
    """
    processor = (
        SparseAttnProcessor(method, **settings)
        if profile is None
        else SparseAttnProcessor.from_profile(profile, **settings)
    )
    if not hasattr(model, "components"):
        return processor.attach(model)
    prepare(model).set_attn_processor(processor)
    return model.sparse_run


def prepare(pipe: Any) -> Any:
    """Give this pipeline object ``set_attn_processor``; returns it."""
    _transformers(pipe)
    if not hasattr(pipe, "set_attn_processor"):
        pipe.__dict__["set_attn_processor"] = MethodType(SetAttnProcessor.set_attn_processor, pipe)
        pipe.__dict__["sparse_run"] = None
    return pipe


def _transformers(model: Any) -> Iterator[tuple[str, nn.Module, Family]]:
    """Name, module and family of every transformer of a pipeline, or of the bare transformer itself.

    Raises:
        ValueError: there is none, or nobody knows its family.
    """
    parts = model.components if hasattr(model, "components") else {"transformer": model}
    found = [
        (name, getattr(part, "_orig_mod", part))  # what torch.compile(part) wraps
        for name, part in parts.items()
        if name.startswith("transformer") and isinstance(part, nn.Module)
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no transformer to make sparse")
    for _, part in found:
        if family_of(part) is None:
            raise ValueError(
                f"no family in dit_sparse/pipelines knows {type(part).__name__}; use dit_sparse.attention, "
                "or add a family (CONTRIBUTING: add a model)"
            )
    return ((name, part, family_of(part)) for name, part in found)


def _guided(model: Any) -> bool:
    """Whether a pipeline that batches the branches of guidance computes both. CogVideoX tells its scale alone."""
    return bool(getattr(model, "do_classifier_free_guidance", getattr(model, "guidance_scale", 1) > 1))


def _resolve(method: str | Method, density: float | None, settings: dict) -> Method:
    if isinstance(method, str):
        density = DEFAULT_DENSITY if density is None and not settings else density
        return method_named(method, **({} if density is None else {"density": density}), **settings)
    if not isinstance(method, Method):
        raise ValueError(f"a method is a name or a dit_sparse.Method, not {type(method).__name__}")
    if settings:
        raise ValueError(f"settings such as {next(iter(settings))!r} go with a method's name; a Method has its own")
    return method if density is None else replace(method, density=density)
