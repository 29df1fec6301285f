"""The bundled demo model: its clips, its judge, its parts, its training."""

import math
import random
from dataclasses import replace
from importlib.resources import files
from itertools import pairwise

import pytest
import torch
from diffusers import WanPipeline
from transformers import AutoTokenizer

from dit_sparse.bundled.shapes_wan import prompts, reading
from dit_sparse.bundled.shapes_wan.autoencoder import CHANNELS, build_autoencoder, fold
from dit_sparse.bundled.shapes_wan.build import build_text_encoder, build_tokenizer, encode_prompts
from dit_sparse.bundled.shapes_wan.concentration import attention_weights, best_blocks_share, other_frames_share
from dit_sparse.bundled.shapes_wan.curriculum import TINY, Budget
from dit_sparse.bundled.shapes_wan.judge import held_out_tasks, judge, shares
from dit_sparse.bundled.shapes_wan.optim import orthogonalised
from dit_sparse.bundled.shapes_wan.scenes import SHAPES, Scene, Size, clip, random_scene
from dit_sparse.bundled.shapes_wan.train import Trainer

LIMIT = 16e6


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("shapes-wan")
    trainer = Trainer(Budget(steps=1), TINY)
    trainer.step()
    trainer.export(folder)
    return folder


@pytest.mark.parametrize("tokens", [(8, 16, 16), (16, 12, 12), (4, 24, 24)])
def test_judge_sees_what_the_scene_says(tokens):
    size = Size.of_tokens(*tokens)
    verdicts = []
    for seed in range(40):
        scene, video = clip(seed, size)
        verdicts += [judge(video, sprite) for sprite in scene.sprites]
    assert shares(verdicts)["everything"] >= 0.98


def test_judge_rejects_the_wrong_sprite():
    size = Size.of_tokens(8, 16, 16)
    videos = [clip(seed, size) for seed in range(12)]
    for (scene, _), (other, video) in pairwise(videos):
        named, shown = scene.sprites[0], {(s.colour, s.shape, s.direction) for s in other.sprites}
        verdict = judge(video, named)
        right = verdict.colour and verdict.shape and verdict.direction
        assert right == ((named.colour, named.shape, named.direction) in shown)


def test_a_ragged_outline_and_a_second_object_do_not_hide_the_shape():
    size, right = Size.of_tokens(6, 16, 32), []
    for seed in range(24):
        scene, video = clip(seed, size, accept=lambda scene: len(scene.sprites) == 1)
        rng = torch.Generator().manual_seed(seed)
        ragged = torch.stack([video.roll((dy, dx), (2, 3)) for dy in (-1, 0, 1) for dx in (-1, 0, 1)])
        which = torch.randint(9, (1, 1, *video.shape[1:]), generator=rng).expand(1, *video.shape)
        video = ragged.gather(0, which)[0]
        doubled = torch.where(video.std(dim=0) > 0.3, video, video.roll(32 * 2, 3))
        right.append(judge(doubled, scene.sprites[0]).shape)
    assert sum(right) >= 23


def test_clips_are_deterministic_and_sprites_stay_inside():
    size = Size(11, 44, 60)
    for seed in range(20):
        scene, video = clip(seed, size)
        again, same = clip(seed, size)
        assert scene == again and torch.equal(video, same)
        assert video.shape == (3, 11, 44, 60) and video.abs().max() <= 1
        for sprite in scene.sprites:
            x, y = sprite.path(size.frames).unbind(1)
            assert x.min() >= 0 and y.min() >= 0 and x.max() < size.width and y.max() < size.height


def test_held_out_pairs_do_not_depend_on_the_wording():
    tasks = held_out_tasks()
    assert len(tasks) == 60 and tasks == held_out_tasks()
    pairs = [task.sprites for task in tasks if len(task.sprites) == 2]
    assert len(pairs) == 36
    seen = [clip(seed, Size(2, 32, 32), accept=lambda s: not prompts.held_out(s))[0].sprites for seed in range(100)]
    names = [{(s.colour, s.shape, s.direction) for s in pair} for pair in pairs]
    assert not any({(s.colour, s.shape, s.direction) for s in sprites} in names for sprites in seen)


def test_autoencoder_is_the_identity():
    _, video = clip(3, Size(9, 32, 40))
    autoencoder = build_autoencoder([0.0] * CHANNELS, [1.0] * CHANNELS)
    latents = autoencoder.encode(video[None]).latent_dist
    assert (latents.mode()[0] - fold(video)).abs().max() < 2e-3
    assert (latents.sample() - latents.mode()).abs().max() < 1e-5
    assert (autoencoder.decode(latents.mode()).sample[0] - video).abs().max() < 2e-3


def test_tokenizer_takes_any_text_and_knows_every_prompt(tmp_path):
    build_tokenizer().save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    assert tokenizer("").input_ids == [1]
    for text in ("Ein röter Kreis, 7 mal!", "日本 <b>", "a redcircle moves"):
        assert tokenizer(text).input_ids[-1] == 1
    for seed in range(60):
        scene, _ = clip(seed, Size(2, 32, 32))
        text = prompts.sentence(scene, seed)
        ids = tokenizer(text).input_ids
        assert len(ids) == len(text.replace(",", " ,").split()) + 1 <= 24 and not {0, 2} & set(ids)


