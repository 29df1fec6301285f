"""Text-encoder pretraining by token classification, before the transformer is trained.

The token of each colour word is classified by the colour, shape and direction of its object, the end-of-sentence token
by the drift of the background. Sentences are cheap, so this takes about a minute; the transformer then starts with
embeddings that carry the meaning of the prompt, which would take hours to learn through its own loss.
"""

import random
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .. import prompts
from ..scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Scene, Size, random_scene

DRIFTS = (STILL, *DIRECTIONS, "not mentioned")
CLASSES = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS), "drift": DRIFTS}
IGNORE_INDEX = -100  # label of tokens without a class, ignored by cross-entropy


def make_labels(tokenizer, scenes: Sequence[Scene], sentences: Sequence[str]):
    """Tokenize sentences and label their tokens.

    Returns:
        The tokenizer's batch, and for every attribute in ``CLASSES`` the class index of each token,
        ``{attribute: [B, tokens]}``, with ``IGNORE_INDEX`` for tokens without a class.
    """
    inputs = tokenizer(sentences, padding="longest", return_tensors="pt")
    labels = {name: torch.full_like(inputs.input_ids, IGNORE_INDEX) for name in CLASSES}
    for row, (scene, sentence) in enumerate(zip(scenes, sentences, strict=True)):
        for sprite in scene.sprites:
            is_colour = inputs.input_ids[row] == tokenizer.convert_tokens_to_ids(f"▁{sprite.colour}")
            for name in ("colour", "shape", "direction"):
                labels[name][row, is_colour] = CLASSES[name].index(getattr(sprite, name))
        drift = scene.drift if "background" in sentence else "not mentioned"
        labels["drift"][row, inputs.input_ids[row] == tokenizer.eos_token_id] = DRIFTS.index(drift)
    return inputs, labels


def make_batch(tokenizer, step: int, count: int):
    """Return inputs and labels of ``count`` random sentences without held-out pairs, deterministic in ``step``."""
    rng, scenes = random.Random(f"lesson {step}"), []
    while len(scenes) < count:
        scene = random_scene(Size(8, 64, 64), rng)
        if not prompts.is_held_out(scene):
            scenes.append(scene)
    return make_labels(tokenizer, scenes, [prompts.describe(scene, rng) for scene in scenes])


def pretrain_text_encoder(text_encoder, tokenizer, steps: int = 800, batch_size: int = 64, lr: float = 3e-3) -> float:
    """Train the text encoder in place, with linear classifiers that are discarded. Returns the last loss."""
    classifiers = torch.nn.ModuleDict(
        {name: torch.nn.Linear(text_encoder.config.d_model, len(classes)) for name, classes in CLASSES.items()}
    ).to(text_encoder.device)
    weights = [*text_encoder.parameters(), *classifiers.parameters()]
    optimizer = torch.optim.AdamW(weights, lr=lr, betas=(0.9, 0.98), weight_decay=0.01)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=steps)
    for step in range(steps):
        inputs, labels = make_batch(tokenizer, step, batch_size)
        loss = classification_loss(text_encoder, classifiers, inputs, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
    return loss.item()


def classification_loss(text_encoder, classifiers: torch.nn.ModuleDict, inputs, labels: dict[str, Tensor]) -> Tensor:
    """Return the sum over attributes of the cross-entropy, each averaged over its labelled tokens."""
    embeddings = text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    return sum(
        F.cross_entropy(classifiers[name](embeddings).flatten(0, 1), label.flatten(), ignore_index=IGNORE_INDEX)
        for name, label in labels.items()
    )
