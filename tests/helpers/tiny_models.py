"""Tiny diffusers transformers with random weights, one of each supported class, and arguments of their forward calls.

``tiny_models`` returns the only table: the tests of families read it.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from types import MappingProxyType

import torch
from torch import Tensor

from dit_sparse.pipelines.family import family_of

HEADS = dict(num_attention_heads=2, attention_head_dim=16)


@dataclass
class Call:
    """The sizes of a forward call, and random tensors for it.

    Attributes:
        grid: frames, height and width in tokens.
        batch: prompts.
        slots: text tokens, with padding.
        lengths: valid text tokens of each prompt.
    """

    grid: tuple[int, int, int]
    batch: int = 1
    slots: int = 20
    lengths: tuple[int, ...] = ()
    seed: int = 0

    def noise(self, *shape: int) -> Tensor:
        """Return a random tensor ``[B, *shape]``."""
        self.seed += 1
        return torch.randn(self.batch, *shape, generator=torch.Generator().manual_seed(self.seed))

    def video(self, channels: int, patch: tuple[int, int, int] = (1, 2, 2)) -> Tensor:
        """Return latents ``[B, C, F, H, W]``."""
        return self.noise(channels, *(size * step for size, step in zip(self.grid, patch, strict=True)))

    def image(self, channels: int, patch: int = 2) -> Tensor:
        """Return latents ``[B, C, H, W]``."""
        return self.noise(channels, self.grid[1] * patch, self.grid[2] * patch)

    def packed(self, channels: int) -> Tensor:
        """Return latents ``[B, N, C]``."""
        return self.noise(prod(self.grid), channels)

    def ids(self, axes: int = 3) -> Tensor:
        """Return position ids ``[N, axes]``: frame, row, column and zeros."""
        axis = [torch.arange(size) for size in self.grid]
        ids = torch.stack(torch.meshgrid(*axis, indexing="ij"), -1).flatten(0, 2)
        return torch.nn.functional.pad(ids, (0, axes - 3)).float()

    def text(self, channels: int = 16) -> Tensor:
        """Return text embeddings ``[B, slots, C]``."""
        return self.noise(self.slots, channels)

    @property
    def mask(self) -> Tensor:
        """The valid text tokens, bool ``[B, slots]``."""
        return torch.arange(self.slots) < torch.tensor(self.lengths or (self.slots,) * self.batch)[:, None]

    @property
    def time(self) -> Tensor:
        return torch.full((self.batch,), 500.0)


@dataclass(frozen=True)
class TinyModel:
    """A transformer class.

    Attributes:
        name: name of the class in diffusers.
        config: arguments of the constructor, read-only because all tests share the table.
        make_arguments: returns the keyword arguments of a forward call.
        sites: number of self-attention modules that are made sparse.
        axes: axes of the latents; N: packed tokens.
        patch: latents in a token along frames, rows and columns.
        latents: name of the argument.
        side: position of the text tokens in self-attention, or None.
        text: names of the arguments that become these text tokens, and nothing else.
        text_tokens: number of text tokens for a number of slots.
        references: number of reference tokens before and after the video.
        masked: whether the model takes prompts of unequal length in one batch.
        unbatched: whether attention runs for one batch item at a time, without padding.
        first_latent: place of the video's first token in packed latents.
        causal_text: whether every module also computes the causal attention of the text, which stays dense.
        single: whether a call takes one prompt only.
        grids: two token grids for tests, the second of an odd size.
    """

    name: str
    config: Mapping
    make_arguments: Callable[[Call], dict]
    sites: int
    axes: str = "BCFHW"
    patch: tuple[int, int, int] = (1, 2, 2)
    latents: str = "hidden_states"
    side: str | None = None
    text: tuple[str, ...] = ("encoder_hidden_states",)
    text_tokens: Callable[[int], int] = field(default=lambda slots: slots)
    references: Callable[[Call], tuple[int, int]] = field(default=lambda call: (0, 0))
    masked: bool = False
    unbatched: bool = False
    first_latent: Callable[[Call], int] = field(default=lambda call: 0)
    causal_text: bool = False
    single: bool = False
    grids: tuple[tuple[int, int, int], ...] = ((3, 8, 8), (5, 4, 7))

    def __post_init__(self) -> None:
        object.__setattr__(self, "config", MappingProxyType(self.config))

    def arguments(self, call: Call) -> dict:
        """Return the keyword arguments of a forward call, the same for equal calls."""
        return self.make_arguments(replace(call))

    def tokens_next_to_video(self, call: Call) -> tuple[int, int]:
        """Return the numbers of text and reference tokens before and after the video."""
        before, after = self.references(call)
        text = self.text_tokens(call.slots)
        return before + text * (self.side == "before"), after + text * (self.side == "after")

    def build(self) -> torch.nn.Module:
        """Return a new transformer with the same random weights in every process."""
        import diffusers

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = getattr(diffusers, self.name)(**self.config).eval().requires_grad_(False)
            for parameter in model.parameters():
                if not parameter.any():  # gates and output layers are often zero at first
                    torch.nn.init.normal_(parameter, std=0.1)
        return model

    def with_changed_token(self, call: Call, place: tuple[int, int, int]) -> dict:
        """Return the arguments of a call with one number changed, in the latents of the token at ``place``."""
        arguments = self.arguments(call)
        latents = arguments[self.latents]
        first = latents[0] if isinstance(latents, list) else latents
        _, height, width = call.grid
        start = dict(zip("FHW", (i * step for i, step in zip(place, self.patch, strict=True)), strict=True))
        start["N"] = self.first_latent(call) + (place[0] * height + place[1]) * width + place[2]
        axes = self.axes.replace("B", "") if isinstance(latents, list) else self.axes
        first[tuple(start.get(axis, 0) for axis in axes)] += 1
        return arguments

    def with_changed_text(self, call: Call) -> dict:
        """Return the arguments of a call with other embeddings of the first text token of the first prompt."""
        arguments = self.arguments(call)
        for name in self.text:
            text = arguments[name][0]
            text[..., 0, :] += 1
        return arguments


@functools.cache
def tiny_models() -> dict[str, TinyModel]:
    """Return all tiny models by the name of their class, videos first."""
    from tiny_image_models import IMAGE_MODELS
    from tiny_video_models import VIDEO_MODELS

    return {model.name: model for model in (*VIDEO_MODELS, *IMAGE_MODELS)}


@functools.cache
def tiny_model(name: str) -> torch.nn.Module:
    """Return a built model, shared by all tests."""
    return tiny_models()[name].build()


def compile_blocks(model: torch.nn.Module) -> None:
    """Compile repeated blocks as diffusers does, or the blocks of the sites where a class names none."""
    if model._repeated_blocks:
        model.compile_repeated_blocks(fullgraph=True, backend="eager")
        return
    sites = family_of(model).sites
    paths = {re.match(r"(.*?\.\d+)\.", path)[1] for path, _ in model.named_modules() if re.fullmatch(sites, path)}
    for path in sorted(paths):
        model.get_submodule(path).compile(fullgraph=True, backend="eager")


def first_output(output: tuple) -> Tensor:
    """Return the latents of a forward call without ``return_dict``; lists are stacked."""
    output = output[0] if isinstance(output, tuple) else output
    return torch.stack(output) if isinstance(output, list) else output
