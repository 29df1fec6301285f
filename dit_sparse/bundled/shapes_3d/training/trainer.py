"""The trainer: optimization steps, averaged weights, checkpoints and export."""

import copy
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from ...training.optimizers import make_optimizers
from ...training.schedule import Budget, learning_rate_factor, save_atomically, scale_learning_rates, update_average
from ..model import CONFIG, SIGMA, PromptEncoder, SLatFlowModel, load_weights, noisy_variance, save_weights
from .batches import CURRICULUM, Batch, Stage, make_batch

MEAN_WEIGHT = 2.0  # weight of the squared error of the means over the sub-voxels of a cell


class Trainer:
    """Model, averaged weights (EMA), optimizers and progress of a training run.

    The budget counts the time of the processor, so that a busy machine does not shorten the training.

    Args:
        budget: length of the training.
        curriculum: stages in order.
        config: size of the model.
        device: "cpu" or "cuda".
        seed: of the weights and the batches.
        batch_scale: factor of the curriculum's batch sizes.
    """

    def __init__(
        self,
        budget: Budget,
        curriculum: Sequence[Stage] = CURRICULUM,
        config: dict = CONFIG,
        device: str = "cpu",
        seed: int = 0,
        batch_scale: int = 1,
    ):
        torch.manual_seed(seed)
        self.budget, self.curriculum, self.device, self.seed = budget, curriculum, device, seed
        self.batch_scale = batch_scale
        modules = {"model": SLatFlowModel(**config), "encoder": PromptEncoder(config["cond_dim"])}
        self.modules = nn.ModuleDict(modules).to(device)
        self.average = copy.deepcopy(self.modules).eval().requires_grad_(False)
        self.optimizers = make_optimizers(
            self.modules["model"].blocks, self.modules.parameters(), matrix_lr=0.02, lr=2e-3
        )
        self.step_count, self.elapsed = 0, 0.0

    @property
    def fraction(self) -> float:
        """Fraction of the budget used."""
        return self.budget.fraction(self.step_count, self.elapsed)

    def step(self) -> tuple[Tensor, Tensor]:
        """Run one optimization step. Returns noise levels and losses of its solids, ``[B]`` each."""
        start = time.process_time()
        scale_learning_rates(self.optimizers, learning_rate_factor(self.fraction))
        stage = next(stage for stage in self.curriculum if self.fraction <= stage.until)
        batch = make_batch(stage, self.seed * 1_000_003 + self.step_count, self.batch_scale)
        losses = batch_losses(self.modules, batch, self.device)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        losses.mean().backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        update_average(self.average.parameters(), self.modules.parameters(), self.step_count)
        self.step_count += 1
        self.elapsed += time.process_time() - start
        return batch.levels, losses.detach().cpu()

    def save(self, path: Path) -> None:
        """Write a checkpoint atomically."""
        state = {"step": self.step_count, "elapsed": self.elapsed}
        state |= {"modules": self.modules.state_dict(), "average": self.average.state_dict()}
        save_atomically(state | {"optimizers": [one.state_dict() for one in self.optimizers]}, path)

    def load(self, path: Path) -> None:
        """Continue from a checkpoint."""
        state = torch.load(path, map_location=self.device)
        self.step_count, self.elapsed = state["step"], state["elapsed"]
        self.modules.load_state_dict(state["modules"])
        self.average.load_state_dict(state["average"])
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of an exported model. Step count and optimizers keep their initial state."""
        for name, module in zip(("model", "encoder"), load_weights(folder), strict=True):
            for own in (self.modules, self.average):
                own[name].load_state_dict(module.state_dict())

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a folder for `Shapes3DPipeline`, with a training report."""
        save_weights(folder, self.average["model"], self.average["encoder"])
        resolutions = [resolution for stage in self.curriculum for _, resolution in stage.batches]
        report = {
            "steps": self.step_count,
            "cpu_minutes": round(self.elapsed / 60),
            "fraction": round(self.fraction, 3),
            "device": "a GPU" if self.device == "cuda" else "one CPU thread",
            "resolutions": [min(resolutions), max(resolutions)],
        }
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / "training.json").write_text(json.dumps(report) + "\n")


def batch_losses(modules: nn.ModuleDict, batch: Batch, device: str = "cpu") -> Tensor:
    """Return the loss of each solid of a batch, ``[B]``.

    The squared error of the network's output, in units of its variance, and of its means over the sub-voxels of a cell.
    The weights do not move the optimum of the flow.
    """
    sizes = batch.data.sizes
    data, coarse = (x.replace(x.feats.to(device)) for x in (batch.data, batch.coarse))
    levels, noise = batch.levels.to(device), batch.noise.to(device)
    level = levels.repeat_interleave(torch.tensor(sizes, device=device))[:, None]
    noisy = data.replace(torch.lerp(data.feats, noise, level))
    velocity = modules["model"](noisy, 1000 * levels, modules["encoder"](batch.scenes), coarse).feats
    error = velocity - (noise - data.feats)
    means = error.unflatten(1, (4, 8)).mean(2)
    by_cell = error.square().mean(1) + MEAN_WEIGHT * means.square().mean(1)
    return noisy_variance(levels) / SIGMA**2 * torch.stack([one.mean() for one in by_cell.split(sizes)])
