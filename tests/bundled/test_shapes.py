"""The bundled model: clips, judge, components, training and the shipped weights."""

import math
import random
import shutil
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from dit_sparse.bundled.shapes_wan import prompts
from dit_sparse.bundled.shapes_wan.autoencoder import CHANNELS, build_autoencoder, patchify
from dit_sparse.bundled.shapes_wan.build import build_text_encoder, build_tokenizer, encode_prompts
from dit_sparse.bundled.shapes_wan.card import write_card
from dit_sparse.bundled.shapes_wan.concentration import attention_weights, other_frames_mass, top_block_mass
from dit_sparse.bundled.shapes_wan.judge import accuracy, held_out_tasks, judge
from dit_sparse.bundled.shapes_wan.scenes import SHAPES, Scene, Size, make_clip, random_scene
from dit_sparse.bundled.shapes_wan.training import text_pretraining
from dit_sparse.bundled.shapes_wan.training.curriculum import Budget, Stage
from dit_sparse.bundled.shapes_wan.training.optimizers import orthogonalise
from dit_sparse.bundled.shapes_wan.training.text_pretraining import pretrain_text_encoder
from dit_sparse.bundled.shapes_wan.training.trainer import Trainer

MAX_BYTES = 16e6
TINY_CURRICULUM = (Stage(1.0, ((2, (2, 4, 4)),), (24,)),)


def describe_plainly(sprites):
    """Return the simplest prompt of a scene, such as "a red circle moves right while a blue square moves up"."""
    return " while ".join(f"a {s.colour} {s.shape} moves {s.direction}" for s in sprites)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes-wan")
    trainer = Trainer(Budget(steps=1), TINY_CURRICULUM)
    trainer.step()
    trainer.export(folder)
    return folder


@pytest.mark.parametrize("tokens", [(8, 16, 16), (16, 12, 12), (4, 24, 24)])
def test_judge_agrees_with_the_rendered_scene(tokens):
    size = Size.from_tokens(*tokens)
    verdicts = []
    for seed in range(20):
        scene, video = make_clip(seed, size)
        verdicts += [judge(video, sprite) for sprite in scene.sprites]
    assert accuracy(verdicts)["everything"] >= 0.98


def test_judge_rejects_the_wrong_sprite():
    size = Size.from_tokens(8, 16, 16)
    videos = [make_clip(seed, size) for seed in range(12)]
    for (scene, _), (other, video) in pairwise(videos):
        sprite, present = scene.sprites[0], {(s.colour, s.shape, s.direction) for s in other.sprites}
        verdict = judge(video, sprite)
        accepted = verdict.colour and verdict.shape and verdict.direction
        assert accepted == ((sprite.colour, sprite.shape, sprite.direction) in present)