def test_prompts_are_encoded_as_the_pipeline_does(exported):
    pipeline = WanPipeline.from_pretrained(exported)
    texts = ["a red circle moves right", "a blue square is moving to the left on a still background"]
    expected, _ = pipeline.encode_prompt(texts, do_classifier_free_guidance=False, max_sequence_length=48)
    torch.testing.assert_close(encode_prompts(pipeline.tokenizer, pipeline.text_encoder, texts, 48), expected)


def test_reading_asks_every_colour_word_for_its_own_object():
    tokenizer = build_tokenizer()
    scene, _ = clip(8, Size(2, 64, 64), accept=lambda scene: len(scene.sprites) == 2 and scene.drift == "up")
    first, second = scene.sprites
    sentences = [prompts.plain(scene.sprites), f"{prompts.plain([second])} over a background drifting up"]
    inputs, answers = reading.questions(tokenizer, [scene, Scene((second,), "up", 4)], sentences)
    for row, sprites in enumerate([(first, second), (second,)]):
        asked = (answers["shape"][row] != reading.UNASKED).nonzero().flatten().tolist()
        assert len(asked) == len(sprites)
        for place, sprite in zip(asked, sprites, strict=True):
            assert tokenizer.convert_ids_to_tokens(inputs.input_ids[row, place].item()) == f"▁{sprite.colour}"
            for name in ("colour", "shape", "direction"):
                assert reading.ANSWERS[name][answers[name][row, place]] == getattr(sprite, name)
    drifts = answers["drift"][inputs.input_ids == tokenizer.eos_token_id].tolist()
    assert [reading.DRIFTS[drift] for drift in drifts] == ["unsaid", "up"]


def test_lessons_teach_something():
    tokenizer = build_tokenizer()
    text_encoder = build_text_encoder(tokenizer)
    untaught = reading.teach(text_encoder, tokenizer, lessons=1, count=16)
    assert reading.teach(text_encoder, tokenizer, lessons=40, count=16) < 0.75 * untaught


def test_a_mistold_scene_is_wrong_in_one_thing():
    rng, kinds = random.Random(0), set()
    for seed in range(100):
        scene, _ = clip(seed, Size(2, 64, 64))
        told = prompts.mistold(scene, rng).sprites
        if len(told) < len(scene.sprites):
            assert len(told) == 1 and told[0] in scene.sprites
            kinds.add("missing")
            continue
        pairs = list(zip(scene.sprites, told, strict=True))
        changed = {f for f in ("colour", "shape", "direction") for s, t in pairs if getattr(s, f) != getattr(t, f)}
        assert len(changed) == 1, "one thing at a time"
        if changed == {"direction"}:
            assert all({s.direction, t.direction} in ({"left", "right"}, {"up", "down"}) for s, t in pairs)
        elif changed == {"shape"}:
            assert all(s.shape != t.shape in SHAPES for s, t in pairs)
        else:
            assert [t.colour for t in told] == [s.colour for s in reversed(scene.sprites)]
        kinds |= changed
        said, missaid = (prompts.sentence(s, seed).split() for s in (scene, replace(scene, sprites=told)))
        assert len(said) == len(missaid), "and otherwise told in the same words"
    assert kinds == {"missing", "colour", "shape", "direction"}


def test_two_heads_look_ahead_and_back_and_the_export_keeps_it():
    """With nothing but their constant parts, one head prefers later frames and the other earlier ones."""
    trainer = Trainer(Budget(steps=3), TINY)
    trainer.step()
    for block in trainer.student.blocks[2:]:
        query, key = block.attn1.to_q.bias, block.attn1.to_k.bias
        for head, later in ((0, True), (1, False)):
            liking = {
                frames: sum(
                    (query[i] * math.cos(turn * frames) + query[i + 1] * math.sin(turn * frames)) * key[i]
                    for i, turn in ((64 * head, 1.0), (64 * head + 2, 10_000 ** (-2 / 24)))
                )
                for frames in (-1, 1)
            }
            assert (liking[1] > liking[-1] + 0.1) == later and liking[1] != liking[-1]


def test_the_judge_refuses_frames_without_room_for_pairs():
    with pytest.raises(ValueError, match="64 pixels"):
        held_out_tasks(size=Size.of_tokens(8, 12, 12))


def test_resuming_continues_exactly(tmp_path):
    straight, first, second = (Trainer(Budget(steps=4), TINY) for _ in range(3))
    for _ in range(4):
        straight.step()
    for _ in range(2):
        first.step()
    first.save(tmp_path / "checkpoint.pt")
    second.load(tmp_path / "checkpoint.pt")
    for _ in range(2):
        second.step()
    for name in ("student", "average"):
        expected, resumed = getattr(straight, name).state_dict(), getattr(second, name).state_dict()
        assert all(torch.equal(expected[key], resumed[key]) for key in expected)
    assert second.fraction == 1


