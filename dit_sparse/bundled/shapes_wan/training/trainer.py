"""The trainer: optimization steps, averaged weights, checkpoints and export."""

import copy
import json
import math
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from diffusers import WanTransformer3DModel
from torch import Tensor
from transformers import UMT5EncoderModel

from ...training.optimizers import make_optimizers
from ...training.schedule import (
    Budget,
    learning_rate_factor,
    save_atomically,
    scale_learning_rates,
    update_average,
)
from ..build import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    encode_prompts,
    latent_statistics,
    save_pipeline,
)
from ..conditioning import add_noise
from .batches import Batch, make_batch
from .curriculum import CURRICULUM, Stage
from .frame_selection import FrameSelection
from .loss import CONTRAST_NOISE_LEVELS, contrast_loss, multiscale_loss
from .temporal_bias import TemporalBias


class Trainer:
    """Model, averaged weights (EMA), optimizers and progress of a training run.

    Each step splits its work into shards, small batches in threads of their own that synchronise only at the end of
    the step. On a shared machine, threads inside an operation would mostly wait for each other.

    Args:
        budget: length of the training.
        curriculum: stages in order.
        device: "cpu" or "cuda".
        seed: of the weights and the batches.
        shards: number of threads.
        batch_scale: factor of the curriculum's batch sizes.
    """

    def __init__(
        self,
        budget: Budget,
        curriculum: Sequence[Stage] = CURRICULUM,
        device: str = "cpu",
        seed: int = 0,
        shards: int = 2,
        batch_scale: int = 1,
    ):
        torch.manual_seed(seed)
        self.budget, self.curriculum, self.device, self.seed = budget, curriculum, device, seed
        self.shards, self.batch_scale = shards, batch_scale
        self.tokenizer = build_tokenizer()
        self.statistics = latent_statistics()
        self.text_encoder = build_text_encoder(self.tokenizer).to(device)
        self.transformer = build_transformer().to(device)
        self.ema = copy.deepcopy(self.transformer).eval().requires_grad_(False)
        self.transformer.rope = FrameSelection(self.transformer.rope)
        self.temporal_bias = TemporalBias(self.transformer)
        self.optimizers = make_optimizers(self.transformer.blocks, self.transformer.parameters())
        self.step_count, self.elapsed = 0, 0.0

    @property
    def fraction(self) -> float:
        """Fraction of the budget used."""
        return self.budget.fraction(self.step_count, self.elapsed)

    def step(self) -> tuple[Tensor, Tensor]:
        """Run one optimization step. Returns noise levels and losses of its clips, ``[B]`` each."""
        start = time.monotonic()
        scale_learning_rates(self.optimizers, learning_rate_factor(self.fraction))
        with ThreadPoolExecutor(self.shards) as pool:
            levels, losses, gradients = zip(*pool.map(self._run_shard, range(self.shards)), strict=True)
        for parameter, *parts in zip(self.transformer.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self.transformer.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
        self.temporal_bias.apply()
        update_average(self.ema.parameters(), self.transformer.parameters(), self.step_count)
        self.step_count += 1
        self.elapsed += time.monotonic() - start
        return torch.cat(levels).cpu(), torch.cat(losses).cpu()

    def _run_shard(self, shard: int) -> tuple[Tensor, Tensor, tuple[Tensor, ...]]:
        """Return noise levels and losses, ``[B]`` each, and the gradients of one shard."""
        stage = next(s for s in self.curriculum if self.fraction <= s.until)
        number = (self.seed * 1_000_003 + self.step_count) * self.shards + shard
        batch = make_batch(stage, number, self.statistics, self.batch_scale).to(self.device)
        half_precision = torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device != "cpu")
        with half_precision, self.transformer.rope.select(batch.frames):
            losses = self._losses(batch)
        return batch.levels, losses.detach(), torch.autograd.grad(losses.mean(), list(self.transformer.parameters()))

    def _losses(self, batch: Batch) -> Tensor:
        """Return the loss of each clip, ``[B]``, with the contrast loss where a mismatched prompt applies."""
        losses = self._flow_losses(batch, batch.texts, slice(None))
        low, high = CONTRAST_NOISE_LEVELS
        pairs = zip(batch.texts, batch.mismatched_texts, strict=True)
        differs = torch.tensor([text != other for text, other in pairs], device=batch.levels.device)
        rows = ((batch.levels > low) & (batch.levels < high) & differs).nonzero().flatten()
        if not len(rows):
            return losses
        mismatched_losses = self._flow_losses(batch, [batch.mismatched_texts[row] for row in rows.tolist()], rows)
        return losses.index_add(0, rows, contrast_loss(losses[rows], mismatched_losses))

    def _flow_losses(self, batch: Batch, texts: list[str], rows: Tensor | slice) -> Tensor:
        """Return the loss of some clips of a batch with these prompts, without their first frame, ``[B]``."""
        latents, noise = batch.latents[rows], batch.noise[rows]
        with torch.no_grad():
            embeddings = encode_prompts(self.tokenizer, self.text_encoder, texts, batch.text_length)
        noisy, timesteps = add_noise(latents, noise, batch.levels[rows])
        (velocity,) = self.transformer(
            hidden_states=noisy, timestep=timesteps, encoder_hidden_states=embeddings, return_dict=False
        )
        error = velocity.float() - (noise - latents)
        return multiscale_loss(error[:, :, 1:], batch.weights[rows][:, 1:])

    def _modules(self) -> dict[str, torch.nn.Module]:
        """Return the modules by their keys in a checkpoint."""
        return {"text_encoder": self.text_encoder, "student": self.transformer, "average": self.ema}

    def save(self, path: Path, light: bool = False) -> None:
        """Write a checkpoint atomically.

        Args:
            light: store float16 weights and no optimizer state.
        """
        state = {"step": self.step_count, "elapsed": self.elapsed}
        for name, module in self._modules().items():
            weights = module.state_dict()
            state[name] = {key: value.half() for key, value in weights.items()} if light else weights
        if not light:
            state["optimisers"] = [optimizer.state_dict() for optimizer in self.optimizers]
        save_atomically(state, path)

    def load(self, path: Path) -> None:
        """Load a checkpoint. With a light one the optimizers keep their initial state."""
        state = torch.load(path, map_location=self.device)
        self.step_count, self.elapsed = state["step"], state["elapsed"]
        for name, module in self._modules().items():
            module.load_state_dict(state[name])
        for optimizer, optimizer_state in zip(self.optimizers, state.get("optimisers", ()), strict=False):
            optimizer.load_state_dict(optimizer_state)

    def load_weights(self, folder: Path) -> None:
        """Load the weights of an exported model. Step count and optimizers keep their initial state."""
        self.text_encoder.load_state_dict(UMT5EncoderModel.from_pretrained(folder / "text_encoder").state_dict())
        weights = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
        self.transformer.load_state_dict(weights)
        self.ema.load_state_dict(weights)

    def export(self, folder: Path) -> None:
        """Write the averaged weights as a folder for `WanImageToVideoPipeline`, with a training report."""
        save_pipeline(folder, self.tokenizer, self.text_encoder, self.ema, self.statistics)
        report = {
            "steps": self.step_count,
            "minutes": round(self.elapsed / 60),
            "device": "a GPU" if self.device == "cuda" else f"{self.shards} CPU core{'s' * (self.shards > 1)}",
            "largest_tokens": max((shape for _, shape, _ in self.curriculum[-1].batches), key=math.prod),
        }
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / "training.json").write_text(json.dumps(report) + "\n")
