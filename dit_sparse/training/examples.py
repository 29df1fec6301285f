"""Examples to train a gate on: features of attention calls and the attention mass of their blocks.

A pipeline generates clips densely, and a few calls of each are stored as what a gate reads of them, which is 1 / block
of queries and keys or less, and the exact mass of some rows of blocks.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import ClassVar

import torch
from torch import Tensor

from ..density import video_blocks
from ..gating.gate import Gate, Tensors
from ..grid import Site
from ..kernels.planning.block_mass import block_mass_and_lse
from ..method import Method

QUERIES_PER_BLOCK = 16  # that the mass is computed from
MAX_ROWS = 128  # query blocks of a stored call


@dataclass
class Example:
    """One attention call. The tensors are float16 and on the CPU.

    Attributes:
        component, layer: transformer and layer of the call.
        queries, keys: features of R rows and of all blocks, ``[1, H|1, R|Qb, ...]``.
        mass: attention from the rows to the V blocks without text, ``[1, H, R, V]``.
        own: place of the own block of each row among these, int64 ``[1, R]``.
        columns: numbers of these blocks, int64 ``[1, V]``.
    """

    component: str
    layer: int
    queries: Tensors
    keys: Tensors
    mass: Tensor
    own: Tensor
    columns: Tensor

    @property
    def group(self) -> tuple:
        """Examples with equal groups can be stacked."""
        return self.component, self.layer, *self.mass.shape[1:], self.columns.max().item()

    @property
    def bytes(self) -> int:
        tensors = [*self.queries.values(), *self.keys.values(), self.mass]
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to_dict(self) -> dict:
        """Return plain values and tensors, for ``torch.save``."""
        return asdict(self)


def stack(examples: Sequence[Example]) -> Example:
    """Return examples of one group as one, with a batch dimension."""
    first, values = examples[0], {}
    for one in fields(Example):
        parts = [getattr(example, one.name) for example in examples]
        if isinstance(parts[0], Tensor):
            values[one.name] = torch.cat(parts)
        elif isinstance(parts[0], dict):
            values[one.name] = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return Example(first.component, first.layer, **values)


def example_of(gate: Gate, q: Tensor, k: Tensor, v: Tensor | None, site: Site, seed: int) -> Example:
    """Return the example of the first item of a call with ``q, k, v [B, H, N, D]``; ``seed`` chooses the rows."""
    q, k, v = (None if x is None else x[:1] for x in (q, k, v))
    mass, _ = block_mass_and_lse(q, k, site.block, rows=min(QUERIES_PER_BLOCK, site.block))
    k, v = (None if x is None else x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
    queries, keys = gate.features(q, k, v, site)
    video = video_blocks(site.grid, site.block, q.device)
    columns = torch.arange(mass.shape[-1], device=q.device) if video.index is None else video.index
    own = torch.randperm(len(columns), generator=torch.Generator().manual_seed(seed))[:MAX_ROWS].sort().values
    rows = columns[own.to(q.device)]
    store = lambda x: x.half().cpu()
    return Example(
        site.component,
        site.layer,
        {name: store(tensor[:, :, rows]) for name, tensor in queries.items()},
        {name: store(tensor) for name, tensor in keys.items()},
        store(mass[:, :, rows[:, None], columns]),
        own[None],
        columns[None].cpu(),
    )


@dataclass
class Recorder:
    """Receives the examples of one clip.

    Attributes:
        max_bytes: limit of the examples. Calls are left out evenly to stay below it.
        turn: number of the clip, so that each clip leaves out others.
        steps: denoising steps to store.
    """

    max_bytes: int
    turn: int
    steps: tuple[int, ...]
    examples: list[Example] = field(default_factory=list)
    shape: tuple[int, int, int] | None = None  # layers, heads, head_dim
    _calls: int = 0
    _allowed: int | None = None

    def add(self, gate: Gate, q: Tensor, k: Tensor, v: Tensor | None, site: Site) -> None:
        """Store a call, or leave it out."""
        self.shape = self.shape or (site.layers, q.shape[1], q.shape[3])
        total, number = len(self.steps) * site.layers, self._calls + self.turn
        self._calls += 1
        if self._allowed is not None and (number * self._allowed) // total == ((number + 1) * self._allowed) // total:
            return
        example = example_of(gate, q, k, v, site, seed=number)
        if self._allowed is None:
            self._allowed = max(1, min(total, self.max_bytes // example.bytes))
        self.examples.append(example)


@dataclass(frozen=True, kw_only=True)
class Capture(Method):
    """Dense attention that stores examples for a gate.

    Attributes:
        gate: the gate to train.
        recorder: receives the examples.
    """

    needs_values: ClassVar[bool] = True

    gate: Gate
    recorder: Recorder = field(compare=False)

    def plan(self, q: Tensor, k: Tensor, v: Tensor | None, site: Site, memory: dict) -> None:
        if site.step in self.recorder.steps:
            self.recorder.add(self.gate, q, k, v, site)