def test_a_light_checkpoint_is_small_and_loads(tmp_path):
    trainer = Trainer(Budget(steps=2), TINY)
    trainer.step()
    trainer.save(tmp_path / "light.pt", light=True)
    assert (tmp_path / "light.pt").stat().st_size < LIMIT
    trainer.load(tmp_path / "light.pt")
    trainer.step()


def test_export_runs_in_the_stock_pipeline(exported):
    assert sum(file.stat().st_size for file in exported.rglob("*") if file.is_file()) < LIMIT
    pipeline = WanPipeline.from_pretrained(exported)
    pipeline.set_progress_bar_config(disable=True)
    parts = (pipeline.transformer, pipeline.text_encoder, pipeline.vae)
    assert all(part.dtype == torch.float32 for part in parts)
    frames = pipeline("a red circle", height=32, width=32, num_frames=3, num_inference_steps=2).frames
    assert frames.shape == (1, 4, 32, 32, 3)


def test_muon_makes_steps_orthogonal():
    matrices = torch.randn(2, 40, 24, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalised(matrices))
    assert values.min() > 0.5 and values.max() < 1.3


def test_concentration_of_flat_and_of_sharp_attention():
    flat = torch.full((1, 2, 512, 512), 1 / 512)
    torch.testing.assert_close(best_blocks_share(flat), torch.full((2,), 0.25))
    torch.testing.assert_close(other_frames_share(flat, 4), torch.full((2,), 0.75))
    key = torch.nn.functional.one_hot(torch.arange(512) // 64, 8).float().expand(1, 2, -1, -1)
    sharp = attention_weights(100 * key, key)
    assert best_blocks_share(sharp).min() > 0.99
    assert other_frames_share(sharp, 4).max() < 0.01
    ragged = torch.full((1, 2, 500, 500), 1 / 500)  # the last block holds 52 tokens
    torch.testing.assert_close(best_blocks_share(ragged), torch.full((2,), 128 / 500))


@pytest.fixture(scope="module")
def bundled():
    return WanPipeline.from_pretrained(files("dit_sparse") / "assets" / "shapes-wan")


def test_bundled_encoder_reads_pairs_that_it_never_saw(bundled):
    """A straight line through the embeddings of training sentences tells the objects of held-out ones."""
    rng, scenes = random.Random(0), []
    while len(scenes) < 100:
        scene = random_scene(Size(8, 64, 64), rng)
        if prompts.held_out(scene):
            scenes.append(scene)
    seen = reading.lesson(bundled.tokenizer, 10**6, 300)
    unseen = reading.questions(bundled.tokenizer, scenes, [prompts.describe(scene, rng) for scene in scenes])
    with torch.no_grad():
        states = [bundled.text_encoder(i.input_ids, i.attention_mask).last_hidden_state for i, _ in (seen, unseen)]
    for name in reading.ANSWERS:
        (x, y), (x_unseen, y_unseen) = (
            (state[answers[name] >= 0], answers[name][answers[name] >= 0])
            for state, (_, answers) in zip(states, (seen, unseen), strict=True)
        )
        line = torch.linalg.lstsq(x, torch.nn.functional.one_hot(y).float()).solution
        assert ((x_unseen @ line).argmax(1) == y_unseen).float().mean() > 0.97, name


def test_bundled_model_hears_the_prompt_through_all_padding(bundled):
    """In high noise the right prompt predicts a clip better than none, and worse if it is another's, or wrong."""
    size, count = Size.of_tokens(4, 12, 12), 24
    alone = lambda scene: len(scene.sprites) == 1
    scenes, videos = zip(*(clip(10**9 + seed, size, alone) for seed in range(count)), strict=True)
    config = bundled.vae.config
    mean, std = (torch.tensor(values).view(-1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
    latents = (torch.stack([fold(video) for video in videos]) - mean) / std
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    told = lambda scene, **wrong: prompts.plain([replace(scene.sprites[0], **wrong)])
    right = [told(scene) for scene in scenes]
    mirrored = [told(scene, direction=prompts.OTHER_WAY[scene.sprites[0].direction]) for scene in scenes]
    misshapen = [told(scene, shape=SHAPES[SHAPES.index(scene.sprites[0].shape) - 1]) for scene in scenes]

    def error(texts, level):
        embeddings = encode_prompts(bundled.tokenizer, bundled.text_encoder, texts, 512)
        noisy, times = torch.lerp(latents, noise, level), torch.full((count,), 1000 * level)
        with torch.no_grad():
            velocity = bundled.transformer(noisy, times, embeddings).sample
        return (velocity - (noise - latents)).square().mean().item()

    for level in (0.95, 0.98):
        assert error(right, level) < error([""] * count, level) < error(right[1:] + right[:1], level), level
        assert error(right, level) < min(error(mirrored, level), error(misshapen, level)), level
