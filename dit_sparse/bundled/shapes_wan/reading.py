"""Teach the text encoder to read before the transformer learns to draw.

Every colour word has to know its object: which shape it has and where it goes; the end of the sentence has to know
how the background drifts. Sentences cost next to nothing, so this takes a minute, and the transformer, which would
need hours to learn grammar through its own loss, starts with embeddings that say what is meant.
"""

import random

import torch
import torch.nn.functional as F

from . import prompts
from .scenes import COLOURS, DIRECTIONS, SHAPES, STILL, Size, random_scene

DRIFTS = (STILL, *DIRECTIONS, "unsaid")
ANSWERS = {"colour": tuple(COLOURS), "shape": SHAPES, "direction": tuple(DIRECTIONS), "drift": DRIFTS}
UNASKED = -100  # what cross entropy ignores


def questions(tokenizer, scenes, sentences):
    """Inputs for the encoder and, for every token and every key of `ANSWERS`, the number of the right answer.

    Returns the tokenizer's batch and {key: (sentences, tokens)}, UNASKED wherever a token is not asked.
    """
    inputs = tokenizer(sentences, padding="longest", return_tensors="pt")
    answers = {name: torch.full_like(inputs.input_ids, UNASKED) for name in ANSWERS}
    for row, (scene, sentence) in enumerate(zip(scenes, sentences, strict=True)):
        for sprite in scene.sprites:
            here = inputs.input_ids[row] == tokenizer.convert_tokens_to_ids(f"▁{sprite.colour}")
            for name in ("colour", "shape", "direction"):
                answers[name][row, here] = ANSWERS[name].index(getattr(sprite, name))
        drift = scene.drift if "background" in sentence else "unsaid"
        answers["drift"][row, inputs.input_ids[row] == tokenizer.eos_token_id] = DRIFTS.index(drift)
    return inputs, answers


def lesson(tokenizer, number, count):
    """Scenes drawn at random, none of them held out, and one sentence for each; the same for the same number."""
    rng, scenes = random.Random(f"lesson {number}"), []
    while len(scenes) < count:
        scene = random_scene(Size(8, 64, 64), rng)
        if not prompts.held_out(scene):
            scenes.append(scene)
    return questions(tokenizer, scenes, [prompts.describe(scene, rng) for scene in scenes])


def teach(text_encoder, tokenizer, lessons=800, count=64, rate=3e-3):
    """Train the encoder in place, together with linear readers that are thrown away. Returns the last loss."""
    readers = torch.nn.ModuleDict(
        {name: torch.nn.Linear(text_encoder.config.d_model, len(answers)) for name, answers in ANSWERS.items()}
    ).to(text_encoder.device)
    weights = [*text_encoder.parameters(), *readers.parameters()]
    optimiser = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, max_lr=rate, total_steps=lessons)
    for number in range(lessons):
        inputs, answers = lesson(tokenizer, number, count)
        loss = reading_loss(text_encoder, readers, inputs, answers)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        schedule.step()
    return loss.item()


def reading_loss(text_encoder, readers, inputs, answers):
    """Cross entropy of all answers, each kind averaged over the tokens that are asked."""
    state = text_encoder(inputs.input_ids, inputs.attention_mask).last_hidden_state
    return sum(
        F.cross_entropy(readers[name](state).flatten(0, 1), right.flatten(), ignore_index=UNASKED)
        for name, right in answers.items()
    )
