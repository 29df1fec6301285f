"""Train shapes-wan: `python -m dit_sparse.bundled.shapes_wan.train --minutes 130 --out DIR [--resume] [--device cuda]`.

Rectified flow as `WanPipeline` expects it. Batches depend only on the step number, and the curriculum and the
learning rate only on the fraction of the budget that is spent, so a resumed run continues where it left off.
Creating DIR/STOP, or SIGTERM, ends the run early and cleanly.
"""

import argparse
import copy
import json
import math
import os
import random
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from transformers import UMT5EncoderModel

from . import prompts
from .aside import Aside
from .autoencoder import fold
from .build import (
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    encode_prompts,
    latent_statistics,
    save_pipeline,
)
from .curriculum import CURRICULUM, Budget, draw_times, learning_rate_factor, spread_loss
from .optim import make_optimisers
from .reading import teach
from .scenes import Size, clip

CHECKPOINT = "checkpoint.pt"
UNPROMPTED = 0.12  # share of clips with an empty prompt, for classifier-free guidance
# With a prompt that gets something wrong, the same clip has to be predicted worse. The difference of the two losses is
# blind to everything but that, and so is its gradient, which would drown in the loss of the clip.
DECIDED = (0.8, 0.992)  # the noise levels at which it is decided what moves where
MARGIN = 0.3  # how much worse, of the loss with the right prompt
CONTRAST = 3.0  # weight
CONTRASTED = 0.4  # share of the clips; it is learnt soon and costs a second forward and backward pass
AVERAGING = 0.995  # decay of the averaged weights over a step


