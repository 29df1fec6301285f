"""Muon for the matrices of the transformer blocks, AdamW for everything else."""

import torch

QUINTIC = (3.4445, -4.7750, 2.0315)


class Muon(torch.optim.Optimizer):
    """Momentum whose steps are made orthogonal (K. Jordan, 2024), for matrices.

    Unlike `torch.optim.Muon` it treats all matrices of one shape in one batch and in the precision of the weights:
    several times faster on processors without bfloat16 units.
    """

    def __init__(self, matrices, lr, momentum=0.95):
        by_shape = {}
        for matrix in matrices:
            by_shape.setdefault(tuple(matrix.shape), []).append(matrix)
        super().__init__([{"params": group} for group in by_shape.values()], {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            directions = torch.stack([self._lookahead(matrix, group["momentum"]) for matrix in group["params"]])
            rows, columns = directions.shape[1:]
            scale = group["lr"] * max(1.0, rows / columns) ** 0.5
            torch._foreach_sub_(group["params"], list(scale * orthogonalised(directions)))

    def _lookahead(self, matrix, momentum):
        state = self.state[matrix]
        if not state:
            state["average"] = torch.zeros_like(matrix)
        average = state["average"].lerp_(matrix.grad, 1 - momentum)
        return matrix.grad.lerp(average, momentum)


def orthogonalised(batch, iterations=5):
    """Push all singular values of each matrix of (batch, rows, columns) towards one, by Newton-Schulz."""
    tall = batch.shape[1] > batch.shape[2]
    x = batch.mT if tall else batch
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-12)
    a, b, c = QUINTIC
    for _ in range(iterations):
        gram = x @ x.mT
        x = a * x + torch.baddbmm(gram, gram, gram, beta=b, alpha=c) @ x
    return x.mT if tall else x


def make_optimisers(transformer, matrix_rate=0.01, rate=1.2e-3):
    """Optimisers for all weights; they remember their rates as `base_lr`, which the schedule multiplies."""
    matrices = [p for p in transformer.blocks.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    rest = [p for p in transformer.parameters() if id(p) not in chosen]
    adamw = torch.optim.AdamW(rest, lr=rate, betas=(0.9, 0.97), weight_decay=0.0)
    optimisers = (Muon(matrices, matrix_rate), adamw)
    for optimiser in optimisers:
        for group in optimiser.param_groups:
            group["base_lr"] = group["lr"]
    return optimisers
