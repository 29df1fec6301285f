"""Distillation: the parameters of a gate are trained so that its scores predict the attention mass of the model.

All heads are trained at once and independently. Every step takes a few examples of each layer. The optimizer is Adam
with a warm-up and a cosine decay.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..gating.gate import Gate, Tensors
from ..kernels.planning.selection import select_top
from .examples import Example, stack

LEARNING_RATE = 0.01
WARM_UP = 20  # steps
BATCH = 4  # examples of each layer in a step
Groups = dict[tuple, Example]


@dataclass
class TrainingState:
    """Parameters by ``component/parameter``, ``[layers, heads, ...]``, the optimizer, and the finished steps."""

    parameters: Tensors
    optimizer: torch.optim.Optimizer
    step: int = 0

    @classmethod
    def create(cls, gate: Gate, components: Sequence[str], layers: int, heads: int, head_dim: int) -> TrainingState:
        """Return the state before the first step: every head has the parameters of the untrained gate."""
        parameters = {
            f"{component}/{name}": tensor.expand(layers, heads, *tensor.shape[1:]).clone().requires_grad_()
            for component in components
            for name, tensor in gate.initial(head_dim).items()
        }
        return cls(parameters, torch.optim.Adam(parameters.values()))

    def to_dict(self) -> dict:
        """Return plain values and tensors, for ``torch.save``."""
        parameters = {name: tensor.detach() for name, tensor in self.parameters.items()}
        return {"parameters": parameters, "optimizer": self.optimizer.state_dict(), "step": self.step}

    def restore(self, values: dict) -> None:
        """Continue from the values of `to_dict`."""
        with torch.no_grad():
            for name, tensor in self.parameters.items():
                tensor.copy_(values["parameters"][name])
        self.optimizer.load_state_dict(values["optimizer"])
        self.step = values["step"]

    def layer(self, component: str, layer: int) -> Tensors:
        """Return the parameters of one layer, ``[heads, ...]``."""
        return {
            name.removeprefix(f"{component}/"): tensor[layer]
            for name, tensor in self.parameters.items()
            if name.startswith(f"{component}/")
        }


def group(examples: Sequence[Example]) -> Groups:
    """Return the examples stacked by layer and shape."""
    groups = defaultdict(list)
    for example in examples:
        groups[example.group].append(example)
    return {key: stack(parts) for key, parts in groups.items()}


def train(
    gate: Gate,
    state: TrainingState,
    groups: Groups,
    steps: int,
    seed: int,
    after_step: Callable[[TrainingState, float], None] = lambda state, loss: None,
) -> None:
    """Train the parameters of a state up to ``steps`` steps.

    Args:
        gate: computes scores and the loss.
        state: changed in place. A state that was stored after some steps gives the same result as one that was not.
        groups: the examples.
        steps: of the whole training.
        seed: of the choice of examples.
        after_step: called with the state and the mean loss of the step.
    """
    while state.step < steps:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + state.step)
        for parameters in state.optimizer.param_groups:
            parameters["lr"] = LEARNING_RATE * _schedule(state.step, steps)
        state.optimizer.zero_grad()
        losses = []
        for example in groups.values():
            chosen = torch.randint(len(example.mass), (min(BATCH, len(example.mass)),), generator=generator)
            losses.append(example_loss(gate, select(example, chosen), state.layer(example.component, example.layer)))
        loss = torch.stack(losses).mean()
        loss.backward()
        state.optimizer.step()
        state.step += 1
        after_step(state, float(loss.detach()))


def example_loss(gate: Gate, example: Example, parameters: Tensors) -> Tensor:
    """Return the loss of a gate on stacked examples. The own block of a row, always kept, takes no part in it."""
    scores, mass, own = _scores(gate, example, parameters)
    return gate.loss(scores.masked_fill(own, -1e9), mass.masked_fill(own, 0.0))


@torch.no_grad()
def kept_mass(gate: Gate, groups: Groups, state: TrainingState, density: float) -> float:
    """Return the attention mass that the best blocks at a density hold by the scores of a gate, as a part of that of
    all blocks without text: the mean over rows, heads, layers and examples."""
    kept = []
    for example in groups.values():
        parameters = state.layer(example.component, example.layer)
        for item in range(len(example.mass)):
            kept.append(_kept(*_scores(gate, select(example, torch.tensor([item])), parameters), density))
    return float(torch.stack(kept).mean())


def best_mass(groups: Groups, density: float) -> float:
    """Return what `kept_mass` is for scores that are the mass: no gate keeps more."""
    kept = []
    for example in groups.values():
        mass = example.mass.float()
        kept.append(_kept(mass, mass, _own_blocks(example), density))
    return float(torch.stack(kept).mean())


def _kept(scores: Tensor, mass: Tensor, own: Tensor, density: float) -> Tensor:
    keep = select_top(scores.masked_fill(own, torch.inf), max(1, round(density * mass.shape[-1])))
    return ((mass * keep).sum(-1) / mass.sum(-1).clamp(min=1e-12)).mean()


def select(example: Example, items: Tensor) -> Example:
    """Return some items of stacked examples."""
    choose = lambda tensors: {name: tensor[items] for name, tensor in tensors.items()}
    tensors = (tensor[items] for tensor in (example.mass, example.own, example.columns))
    return Example(example.component, example.layer, choose(example.queries), choose(example.keys), *tensors)


def _scores(gate: Gate, example: Example, parameters: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores and mass of blocks without text, float32 ``[B, H, R, V]``, and the own blocks, bool
    ``[B, 1, R, V]``."""
    device = next(iter(parameters.values())).device
    queries, keys = (
        {name: x.float().to(device) for name, x in part.items()} for part in (example.queries, example.keys)
    )
    columns = example.columns[0].to(device)  # of examples of one group they are equal
    scores = gate.gate(queries, keys, parameters)[..., columns]
    mass = example.mass.float().to(device)
    return scores.expand_as(mass), mass, _own_blocks(example).to(device)


def _own_blocks(example: Example) -> Tensor:
    return (example.own[..., None] == torch.arange(example.mass.shape[-1]))[:, None]


def _schedule(step: int, steps: int) -> float:
    """Return the factor of the learning rate: linear to 1 in the warm-up, then a cosine to 0."""
    warm_up = min(WARM_UP, steps // 5)
    if step < warm_up:
        return (step + 1) / (warm_up + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up)))
