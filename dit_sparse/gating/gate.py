"""Base class of gates: scorers with parameters, which are trained or have the values of an untrained scorer."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, fields
from functools import lru_cache

import torch
from torch import Tensor

from ..grid import Site, short_repr
from ..method import Method, Scorer
from .weights import GateWeights, weights_of

Tensors = dict[str, Tensor]


@dataclass(frozen=True, kw_only=True)
class Gate(Scorer):
    """A scorer with parameters for every head.

    A subclass has three parts, so that `dit_sparse.training` can train it on stored features: `features` reads q, k and
    v without parameters, `gate` scores blocks from features and parameters, and `initial` returns the parameters of the
    untrained gate, with which it needs no file. The parameters of a model are read from ``weights``.

    Attributes:
        weights: a file of ``dit-sparse train``, or the name of bundled weights; None: the untrained gate.
    """

    weights: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if (stored := self.stored_weights()) is None:
            return
        if stored.gate != type(self).__name__:
            raise ValueError(f"weights must be those of {type(self).__name__}, but {stored.name} holds {stored.gate}")
        settings = self.shape_settings()
        for name in sorted(settings.keys() | stored.settings.keys()):
            if stored.settings.get(name) != settings.get(name):
                trained = short_repr(stored.settings.get(name))
                raise ValueError(
                    f"{name} must be {trained}, as trained in {stored.name}, got {short_repr(settings.get(name))}"
                )

    @abstractmethod
    def initial(self, head_dim: int) -> Tensors:
        """Return the parameters of the untrained gate by name, ``[1, ...]`` each: the same for all heads."""

    @abstractmethod
    def features(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> tuple[Tensors, Tensors]:
        """Return what the gate reads of ``q, k, v [B, H, N, D]``: features of query blocks and of key blocks, float32
        ``[B|1, H|1, Qb, ...]`` each."""

    @abstractmethod
    def gate(self, queries: Tensors, keys: Tensors, parameters: Tensors) -> Tensor:
        """Return scores ``[B, H, R, Qb]``, logits of the attention mass.

        Args:
            queries: features of R query blocks.
            keys: features of all key blocks.
            parameters: of each head, ``[H, ...]``, or the same for all heads, ``[1, ...]``.
        """

    def loss(self, scores: Tensor, mass: Tensor) -> Tensor:
        """Return the loss that a training minimizes: the Kullback-Leibler divergence of the softmax of the scores from
        the mass, weighted by the mass of the row.

        Args:
            scores, mass: ``[B, H, R, V]``. Blocks that are always kept have no mass and a score of -1e9.
        """
        log_share = (mass / mass.sum(-1, keepdim=True).clamp(min=1e-12)).clamp(min=1e-12).log()
        return (mass * (log_share - scores.log_softmax(-1))).sum(-1).mean()

    def shape_settings(self) -> dict:
        """Return the settings that the shapes and the meaning of the parameters depend on."""
        others = ("density", "budget", "weights")
        return {one.name: getattr(self, one.name) for one in fields(self) if one.name not in others}

    def stored_weights(self) -> GateWeights | None:
        """Return the trained parameters, or None for an untrained gate. Raises ValueError if they cannot be read."""
        return None if self.weights is None else weights_of(type(self).__name__, self.weights)

    def check_model(self, layers: int, heads: int) -> None:
        if (stored := self.stored_weights()) is not None:
            stored.check_shape(layers=layers, heads=heads or None)

    def check_transformer(self, classes: tuple[str, ...]) -> None:
        if (stored := self.stored_weights()) is not None:
            stored.check_transformer(classes)

    def begin_generation(self, q: Tensor, site: Site, reserved_bytes: int = 0) -> int:
        if (stored := self.stored_weights()) is not None:
            stored.check_shape(layers=site.layers, head_dim=q.shape[-1])
        return 0

    def score(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> Tensor:
        return self.gate(*self.features(q, k, v, site), self.parameters(q, site))

    def parameters(self, q: Tensor, site: Site) -> Tensors:
        """Return the parameters for a call, ``[H|1, ...]``, cached on the device of q."""
        if (stored := self.stored_weights()) is None:
            return _initial(self, q.shape[-1], q.device)
        first = site.first_head or 0
        heads = tuple(range(first, first + q.shape[1])) if site.heads is None else site.heads
        stored.check_shape(layers=site.layers, head_dim=q.shape[-1])
        return _trained(stored, site.component, site.layer, heads, q.device)


def gate_weights_digests(methods: Iterable[Method]) -> list[str]:
    """Return a digest of the weights file of every trained gate among some methods."""
    stored = (one.stored_weights() for one in methods if isinstance(one, Gate))
    return [weights.digest for weights in stored if weights is not None]


@lru_cache(maxsize=32)
def _initial(gate: Gate, head_dim: int, device: torch.device) -> Tensors:
    return {name: tensor.to(device) for name, tensor in gate.initial(head_dim).items()}


@lru_cache(maxsize=1024)
def _trained(stored: GateWeights, component: str, layer: int, heads: tuple[int, ...], device: torch.device) -> Tensors:
    """Parameters of some heads of a layer, so that they are copied to the device once."""
    own = stored.layer(component, layer)
    if max(heads) >= stored.heads:
        raise ValueError(f"the weights {stored.name} are for {stored.heads} heads, got head {max(heads)}")
    return {name: tensor[list(heads)].float().to(device) for name, tensor in own.items()}