class Trainer:
    """The text encoder, the transformer, its running average, its optimisers, and the place in the curriculum.

    Each step works on `shards`, small batches in threads of their own that meet only at the end of the step: on a
    machine that is shared with others, threads that meet after every operation would mostly wait for each other.
    """

    def __init__(self, budget, curriculum=CURRICULUM, device="cpu", seed=0, shards=2, crowd=1):
        torch.manual_seed(seed)
        self.budget, self.curriculum, self.device, self.seed = budget, curriculum, device, seed
        self.shards, self.crowd = shards, crowd
        self.tokenizer = build_tokenizer()
        self.statistics = latent_statistics()
        self.text_encoder = build_text_encoder(self.tokenizer).to(device)
        self.student = build_transformer().to(device)
        self.average = copy.deepcopy(self.student).eval().requires_grad_(False)
        self.aside = Aside(self.student)
        self.optimisers = make_optimisers(self.student)
        self.step_count, self.elapsed = 0, 0.0

    @property
    def fraction(self):
        return self.budget.fraction(self.step_count, self.elapsed)

    def step(self):
        """One optimisation step. Returns noise levels and losses of its clips, each of shape (clips,)."""
        started = time.monotonic()
        self._set_rates(learning_rate_factor(self.fraction))
        with ThreadPoolExecutor(self.shards) as pool:
            times, losses, gradients = zip(*pool.map(self._shard, range(self.shards)), strict=True)
        for parameter, *parts in zip(self.student.parameters(), *gradients, strict=True):
            parameter.grad = torch.stack(parts).mean(0)
        torch.nn.utils.clip_grad_norm_(self.student.parameters(), 1.0)
        for optimiser in self.optimisers:
            optimiser.step()
        self.aside.hold()
        self._update_average()
        self.step_count += 1
        self.elapsed += time.monotonic() - started
        return torch.cat(times).cpu(), torch.cat(losses).cpu()

    def _shard(self, index):
        """Times and losses, each (clips,), and the gradients of one shard."""
        batch = self._batch(index)
        with torch.autocast(self.device, dtype=torch.bfloat16, enabled=self.device != "cpu"):
            losses = self._losses(*batch)
        return batch[2], losses.detach(), torch.autograd.grad(losses.mean(), list(self.student.parameters()))

    def _batch(self, shard):
        """Latents (clips, 48, frames, rows, columns), noise alike, times (clips,), prompts, text length."""
        stage = next(s for s in self.curriculum if self.fraction <= s.until)
        number = (self.seed * 1_000_003 + self.step_count) * self.shards + shard
        rng, generator = random.Random(number), torch.Generator().manual_seed(number)
        count, tokens = rng.choice(stage.batches)
        count, size = count * self.crowd, Size.of_tokens(*tokens)
        latents, texts, mistold = [], [], []
        for index in range(count):
            clip_seed = number * 4096 + index
            scene, video = clip(clip_seed, size, accept=lambda scene: not prompts.held_out(scene))
            latents.append(fold(video))
            unprompted = rng.random() < UNPROMPTED
            texts.append("" if unprompted else prompts.sentence(scene, clip_seed))
            plain = unprompted or rng.random() > CONTRASTED
            mistold.append(texts[-1] if plain else prompts.sentence(prompts.mistold(scene, rng), clip_seed))
        mean, std = (torch.tensor(values).view(1, -1, 1, 1, 1) for values in self.statistics)
        latents = (torch.stack(latents) - mean) / std
        noise = torch.randn(latents.shape, generator=generator)
        tensors = (latents, noise, draw_times(count, generator))
        return *(tensor.to(self.device) for tensor in tensors), texts, mistold, rng.choice(stage.text_lengths)

    def _losses(self, latents, noise, times, texts, mistold, text_length):
        """The losses of all clips, and for those where it matters what a wrong prompt lacks to be worse."""
        losses = self._flow_losses(latents, noise, times, texts, text_length)
        said = torch.tensor([text != other for text, other in zip(texts, mistold, strict=True)], device=times.device)
        chosen = ((times > DECIDED[0]) & (times < DECIDED[1]) & said).nonzero().flatten()
        if not len(chosen):
            return losses
        others = [mistold[i] for i in chosen.tolist()]
        worse = self._flow_losses(latents[chosen], noise[chosen], times[chosen], others, text_length)
        lack = F.relu(MARGIN * losses[chosen].detach() + losses[chosen] - worse)
        return losses.index_add(0, chosen, CONTRAST * lack)

    def _flow_losses(self, latents, noise, times, texts, text_length):
        with torch.no_grad():
            embeddings = encode_prompts(self.tokenizer, self.text_encoder, texts, text_length)
        noisy = torch.lerp(latents, noise, times.view(-1, 1, 1, 1, 1))
        (velocity,) = self.student(
            hidden_states=noisy, timestep=1000 * times, encoder_hidden_states=embeddings, return_dict=False
        )
        return spread_loss(velocity.float() - (noise - latents))

    def _set_rates(self, factor):
        for optimiser in self.optimisers:
            for group in optimiser.param_groups:
                group["lr"] = group["base_lr"] * factor

    @torch.no_grad()
    def _update_average(self):
        # Early on the average is short, so that it forgets where the weights began.
        decay = min(AVERAGING, self.step_count / (self.step_count + 10))
        averages, weights = list(self.average.parameters()), list(self.student.parameters())
        torch._foreach_lerp_(averages, weights, 1 - decay)

    def save(self, path, light=False):
        """Write a checkpoint whole or not at all. A light one has half precision and no optimiser state."""
        state = {"step": self.step_count, "elapsed": self.elapsed}
        for name in ("text_encoder", "student", "average"):
            weights = getattr(self, name).state_dict()
            state[name] = {key: value.half() for key, value in weights.items()} if light else weights
        if not light:
            state["optimisers"] = [optimiser.state_dict() for optimiser in self.optimisers]
        aside = path.with_suffix(".part")
        torch.save(state, aside)
        os.replace(aside, path)

    def load(self, path):
        state = torch.load(path, map_location=self.device)
        self.step_count, self.elapsed = state["step"], state["elapsed"]
        for name in ("text_encoder", "student", "average"):
            getattr(self, name).load_state_dict(state[name])
        for optimiser, saved in zip(self.optimisers, state.get("optimisers", ()), strict=False):
            optimiser.load_state_dict(saved)

    def begin_with(self, folder):
        """Take the weights of an exported folder; the clock and the optimisers begin anew."""
        self.text_encoder.load_state_dict(UMT5EncoderModel.from_pretrained(folder / "text_encoder").state_dict())
        weights = WanTransformer3DModel.from_pretrained(folder / "transformer").state_dict()
        self.student.load_state_dict(weights)
        self.average.load_state_dict(weights)

    def export(self, folder):
        """Write the averaged weights as a folder for `WanPipeline.from_pretrained`, with a note on the training."""
        save_pipeline(folder, self.tokenizer, self.text_encoder, self.average, self.statistics)
        note = {
            "steps": self.step_count,
            "minutes": round(self.elapsed / 60),
            "device": "a GPU" if self.device == "cuda" else f"{self.shards} CPU cores",
            "largest_tokens": max((shape for _, shape in self.curriculum[-1].batches), key=math.prod),
        }
        (folder / "reports").mkdir(exist_ok=True)
        (folder / "reports" / "training.json").write_text(json.dumps(note) + "\n")


