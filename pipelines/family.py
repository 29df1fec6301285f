"""Family: the declaration of one family of diffusers transformers by its adapter.

To add a family, write ``pipelines/video/<name>.py`` or ``pipelines/image/<name>.py`` with a module-level
``FAMILY = Family(...)`` and add the name to ``FAMILIES``. Adapters refer to diffusers classes by name, so importing one
does not import diffusers.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod

from torch import Tensor

FAMILIES = {
    "video": (
        "wan", "hunyuan_video", "helios", "cogvideox", "mochi", "ltx", "minimax_h3", "skyreels_v2", "anyflow", "cosmos",
        "cosmos3", "allegro", "easyanimate", "kandinsky",
    ),
    "image": (
        "joyimage", "flux", "bria", "qwen_image", "krea2", "sd3", "lumina2", "z_image", "cogview", "hidream",
        "hunyuan_image", "ernie_image", "aura_flow", "pixart",
    ),
}  # fmt: skip

GridShape = tuple[int, int, int]
ParallelPlan = Mapping[str, int | tuple[int, ...] | Mapping[str | int, int | tuple[int, ...]]]


@dataclass(frozen=True)
class Family:
    """A family of diffusers transformers. Images are videos of one frame.

    Attributes:
        name: name of the adapter's file in ``pipelines/video`` or ``pipelines/image``.
        transformers: class names of the transformers.
        sites: regular expression that matches the full module names of all video self-attention modules and of no
            other module.
        grid: ``grid(config, arguments) -> (frames, height, width)``, the number of video tokens along each axis.
            ``config`` is the transformer's config; ``arguments`` are the bound arguments of its forward call.
        text: position of the text tokens in self-attention: ``"before"`` or ``"after"`` the video tokens, or None if
            self-attention has no text tokens.
        references: ``references(config, arguments) -> (before, after)``, the number of tokens next to the video
            that are neither video nor text: history frames, reference images, registers. They stay dense, and
            the density does not count them.
        reads: names of the tensors among the arguments whose values ``grid`` and ``references`` read, such as position
            ids; in a compiled transformer they receive only these arguments and the latents.
        mask: name of the processor's argument from which all layers compute the same attention mask, if each layer
            makes a tensor of its own.
        cached_keys: whether keys may begin with tokens that are no queries, such as a cache or text, so that the
            queries are the last tokens of the sequence that ``grid``, ``references`` and ``text`` describe.
        packed_text: whether each batch item has its own text without padding, then the video, and padding at the end,
            so that the videos of a batch start at different tokens.
        pipelines: class names of the diffusers pipelines.
        images: whether the pipelines generate images; the adapter is in ``pipelines/image``.
        timestep, latents: names of these arguments of the transformer's forward call.
        size_multiple: heights and widths of clips, in pixels, must be multiples of it; 1: unknown.
        parallel: how context parallelism splits tensors between ranks, for the classes that diffusers has no plan for:
            by class name, ``plan(config)``, which returns a ``ParallelPlan``, or why there is none as text. A plan has
            the module names of diffusers' ``cp_plan``, with the dimension that is split for each argument (by name) or
            output (by number), or the dimension along which each output is gathered.
        fps: frames per second of the clips of the models: a number, or ``fps(pipeline, transformer)`` where the models
            differ, with the configs of the pipeline (``model_index.json``) and of its transformer; None: unknown.
    """

    name: str
    transformers: tuple[str, ...]
    sites: str
    grid: Callable[[Mapping, Mapping], GridShape]
    text: str | None = None
    references: Callable[[Mapping, Mapping], tuple[int, int]] = lambda config, arguments: (0, 0)
    reads: tuple[str, ...] = ()
    mask: str | None = None
    cached_keys: bool = False
    packed_text: bool = False
    pipelines: tuple[str, ...] = ()
    timestep: str = "timestep"
    latents: str = "hidden_states"
    size_multiple: int = 1
    images: bool = False
    parallel: Mapping[str, Callable[[Mapping], ParallelPlan | str]] = field(default_factory=dict)
    fps: int | Callable[[Mapping, Mapping], int] | None = None

    def parallel_plan(self, class_names: set[str], config: Mapping) -> ParallelPlan | str | None:
        """Return the plan for context parallelism of a transformer with these names of its class and base classes, why
        it cannot have one as text, or None if the family has none."""
        plans = (plan(config) for name, plan in self.parallel.items() if name in class_names)
        return next(plans, None)

    def frames_per_second(self, pipeline: Mapping, transformer: Mapping) -> int | None:
        """Return the frames per second of the clips of a pipeline, from its config and that of its transformer, or
        empty mappings where they are unknown; None if the rate is unknown."""
        return self.fps(pipeline, transformer) if callable(self.fps) else self.fps

    @property
    def module(self) -> str:
        """Name of the adapter's module inside ``dit_sparse.pipelines``."""
        return f"{'image' if self.images else 'video'}.{self.name}"

    def supports(self, class_names: set[str]) -> bool:
        """Return whether a transformer with these names of its class and base classes belongs to the family."""
        return not class_names.isdisjoint(self.transformers)


def class_names(cls: type) -> set[str]:
    """Return the names of a class and of its base classes."""
    return {base.__name__ for base in cls.__mro__}


