"""The bundled model: clips, judge, components, training and the shipped weights."""

import math
import random
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image
from transformers import AutoTokenizer

from dit_sparse.bundled import BUNDLED, TEXT_MODEL, bundled_prompts, first_frame, model_source
from dit_sparse.bundled.attention_mass import attention_weights, top_block_mass
from dit_sparse.bundled.shapes_wan import prompts
from dit_sparse.bundled.shapes_wan.autoencoder import CHANNELS, build_autoencoder, patchify
from dit_sparse.bundled.shapes_wan.build import build_text_encoder, build_tokenizer, build_transformer, encode_prompts
from dit_sparse.bundled.shapes_wan.card import write_card
from dit_sparse.bundled.shapes_wan.concentration import other_frames_mass
from dit_sparse.bundled.shapes_wan.conditioning import add_noise
from dit_sparse.bundled.shapes_wan.first_frame import draw, prompt_scene
from dit_sparse.bundled.shapes_wan.scenes import DIRECTIONS, Scene, Size, make_clip, random_scene, render
from dit_sparse.bundled.shapes_wan.training import text_pretraining
from dit_sparse.bundled.shapes_wan.training.curriculum import Stage
from dit_sparse.bundled.shapes_wan.training.frame_selection import FrameSelection
from dit_sparse.bundled.shapes_wan.training.text_pretraining import pretrain_text_encoder
from dit_sparse.bundled.shapes_wan.training.trainer import Trainer
from dit_sparse.bundled.training.optimizers import orthogonalise
from dit_sparse.bundled.training.schedule import Budget
from dit_sparse.generation.checks import check_clip
from dit_sparse.generation.generate import default_call, generate, load_pipeline

MAX_BYTES = 8e6
MODEL = Path(model_source(BUNDLED))
EVAL_MODELS = Path(__file__).parents[2] / "eval" / "models"
OPPOSITES = {"left": "right", "right": "left", "up": "down", "down": "up"}
TINY_CURRICULUM = (Stage(1.0, ((2, (4, 6, 6), 3),), (24,)),)


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
    folder = tmp_path_factory.mktemp("shapes-wan-i2v")
    trainer = Trainer(Budget(steps=1), TINY_CURRICULUM)
    trainer.step()
    trainer.export(folder)
    return folder


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


def test_the_scene_of_a_prompt_is_the_described_one():
    size = Size.from_tokens(14, 24, 24)
    for seed in range(60):
        scene = random_scene(size, random.Random(seed))
        subjects, drift = prompts.parse(text := prompts.describe_seeded(scene, seed))
        names = lambda sprites: sorted((s.colour, s.shape, s.direction) for s in sprites)
        assert names(subjects) == names(scene.sprites)
        assert drift == (scene.drift if "drifting" in text else "still")
        assert names(prompt_scene(text, size, seed).sprites) == names(subjects)


@pytest.mark.parametrize(
    "text", ["", "a cat", "a red circle", "red circle up, blue square up, green square up", "red up"]
)
def test_a_prompt_that_names_no_moving_shapes_is_refused(text):
    with pytest.raises(ValueError, match="shapes-wan-i2v draws one or two shapes"):
        prompts.parse(text)


def test_the_default_prompts_are_held_out_from_training():
    for text in bundled_prompts():
        subjects, drift = prompts.parse(text)
        assert len(subjects) == 1 or prompts.is_held_out(Scene(tuple(subjects), drift, 4))


def test_the_first_frame_is_that_of_the_clip_with_the_same_seed():
    size = Size.from_tokens(8, 16, 16)
    scene = prompt_scene("a red circle moves up", size, 5)
    video = render(scene, size, torch.Generator().manual_seed(5))
    drawn = torch.from_numpy(np.array(draw(scene, size, 5))).permute(2, 0, 1) / 127.5 - 1
    assert (drawn - video[:, 0]).abs().max() < 0.005


@pytest.mark.parametrize("drift", DIRECTIONS)
def test_a_drifting_background_moves_rigidly_without_a_seam(drift):
    size = Size.from_tokens(5, 12, 12)
    _, video = make_clip(3, size, lambda scene: scene.drift == drift)
    scene = Scene((), drift, 4)
    video = render(scene, size, torch.Generator().manual_seed(0))
    dx, dy = (4 * component for component in DIRECTIONS[drift])
    moved = video[:, :-1].roll((dy, dx), (2, 3))
    inside = (video[:, 1:] - moved).abs().amax((0, 1)) == 0
    assert inside.float().mean() == pytest.approx(1 - 4 / 48)


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
    pipeline = WanImageToVideoPipeline.from_pretrained(exported)
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


def test_a_mismatched_scene_differs_in_its_motion_only():
    rng = random.Random(0)
    for seed in range(100):
        scene, _ = make_clip(seed, Size(2, 64, 64))
        mismatched = prompts.make_mismatched(scene, rng).sprites
        pairs = list(zip(scene.sprites, mismatched, strict=True))
        assert all(replace(m, direction=s.direction) == s for s, m in pairs)
        assert any(s.direction != m.direction for s, m in pairs)


