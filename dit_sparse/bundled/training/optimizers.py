"""Optimizers: Muon for the matrices of the transformer blocks, AdamW for all other weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)  # coefficients of the quintic iteration


class Muon(torch.optim.Optimizer):
    """Muon (K. Jordan, 2024): momentum whose update is orthogonalised, for matrices.

    Unlike `torch.optim.Muon` it processes all matrices of one shape as one batch and in the precision of the weights,
    which is several times faster on CPUs without bfloat16 units.

    Args:
        matrices: parameters with two dimensions.
        lr: learning rate.
        momentum: decay of the gradient average; updates use Nesterov momentum.
    """

    def __init__(self, matrices: Iterable[Tensor], lr: float, momentum: float = 0.95):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self) -> None:
        """Update all matrices."""
        for group in self.param_groups:
            updates = torch.stack([self._nesterov(matrix, group["momentum"]) for matrix in group["params"]])
            rows, columns = updates.shape[1:]
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_sub_(group["params"], list(scale * orthogonalise(updates)))

    def _nesterov(self, matrix: Tensor, momentum: float) -> Tensor:
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average = state["average"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonalise(batch: Tensor, iterations: int = 5) -> Tensor:
    """Move all singular values of each matrix in ``batch [B, rows, columns]`` towards 1 by Newton-Schulz steps."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if tall else batch
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    a, b, c = NEWTON_SCHULZ
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


def make_optimizers(
    blocks: torch.nn.Module, weights: Iterable[Tensor], matrix_lr: float = 0.01, lr: float = 1.2e-3
) -> tuple[Muon, torch.optim.AdamW]:
    """Return optimizers for all weights. Each group keeps its peak rate in ``base_lr``, which the schedule scales.

    Args:
        blocks: the transformer blocks, whose matrices Muon updates.
        weights: all weights of the model, with those of the blocks.
        matrix_lr, lr: peak learning rates of Muon and of AdamW.
    """
    matrices = [p for p in blocks.parameters() if p.ndim == 2]
    in_muon = {id(p) for p in matrices}
    rest = [p for p in weights if id(p) not in in_muon]
    adamw = torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.97), weight_decay=0.0)
    optimizers = (Muon(matrices, matrix_lr), adamw)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["base_lr"] = group["lr"]
    return optimizers