def family_of(transformer: object) -> Family | None:
    """Return the family of a transformer by the names of its class and base classes, or None if no adapter exists."""
    return family_named(class_names(type(transformer)))


def family_named(class_names: set[str]) -> Family | None:
    """Return the family of a transformer whose class and base classes have these names, or None."""
    return next((family for family in all_families() if family.supports(class_names)), None)


def all_families() -> Iterator[Family]:
    """Return the families of the adapters, those of videos first."""
    names = (f"{folder}.{name}" for folder, names in FAMILIES.items() for name in names)
    return (importlib.import_module(f"dit_sparse.pipelines.{name}").FAMILY for name in names)


def patch_size(config: Mapping) -> GridShape:
    """Return the size of a patch in latent frames, rows and columns, from ``patch_size`` and ``patch_size_t``.

    Both are 1 if the config has none.
    """
    patch = config.get("patch_size", 1)
    return tuple(patch) if isinstance(patch, list | tuple) else (config.get("patch_size_t") or 1, patch, patch)


def patch_grid(arguments: Mapping, patch: GridShape) -> GridShape:
    """Return the token grid of latents ``[B, C, F, H, W]``.

    Args:
        arguments: the arguments of the transformer call, with the latents under ``hidden_states``.
        patch: size of a patch in latent frames, rows and columns. A partial last patch is dropped, as Conv3d does.
    """
    frames, height, width = arguments["hidden_states"].shape[-3:]
    return frames // patch[0], height // patch[1], width // patch[2]


def image_grid(arguments: Mapping, patch: int) -> GridShape:
    """Return the token grid of image latents ``[B, C, H, W]``, cut into patches of ``patch`` rows and columns."""
    height, width = arguments["hidden_states"].shape[-2:]
    return 1, height // patch, width // patch


def history_tokens(arguments: Mapping, scales: Mapping[str, int], patch: GridShape) -> int:
    """Return the tokens of history frames at several scales. Histories are padded to whole patches.

    Args:
        arguments: the arguments of the transformer call. Latents ``[B, C, F, H, W]`` without frame indices are ignored
            by the model.
        scales: names of the latents, and how many times larger their patches are.
        patch: size of a patch at scale 1.
    """
    tokens = 0
    for name, scale in scales.items():
        latents = arguments.get(name)
        if latents is not None and arguments.get(f"indices_{name}") is not None:
            sides = zip(latents.shape[-3:], patch, strict=True)
            tokens += prod(-(-side // (scale * step)) for side, step in sides)
    return tokens


def merged_grid(shapes: Sequence[GridShape]) -> GridShape:
    """Return the grid of a sequence of images or videos, such as an image and its references.

    Args:
        shapes: frames, height and width of each in tokens. Images of one size count as the frames of one video; if
            they differ in size, the grid is that of the first one and the others are references.
    """
    if _are_frames(shapes):
        return sum(shape[0] for shape in shapes), *shapes[0][1:]
    return shapes[0]


def merged_references(shapes: Sequence[GridShape]) -> tuple[int, int]:
    """Return the numbers of reference tokens before and after the grid of :func:`merged_grid`."""
    return 0, 0 if _are_frames(shapes) else sum(prod(shape) for shape in shapes[1:])


def _are_frames(shapes: Sequence[GridShape]) -> bool:
    return len({shape[1:] for shape in shapes}) == 1


def packed_shapes(ids: Tensor) -> list[GridShape]:
    """Return frames, height and width of every image in packed latents, from their position ids.

    Args:
        ids: ``[N, 3 or more]`` or ``[B, N, 3 or more]``; the first three axes are image or frame, row and column.
    """
    ids = (ids[0] if ids.ndim == 3 else ids)[:, :3].cpu()
    images = ids.split(ids[:, 0].unique_consecutive(return_counts=True)[1].tolist())
    widths = [len(image[:, 2].unique()) for image in images]
    return [(1, len(image) // width, width) for image, width in zip(images, widths, strict=True)]


class SetAttnProcessorMixin:
    """Adds ``set_attn_processor`` to a pipeline, as diffusers models have it.

    Attributes:
        sparse_run: the active run, or None.
    """

    sparse_run = None

    def set_attn_processor(self, processor) -> None:
        """Set the attention processor of every transformer of the pipeline and end the active run.

        Args:
            processor: a ``dit_sparse.SparseAttnProcessor``, a diffusers processor, or None to restore the model's own
                processors.
        """
        if self.sparse_run is not None:
            self.sparse_run.disable()
            self.__dict__["sparse_run"] = None
        if hasattr(processor, "attach"):
            self.__dict__["sparse_run"] = processor.attach(self)
        elif processor is not None:
            for name, component in self.components.items():
                if name.startswith("transformer") and component is not None:
                    component.set_attn_processor(processor)


def pipeline_class(module: str, family: Family, name: str) -> type:
    """Return a subclass of the diffusers pipeline ``name`` that has ``set_attn_processor``.

    Raises:
        AttributeError: the family has no pipeline of that name.
    """
    if name not in family.pipelines:
        raise AttributeError(f"module {module!r} has no attribute {name!r}")
    import diffusers

    doc = f"diffusers.{name} with ``set_attn_processor``."
    return type(name, (SetAttnProcessorMixin, getattr(diffusers, name)), {"__module__": module, "__doc__": doc})