class Meter:
    """Running losses at low, middle and high noise, printed now and then."""

    def __init__(self, every=20.0):
        self.every, self.printed, self.losses = every, time.monotonic(), [None, None, None]

    def update(self, times, losses):
        for third, loss in zip((times * 3).long().clamp(max=2).tolist(), losses.tolist(), strict=True):
            old = self.losses[third]
            self.losses[third] = loss if old is None else 0.97 * old + 0.03 * loss

    def report(self, trainer, force=False):
        if not force and time.monotonic() - self.printed < self.every:
            return
        self.printed = time.monotonic()
        low, middle, high = (math.nan if loss is None else loss for loss in self.losses)
        pace, left = (
            trainer.elapsed / max(1, trainer.step_count),
            (1 - trainer.fraction) * trainer.budget.minutes,
        )
        print(
            f"step {trainer.step_count:5d}  {trainer.fraction:6.1%}  low {low:.4f}  mid {middle:.4f}  "
            f"high {high:.4f}  {pace:.2f} s/step  {left:.0f} min left",
            flush=True,
        )


def run(trainer, out, light=False, every=180.0):
    """Train until the budget is spent or somebody asks to stop; then save and export."""
    stopping = []
    signal.signal(signal.SIGTERM, lambda *_: stopping.append(True))
    meter, saved = Meter(), time.monotonic()
    while trainer.fraction < 1 and not stopping and not (out / "STOP").exists():
        meter.update(*trainer.step())
        meter.report(trainer)
        if time.monotonic() - saved > every:
            trainer.save(out / CHECKPOINT, light)
            saved = time.monotonic()
    meter.report(trainer, force=True)
    trainer.save(out / CHECKPOINT, light)
    trainer.export(out / "shapes-wan")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=130.0)
    parser.add_argument("--steps", type=int, help="a budget in steps instead of minutes")
    parser.add_argument("--out", type=Path, default=Path("shapes-out"))
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--start", type=Path, help="begin with the weights of an exported folder")
    parser.add_argument("--light", action="store_true", help="checkpoints under 16 MB, without optimiser state")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads, each with its own part of a batch")
    parser.add_argument("--export", nargs=2, type=Path, metavar=("CHECKPOINT", "FOLDER"), help="only export")
    options = parser.parse_args()
    torch.set_num_threads(1)
    shards, crowd = (options.threads, 1) if options.device == "cpu" else (1, 16)
    trainer = Trainer(Budget(options.minutes, options.steps), device=options.device, shards=shards, crowd=crowd)
    if options.export:
        trainer.load(options.export[0])
        return trainer.export(options.export[1])
    options.out.mkdir(parents=True, exist_ok=True)
    if options.resume and (options.out / CHECKPOINT).exists():
        trainer.load(options.out / CHECKPOINT)
    elif options.start:
        trainer.begin_with(options.start)
    else:
        print(f"reading lessons: loss {teach(trainer.text_encoder, trainer.tokenizer):.4f}", flush=True)
    return run(trainer, options.out, options.light)


if __name__ == "__main__":
    main()
