"""Intercepted attention calls, their module and transformer call, and the reasons why a call must stay dense."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..grid import BaseGrid, Grid, Site
from .settings import Settings
from .tracking import StepTracker


@dataclass(frozen=True)
class AttentionSite:
    """A self-attention module of a transformer.

    Attributes:
        component: name of the transformer in its pipeline.
        layer, layers: number of the module, and how many there are.
        text: position of the text tokens, as in ``Family``.
        module: the attention module.
        cached_keys: whether keys may begin with tokens that are no queries, as in ``Family``.
        packed_text: whether the video of an item starts where its own text ends, as in ``Family``.
    """

    component: str
    layer: int
    layers: int
    text: str | None
    module: nn.Module
    cached_keys: bool = False
    packed_text: bool = False


@dataclass(frozen=True)
class HeadShare:
    """The heads of one rank under context parallelism.

    Attributes:
        first: number of its first head.
        ranks: number of ranks that share the heads.
    """

    first: int
    ranks: int


@dataclass(frozen=True)
class AttentionCall:
    """An intercepted attention call.

    Attributes:
        q, k, v: after RoPE, ``[B, H, N, D]``, and ``[B, Hkv, N, D]`` for keys and values.
        mask: a tensor, a ``BlockMask``, None, or another object that the user's attention backend accepts as a mask.
        mask_source: the processor's argument from which all layers compute the same mask, or None.
        is_causal, dropout_p, scale: as in ``scaled_dot_product_attention``.
        stock: computes the call as the model does, ``[B, H, N, D]``.
        backend: name of the attention backend that the user chose, or None.
        is_parallel: whether the call belongs to a form of context parallelism that is not supported.
        share: the heads of this rank under context parallelism, else None.
        packed_text: as in ``Family``, so that the mask also says where the video of each item starts.
        first_query: number of the first query whose output is used, as in ``Site``.
        is_checked: whether ``stock`` is known to compute plain attention; functions of a model's own are compared with
            it once.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    mask: Any
    is_causal: bool
    dropout_p: float
    scale: float | None
    stock: Callable[[], Tensor]
    backend: str | None = None
    is_parallel: bool = False
    mask_source: Tensor | None = None
    share: HeadShare | None = None
    is_checked: bool = True
    first_query: int = 0
    packed_text: bool = False

    @property
    def needs_gradient(self) -> bool:
        return torch.is_grad_enabled() and any(x.requires_grad for x in (self.q, self.k, self.v))

    @property
    def pairs(self) -> int:
        """Query-key pairs of all heads and batch items."""
        return self.q.shape[:2].numel() * (self.q.shape[2] - self.first_query) * self.k.shape[2]

    def under_autocast(self, device: str, dtype: torch.dtype) -> AttentionCall:
        """Return the call with inputs of that dtype; ``stock`` runs under autocast, as in the model."""

        def stock() -> Tensor:
            with torch.autocast(device, dtype):
                return self.stock()

        return replace(self, q=self.q.to(dtype), k=self.k.to(dtype), v=self.v.to(dtype), stock=stock)


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of a transformer call without text. The text length follows from the sequence length of each attention
    call.

    Attributes:
        frames, height, width: size of the video in tokens.
        references_before, references_after: reference tokens next to the video, as in ``Family.references``.
    """

    frames: int
    height: int
    width: int
    references_before: int = 0
    references_after: int = 0

    @property
    def references(self) -> int:
        return self.references_before + self.references_after

    def grid(self, tokens: int, text: str | None) -> Grid | None:
        """Return the token grid of a sequence, with reference tokens as text, or None if the video does not fit it."""
        grid = Grid(self.frames, self.height, self.width).with_text(tokens - self.references, text)
        if grid is None:
            return None
        before, after = grid.before + self.references_before, grid.after + self.references_after
        return replace(grid, before=before, after=after)

    def __str__(self) -> str:
        references = f" with {self.references} reference tokens" if self.references else ""
        return f"{self.frames}x{self.height}x{self.width}{references}"


def chosen_backend(backend: Any) -> str | None:
    """Return the name of the attention backend that the user chose for a processor or globally, or None."""
    if backend is None:
        from diffusers.models.attention_dispatch import _AttentionBackendRegistry

        backend, _ = _AttentionBackendRegistry.get_active_backend()
    name = str(getattr(backend, "value", backend))
    return None if name == "native" else name


def why_dense(layout: object, grid: BaseGrid | None, call: AttentionCall, cached_keys: bool = False) -> str | None:
    """Return why a call cannot be computed sparsely, or None if it can.

    Args:
        layout: tokens of the transformer call, for messages.
        grid: ``layout`` with the text tokens of this attention call, or None if the queries do not fit it.
        call: the intercepted call.
        cached_keys: whether the queries may be the last tokens of the keys only.
    """
    if call.is_causal or call.dropout_p > 0:
        return "causal attention and dropout are not supported"
    q, k, v = call.q, call.k, call.v
    fits = q.shape[2] == k.shape[2] or (cached_keys and q.shape[2] < k.shape[2] and call.mask is None)
    if not fits or grid is None:
        return f"{q.shape[2]} queries and {k.shape[2]} keys do not fit the grid {layout}"
    if q.shape[-1] != v.shape[-1] or not q.dtype == k.dtype == v.dtype:
        return "queries, keys and values differ in dtype or head_dim"
    if not (call.mask is None or isinstance(call.mask, Tensor) or is_block_mask(call.mask)):
        return f"the model's attention mask is a {type(call.mask).__name__}"
    if call.needs_gradient:
        return "gradients are required, and the executors have no backward pass"
    if call.is_parallel:
        return "this form of context parallelism is not supported"
    return None


def is_block_mask(mask: object) -> bool:
    """Return whether a mask is a ``BlockMask`` of FlexAttention, whose import would import PyTorch's compiler."""
    return type(mask).__name__ == "BlockMask" and hasattr(mask, "mask_mod")


class Forward:
    """The running transformer call.

    Args:
        settings: settings of the run.
        tracker: the step and branch of this call.

    Attributes:
        layout: its tokens.
    """

    def __init__(self, settings: Settings, tracker: StepTracker) -> None:
        self._settings, self._tracker = settings, tracker
        self.layout = TokenLayout(1, 1, 1)
        self._batch = 1
        self._calls: Counter[nn.Module] = Counter()  # Mochi calls each module once per batch item

    def begin(self, layout: TokenLayout, batch: int) -> None:
        """Record the tokens and batch size of a transformer call that begins."""
        self.layout, self._batch = layout, batch
        self._calls.clear()

    def count_call(self, attention_site: AttentionSite) -> None:
        """Count a call of a module, so that its next call is assigned to the next batch item."""
        self._calls[attention_site.module] += 1

    def site(self, attention_site: AttentionSite, grid: BaseGrid) -> Site:
        """Return the site of the next call of a module."""
        tracker, component = self._tracker, attention_site.component
        call = self._calls[attention_site.module]
        prompts = self._batch // (1 + tracker.both_branches) or 1
        return Site(
            grid,
            block=self._settings.block_for(grid),
            layer=attention_site.layer,
            layers=attention_site.layers,
            step=tracker.step,
            steps=tracker.steps,
            branch=f"{component} {tracker.branch} {call}",
            plan_group=f"{component} {tracker.plan_group} {call % prompts}",
            both_branches=tracker.both_branches,
            component=component,
            references=self.layout.references,
        )
