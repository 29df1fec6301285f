"""`enable`, `prepare` and `SparseAttnProcessor`: how a user makes a model sparse."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..grid import short_repr
from ..kernels.executors import executor as executor_named
from ..method import Method
from ..methods import DEFAULT_METHOD, DEFAULT_VOXEL_METHOD
from ..notation.presets import DEFAULT_PRESET, PRESETS, paper_schedule
from ..notation.syntax import ProfileName, write
from ..pipelines.family import SetAttnProcessorMixin
from ..pipelines.module_adapter import AnyFamily, ModuleAdapter
from ..schedule import Schedule
from .run import Run
from .settings import Settings, make_method
from .transformers import find_transformers

if TYPE_CHECKING:  # pydantic takes longer to import than the rest of the package
    from ..profiling.head_profile import Profile


class SparseAttnProcessor:
    """Settings of sparse attention, for ``pipe.set_attn_processor``.

    Args:
        method: a Method, or its text: a name of ``dit_sparse.METHODS``, with settings as in ``"radial(sink=true)"``,
            a composition as in ``"radial|sink"``, ``"profile:NAME"``, or ``"quality"``, ``"balanced"`` or ``"fast"``.
            Default: ``"balanced"``, with ``density`` or settings ``"routed"``; for plain torch modules ``"svg2"``.
            A preset also sets which steps and layers stay dense, if a paper gives them for the model.
        density: fraction of the query-key pairs to compute, in (0, 1]. Default: 0.25 if the method has no settings.
        schedule: which steps and layers stay dense, and how often plans are made. Default: that of the profile, or
            ``Schedule()``.
        dense_steps: replaces ``schedule.dense_steps``: a count, or a fraction of all steps.
        dense_layers: replaces ``schedule.dense_layers``: a count, or a fraction of all layers.
        density_ramp: replaces ``schedule.density_ramp``: factors of the density at the first and last sparse step.
        executor: name of the executor that computes the plans, which runs or raises, or ``"auto"`` for the fastest one
            as measured on this machine. ``"auto"`` also computes dense steps where an executor is faster than SDPA.
        block: tokens in a block, a multiple of 16 in [16, 256]. Default: 64 below 32,768 tokens, else 128.
        min_tokens: shorter sequences stay dense. Default: with ``"auto"``, calls stay dense where SDPA is faster as
            measured on this machine; with 0, sequences of any length are sparse.
        guard: attention mass that the plans of every layer must retain, in (0, 1), measured on a few queries every
            third step. A layer below the limit computes more pairs from the next step on; the third time it becomes
            dense. Default: off.
        steps: number of denoising steps, required for fractional ``dense_steps`` of a bare transformer.
        family: adapter for the transformer classes that it names, used before those of ``dit_sparse/pipelines``: a
            Family, or a ModuleAdapter for a plain torch module.
        settings: further settings of the method, if it is given as text.

    Raises:
        ValueError: an argument is unknown or out of range.

    Example:
        >>> pipe = dit_sparse.prepare(WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers"))
        >>> pipe.set_attn_processor(dit_sparse.SparseAttnProcessor("radial", density=0.25))
        >>> pipe.set_attn_processor(None)  # restores the model
    """

    def __init__(
        self,
        method: str | Method | None = None,
        *,
        density: float | None = None,
        schedule: Schedule | None = None,
        dense_steps: int | float | None = None,
        dense_layers: int | float | None = None,
        density_ramp: Sequence[float] | None = None,
        executor: str = "auto",
        block: int | None = None,
        min_tokens: int | None = None,
        guard: float | None = None,
        steps: int | None = None,
        family: AnyFamily | None = None,
        **settings: Any,
    ) -> None:
        overrides = {"dense_steps": dense_steps, "dense_layers": dense_layers, "density_ramp": density_ramp}
        overrides = {name: value for name, value in overrides.items() if value is not None}
        is_plain = isinstance(family, ModuleAdapter)
        # The model may be a plain module with a known adapter, which decides the default method.
        may_change = method is None and not is_plain
        self._plain_method = partial(make_method, DEFAULT_VOXEL_METHOD, density, settings) if may_change else None
        if method is None:
            is_changed = density is not None or bool(settings)
            method = DEFAULT_VOXEL_METHOD if is_plain else DEFAULT_METHOD if is_changed else DEFAULT_PRESET
        preset = method if isinstance(method, str) and method in PRESETS and not settings else None
        self._paper_may_schedule = preset is not None and schedule is None
        self._overrides = overrides
        method, self._profile = make_method(method, density, settings)
        if schedule is None:
            schedule = Schedule() if self._profile is None else self._profile.to_schedule()
        if isinstance(schedule, Schedule):
            schedule = replace(schedule, **overrides)
        self.settings = Settings(method, schedule, executor, block, min_tokens, steps, guard, preset)
        if not (family is None or isinstance(family, AnyFamily)):
            raise ValueError(f"family must be a dit_sparse.Family or ModuleAdapter, got {type(family).__name__}")
        self.family = family
        if executor != "auto":
            executor_named(executor)  # raises ValueError if there is none

    @classmethod
    def from_profile(cls, profile: str | Path | Profile, **settings: Any) -> SparseAttnProcessor:
        """Make a processor from a head profile.

        Args:
            profile: name of a profile in ``profiles/``, path of a file, or a Profile.
            settings: keyword arguments of :class:`SparseAttnProcessor`, except ``density`` and settings of methods.
                ``schedule`` defaults to the profile's.

        Raises:
            ValueError: there is no such profile, or it cannot be read.
        """
        if isinstance(profile, str | Path):
            return cls(write(ProfileName(str(profile))), **settings)
        if not hasattr(profile, "to_schedule"):
            raise ValueError(f"a profile must be a name, a path or a Profile, got {short_repr(profile)}")
        if settings.get("schedule") is None:
            settings["schedule"] = profile.to_schedule()
        processor = cls(profile.to_method(), **settings)
        processor._profile = profile
        return processor

    def attach(self, model: Any) -> Run:
        """Make a pipeline, a transformer or a plain torch module sparse.

        Raises:
            ValueError: the model has no supported transformer, or the profile is for another transformer class.
        """
        transformers = find_transformers(model, self.family)
        if self._profile is not None:
            for _, _, transformer, _ in transformers:
                self._profile.check_transformer(transformer)
        scheduler = lambda: getattr(model, "scheduler", None)  # users may swap schedulers
        settings = self.settings
        if self._plain_method is not None and all(isinstance(parts[-1], ModuleAdapter) for parts in transformers):
            settings = replace(settings, method=self._plain_method()[0], preset=None)
        elif self._paper_may_schedule:
            settings = self._schedule_of_paper(
                settings, {type(transformer).__name__ for _, _, transformer, _ in transformers}
            )
        return Run(type(model).__name__, settings, scheduler, lambda: _is_guided(model), transformers)

    def _schedule_of_paper(self, settings: Settings, transformers: set[str]) -> Settings:
        """Return the settings of a preset with the schedule that a paper gives for the model, if any.
        Arguments such as ``dense_steps`` take precedence."""
        found = paper_schedule(settings.preset, transformers)
        if found is None or found.schedule.keys() <= self._overrides.keys():
            return settings
        schedule = replace(settings.schedule, **found.schedule | self._overrides)
        preset = f"{settings.preset}, dense steps and layers of {found.source}"
        return replace(settings, schedule=schedule, preset=preset)

    def __repr__(self) -> str:
        settings = self.settings
        schedule = f"dense_steps {settings.schedule.dense_steps}, dense_layers {settings.schedule.dense_layers}"
        return f"SparseAttnProcessor({settings}, {schedule}, executor {settings.executor})"


def enable(
    model: Any,
    method: str | Method | None = None,
    *,
    profile: str | Path | Profile | None = None,
    density: float | None = None,
    schedule: Schedule | None = None,
    dense_steps: int | float | None = None,
    dense_layers: int | float | None = None,
    density_ramp: Sequence[float] | None = None,
    executor: str = "auto",
    block: int | None = None,
    min_tokens: int | None = None,
    guard: float | None = None,
    steps: int | None = None,
    family: AnyFamily | None = None,
    **settings: Any,
) -> Run:
    """Make a pipeline, a bare transformer or a plain torch module sparse.

    ``run.disable()``, or the end of a ``with`` block, restores the model bit for bit. If the pipeline already has an
    active run, that run ends first.

    Args:
        model: a diffusers pipeline or transformer of a supported family; an object that holds 3-D denoisers of known
            classes, such as the pipeline of TRELLIS.2; or any torch module with a ModuleAdapter as ``family``.
        profile: name, path or value of a head profile, used instead of ``method``.

    Returns:
        The active run, which reports densities, times and reasons for dense calls.

    Raises:
        ValueError: an argument is unknown or out of range, or the model is not supported. For an unknown transformer
            class the message contains a proposed family; check it and pass it as ``family``.

    Example:
        >>> pipe = WanPipeline.from_pretrained("Wan-AI/Wan2.1-T2V-14B-Diffusers").to("cuda")
        >>> with dit_sparse.enable(pipe, "radial", density=0.25) as run:
        ...     video = pipe("a red circle moves to the right").frames[0]
        >>> print(run.report())
    """
    settings |= {"density": density, "schedule": schedule, "dense_steps": dense_steps, "dense_layers": dense_layers}
    settings |= {"density_ramp": density_ramp, "executor": executor, "block": block}
    settings |= {"min_tokens": min_tokens, "guard": guard, "steps": steps, "family": family}
    if profile is None:
        processor = SparseAttnProcessor(method, **settings)
    else:
        processor = SparseAttnProcessor.from_profile(profile, **settings)
    if not hasattr(model, "components"):
        return processor.attach(model)
    prepare(model, family).set_attn_processor(processor)
    return model.sparse_run


def _add_settings_to_docstring(function: Any) -> None:
    """Add the arguments of `SparseAttnProcessor`, which documents them, to the docstring of a function."""
    arguments = inspect.cleandoc(SparseAttnProcessor.__doc__ or "").partition("Args:\n")[2].partition("\n\n")[0]
    before, separator, after = inspect.cleandoc(function.__doc__ or "").partition("\n\nReturns:")
    function.__doc__ = f"{before}\n{arguments}{separator}{after}"


_add_settings_to_docstring(enable)


def prepare(pipe: Any, family: AnyFamily | None = None) -> Any:
    """Add ``set_attn_processor`` to a pipeline object and return the pipeline.

    Args:
        pipe: a diffusers pipeline.
        family: as in :class:`SparseAttnProcessor`.

    Raises:
        ValueError: the pipeline has no supported transformer.
    """
    find_transformers(pipe, family)
    if not hasattr(pipe, "set_attn_processor"):
        pipe.__dict__["set_attn_processor"] = _SetAttnProcessor(pipe)
        pipe.__dict__["sparse_run"] = None
    return pipe


class _SetAttnProcessor:
    """``set_attn_processor`` of one pipeline object. Unlike a bound method it can be pickled with the pipeline."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __call__(self, processor: Any) -> None:
        SetAttnProcessorMixin.set_attn_processor(self.pipe, processor)

    __call__.__doc__ = SetAttnProcessorMixin.set_attn_processor.__doc__


def _is_guided(model: Any) -> bool:
    """Return whether a pipeline computes both branches of guidance. CogVideoX has only the guidance scale."""
    return bool(getattr(model, "do_classifier_free_guidance", getattr(model, "guidance_scale", 1) > 1))