def test_judge_classifies_shapes_with_ragged_outlines_next_to_a_copy():
    size, correct = Size.from_tokens(6, 16, 32), []
    for seed in range(24):
        scene, video = make_clip(seed, size, accept=lambda scene: len(scene.sprites) == 1)
        rng = torch.Generator().manual_seed(seed)
        shifted = torch.stack([video.roll((dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        choice = torch.randint(9, (1, 1, *video.shape[1:]), generator=rng).expand(1, *video.shape)
        video = shifted.gather(0, choice)[0]
        doubled = torch.where(video.std(dim=0) > 0.3, video, video.roll(32 * 2, 3))
        correct.append(judge(doubled, scene.sprites[0]).shape)
    assert sum(correct) >= 23


def test_clips_are_deterministic_and_sprites_stay_inside():
    size = Size(11, 44, 60)
    for seed in range(20):
        scene, video = make_clip(seed, size)
        scene_again, video_again = make_clip(seed, size)
        assert scene == scene_again and torch.equal(video, video_again)
        assert video.shape == (3, 11, 44, 60) and video.abs().max() <= 1
        for sprite in scene.sprites:
            x, y = sprite.positions(size.frames).unbind(1)
            assert x.min() >= 0 and y.min() >= 0 and x.max() < size.width and y.max() < size.height


def test_held_out_pairs_are_fixed_and_never_trained_on():
    tasks = held_out_tasks()
    assert len(tasks) == 60 and tasks == held_out_tasks()
    pairs = [task.sprites for task in tasks if len(task.sprites) == 2]
    assert len(pairs) == 36
    accept = lambda scene: not prompts.is_held_out(scene)
    trained = [make_clip(seed, Size(2, 64, 64), accept)[0].sprites for seed in range(100)]
    held_out = [{(s.colour, s.shape, s.direction) for s in pair} for pair in pairs]
    assert not any({(s.colour, s.shape, s.direction) for s in sprites} in held_out for sprites in trained)


def test_autoencoder_is_the_identity():
    _, video = make_clip(3, Size(9, 32, 40))
    autoencoder = build_autoencoder([0.0] * CHANNELS, [1.0] * CHANNELS)
    latents = autoencoder.encode(video[None]).latent_dist
    assert (latents.mode()[0] - patchify(video)).abs().max() < 2e-3
    assert (latents.sample() - latents.mode()).abs().max() < 1e-5
    assert (autoencoder.decode(latents.mode()).sample[0] - video).abs().max() < 2e-3


def test_tokenizer_encodes_any_text_and_every_prompt_by_words(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("").input_ids == [1]
    for text in ("Ein röter Kreis, 7 mal!", "日本 <b>", "a redcircle moves"):
        assert tokenizer(text).input_ids[-1] == 1
    for seed in range(60):
        scene, _ = make_clip(seed, Size(2, 32, 32))
        text = prompts.describe_seeded(scene, seed)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 1 <= 24 and not {0, 2} & set(ids)


def test_prompts_are_encoded_as_the_pipeline_does(exported):
    pipeline = WanPipeline.from_pretrained(exported)
    texts = ["a red circle moves right", "a blue square is moving to the left on a still background"]
    expected, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=48)
    torch.testing.assert_close(encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, 48), expected)


def test_labels_of_a_colour_word_are_those_of_its_object():
    tokenizer = build_tokenizer()
    scene, _ = make_clip(8, Size(2, 64, 64), accept=lambda scene: len(scene.sprites) == 2 and scene.drift == "up")
    first, second = scene.sprites
    sentences = [
        describe_plainly(scene.sprites),
        f"{describe_plainly([second])} over a background drifting up",
    ]
    inputs, labels = text_pretraining.make_labels(tokenizer, [scene, Scene((second,), "up", 4)], sentences)
    for row, sprites in enumerate([(first, second), (second,)]):
        tokens = (labels["shape"][row] != text_pretraining.IGNORE_INDEX).nonzero().flatten().tolist()
        assert len(tokens) == len(sprites)
        for token, sprite in zip(tokens, sprites, strict=True):
            assert tokenizer.convert_ids_to_tokens(inputs.input_ids[row, token].item()) == f"▁{sprite.colour}"
            for name in ("colour", "shape", "direction"):
                assert text_pretraining.CLASSES[name][labels[name][row, token]] == getattr(sprite, name)
    drifts = labels["drift"][inputs.input_ids == tokenizer.eos_token_id].tolist()
    assert [text_pretraining.DRIFTS[drift] for drift in drifts] == ["not mentioned", "up"]


def test_text_pretraining_reduces_the_loss():
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    initial_loss = pretrain_text_encoder(text_encoder, tokenizer, steps=1, batch_size=16)
    assert pretrain_text_encoder(text_encoder, tokenizer, steps=40, batch_size=16) < 0.75 * initial_loss


def test_a_mismatched_scene_has_one_kind_of_error():
    rng, kinds = random.Random(0), set()
    for seed in range(100):
        scene, _ = make_clip(seed, Size(2, 64, 64))
        mismatched = prompts.make_mismatched(scene, rng).sprites
        if len(mismatched) < len(scene.sprites):
            assert len(mismatched) == 1 and mismatched[0] in scene.sprites
            kinds.add("missing")
            continue
        pairs = list(zip(scene.sprites, mismatched, strict=True))
        changed = {f for f in ("colour", "shape", "direction") for s, m in pairs if getattr(s, f) != getattr(m, f)}
        assert len(changed) == 1
        if changed == {"direction"}:
            assert all({s.direction, m.direction} in ({"left", "right"}, {"up", "down"}) for s, m in pairs)
        elif changed == {"shape"}:
            assert all(s.shape != m.shape in SHAPES for s, m in pairs)
        else:
            assert [m.colour for m in mismatched] == [s.colour for s in reversed(scene.sprites)]
        kinds |= changed
        scenes = (scene, replace(scene, sprites=mismatched))
        matched_words, mismatched_words = (prompts.describe_seeded(s, seed).split() for s in scenes)
        assert len(matched_words) == len(mismatched_words), "the wording is the same otherwise"
    assert kinds == {"missing", "colour", "shape", "direction"}


def test_temporal_biases_favour_later_frames_in_one_head_and_earlier_frames_in_another():
    """The biases alone, rotated by RoPE, give larger scores to later or to earlier frames."""
    trainer = Trainer(Budget(steps=3), TINY_CURRICULUM)
    trainer.step()
    for block in trainer.transformer.blocks[2:]:
        query, key = block.attn1.to_q.bias, block.attn1.to_k.bias
        for head, later in ((0, True), (1, False)):
            scores = {
                frames: sum(
                    (query[i] * math.cos(turn * frames) + query[i + 1] * math.sin(turn * frames)) * key[i]
                    for i, turn in ((64 * head, 1.0), (64 * head + 2, 10_000 ** (-2 / 24)))
                )
                for frames in (-1, 1)
            }
            assert (scores[1] > scores[-1] + 0.1) == later and scores[1] != scores[-1]


def test_held_out_tasks_reject_frames_too_small_for_pairs():
    with pytest.raises(ValueError, match="at least 64 pixels for pairs of sprites, got 48x48"):
        held_out_tasks(size=Size.from_tokens(8, 12, 12))


def test_resuming_continues_exactly(tmp_path):
    uninterrupted, first, second = (Trainer(Budget(steps=4), TINY_CURRICULUM) for _ in range(3))
    for _ in range(4):
        uninterrupted.step()
    for _ in range(2):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    keys = {"step", "elapsed", "text_encoder", "student", "average", "optimisers"}
    assert torch.load(tmp_path / "checkpoint.pt").keys() == keys, "existing checkpoints have these keys"
    second.load(tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.step()
    for name in ("transformer", "ema"):
        expected, resumed = getattr(uninterrupted, name).state_dict(), getattr(second, name).state_dict()
        assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert second.fraction == 1


def test_a_light_checkpoint_is_small_and_loads(tmp_path):
    trainer = Trainer(Budget(steps=2), TINY_CURRICULUM)
    trainer.step()
    trainer.save(tmp_path / "light.pt", light=True)
    assert (tmp_path / "light.pt").stat().st_size < MAX_BYTES
    trainer.load(tmp_path / "light.pt")
    trainer.step()


def test_export_runs_in_the_stock_pipeline(exported):
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < MAX_BYTES
    pipeline = WanPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    assert all(part.dtype == torch.float32 for part in parts)
    frames = pipeline("a red circle", height=32, width=32, num_frames=3, num_inference_steps=2).frames
    assert frames.shape == (1, 4, 32, 32, 3)


def test_muon_orthogonalises_matrices():
    matrices = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


def test_concentration_of_uniform_and_of_sharp_attention():
    uniform = torch.full((1, 2, 512, 512), 1 / 512)
    torch.testing.assert_close(top_block_mass(uniform), torch.full((2,), 0.25))
    torch.testing.assert_close(other_frames_mass(uniform, 4), torch.full((2,), 0.75))
    key = torch.nn.functional.one_hot(torch.arange(512) // 64, 8).float().expand(1, 2, -1, -1)
    sharp = attention_weights(100 * key, key)
    assert top_block_mass(sharp).min() > 0.99
    assert other_frames_mass(sharp, 4).max() < 0.01
    ragged = torch.full((1, 2, 500, 500), 1 / 500)  # the last block holds 52 tokens
    torch.testing.assert_close(top_block_mass(ragged), torch.full((2,), 128 / 500))


@pytest.fixture(scope="module")
def bundled():
    return WanPipeline.from_pretrained(files("dit_sparse") / "assets" / "shapes-wan")


def test_bundled_card_is_the_one_written_from_its_reports(tmp_path):
    folder = shutil.copytree(files("dit_sparse") / "assets" / "shapes-wan", tmp_path / "shapes-wan")
    expected = (folder / "README.md").read_text()
    write_card(folder)
    assert (folder / "README.md").read_text() == expected


def test_bundled_text_encoder_generalises_to_held_out_pairs(bundled):
    """A linear probe fitted on training sentences classifies the attributes in held-out ones."""
    rng, scenes = random.Random(0), []
    while len(scenes) < 100:
        scene = random_scene(Size(8, 64, 64), rng)
        if prompts.is_held_out(scene):
            scenes.append(scene)
    trained = text_pretraining.make_batch(bundled.tokenizer, 10**6, 300)
    sentences = [prompts.describe(scene, rng) for scene in scenes]
    held_out = text_pretraining.make_labels(bundled.tokenizer, scenes, sentences)
    with torch.no_grad():
        states = [bundled.text_encoder(i.input_ids, i.attention_mask).last_hidden_state for i, _ in (trained, held_out)]
    for name in text_pretraining.CLASSES:
        (x, y), (x_held_out, y_held_out) = (
            (state[labels[name] >= 0], labels[name][labels[name] >= 0])
            for state, (_, labels) in zip(states, (trained, held_out), strict=True)
        )
        probe = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y).float()).solution
        assert ((x_held_out @ probe).argmax(1) == y_held_out).float().mean() > 0.97, name


def test_bundled_model_follows_the_prompt_with_full_padding(bundled):
    """At high noise the clip's own prompt gives a lower error than no prompt, another clip's or a mismatched prompt."""
    size, count, level = Size.from_tokens(4, 12, 12), 16, 0.95
    is_single = lambda scene: len(scene.sprites) == 1
    scenes, videos = zip(*(make_clip(10**9 + seed, size, is_single) for seed in range(count)), strict=True)
    config = bundled.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    latents = (torch.stack([patchify(video) for video in videos]) - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    describe = lambda scene, **changes: describe_plainly([replace(scene.sprites[0], **changes)])
    matched = [describe(scene) for scene in scenes]
    reversed_ = [describe(scene, direction=prompts.OPPOSITES[scene.sprites[0].direction]) for scene in scenes]
    reshaped = [describe(scene, shape=SHAPES[SHAPES.index(scene.sprites[0].shape) - 1]) for scene in scenes]

    def error(texts):
        embeddings = encode_prompts(bundled.tokenizer, bundled.text_encoder, texts, 512)
        noisy, times = torch.lerp(latents, noise, level), torch.full((count,), 1000 * level)
        with torch.no_grad():
            velocity = bundled.transformer(noisy, times, embeddings).sample
        return (velocity - (noise - latents)).square().mean().item()

    own = error(matched)
    assert own < error([""] * count) < error(matched[1:] + matched[:1])
    assert own < min(error(reversed_), error(reshaped))