def test_a_subset_of_frames_keeps_the_positions_of_the_clip():
    """Attention between the shown frames sees the same distances as in the whole clip."""
    rope = build_transformer().rope
    selection, clip = FrameSelection(rope), torch.zeros(1, 12, 7, 8, 12)
    for whole, chosen in zip(rope(clip), _selected(selection, clip, (0, 2, 6)), strict=True):
        expected = whole.unflatten(1, (7, -1))[:, [0, 2, 6]].flatten(1, 2)
        torch.testing.assert_close(chosen, expected)
    assert torch.equal(selection(clip)[0], rope(clip)[0])


def _selected(selection, clip, frames):
    with selection.select(frames):
        return selection(clip[:, :, list(frames)])


def test_noise_and_timesteps_are_those_of_the_pipeline(exported):
    """The transformer is called by the pipeline with the inputs that training uses."""
    pipeline, calls = WanImageToVideoPipeline.from_pretrained(exported), []
    pipeline.set_progress_bar_config(disable=True)
    pipeline.transformer.register_forward_pre_hook(lambda _, args, kwargs: calls.append(kwargs), with_kwargs=True)
    size = Size.from_tokens(4, 8, 8)
    scene, video = make_clip(0, size)
    image = draw(scene, size, 0)
    pipeline(image=image, prompt="a", height=32, width=32, num_frames=3, num_inference_steps=2, output_type="latent")
    config = pipeline.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    latents = ((patchify(video) - mean) / std)[None]
    for call in calls:
        level = call["timestep"].max() / 1000
        noisy, timesteps = add_noise(latents, torch.zeros_like(latents), level[None])
        torch.testing.assert_close(call["timestep"], timesteps)
        torch.testing.assert_close(call["hidden_states"][:, :, 0], noisy[:, :, 0], atol=0.02, rtol=0)


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
    assert (tmp_path / "light.pt").stat().st_size < 16e6
    trainer.load(tmp_path / "light.pt")
    trainer.step()


def test_export_runs_in_the_stock_pipeline(exported):
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < MAX_BYTES
    pipeline = WanImageToVideoPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    assert all(part.dtype == torch.float32 for part in parts)
    image = Image.new("RGB", (32, 32))
    frames = pipeline(image, "a red circle", height=32, width=32, num_frames=3, num_inference_steps=2).frames
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
    return WanImageToVideoPipeline.from_pretrained(MODEL)


def test_bundled_card_is_the_one_written_from_its_reports(tmp_path):
    folder = shutil.copytree(MODEL, tmp_path / MODEL.name)
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
    """At high noise the clip's own prompt gives a lower error than no prompt, and that than the opposite motion."""
    size, count, level = Size.from_tokens(4, 12, 12), 16, 0.95
    is_single = lambda scene: len(scene.sprites) == 1
    scenes, videos = zip(*(make_clip(10**9 + seed, size, is_single) for seed in range(count)), strict=True)
    config = bundled.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    latents = (torch.stack([patchify(video) for video in videos]) - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    describe = lambda scene, **changes: describe_plainly([replace(scene.sprites[0], **changes)])
    matched = [describe(scene) for scene in scenes]
    other = [describe(scene, direction=OPPOSITES[scene.sprites[0].direction]) for scene in scenes]

    def error(texts):
        embeddings = encode_prompts(bundled.tokenizer, bundled.text_encoder, texts, 512)
        noisy, timesteps = add_noise(latents, noise, torch.full((count,), level))
        with torch.no_grad():
            velocity = bundled.transformer(noisy, timesteps, embeddings).sample
        return (velocity - (noise - latents))[:, :, 1:].square().mean().item()

    own = error(matched)
    assert own < error([""] * count) < error(other)


def test_a_generated_clip_begins_with_the_first_frame_of_its_prompt():
    pipe, prompt, call = load_pipeline(BUNDLED), "a red circle moves right", default_call(BUNDLED, small=True)
    call |= {"num_frames": 2, "height": 32, "width": 32, "num_inference_steps": 1}
    clip = generate(pipe, prompt, 3, call)
    expected = np.asarray(first_frame(prompt, 3, call))
    assert np.abs(clip.frames[0].astype(int) - expected).max() <= 2
    own = np.full((32, 32, 3), 128, np.uint8)
    clip = generate(pipe, "any text", 3, call | {"image": Image.fromarray(own)})
    assert np.abs(clip.frames[0].astype(int) - own).max() <= 2


def test_prompts_that_the_image_model_does_not_know_are_refused_before_it_is_loaded():
    with pytest.raises(ValueError, match="shapes-wan-i2v draws one or two shapes"):
        check_clip("a cat", 0, default_call(BUNDLED), model=BUNDLED)
    check_clip("a cat", 0, default_call(TEXT_MODEL), model=str(EVAL_MODELS / TEXT_MODEL))
