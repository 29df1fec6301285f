"""The judge of the clips of shapes-wan-i2v, on rendered clips, and its prompts."""

from itertools import pairwise

import pytest
import torch

from dit_sparse.bundled.shapes_wan import prompts
from dit_sparse.bundled.shapes_wan.judge import accuracy, held_out_tasks, judge
from dit_sparse.bundled.shapes_wan.scenes import Size, make_clip, min_gap


def without_overlap(size):
    return lambda scene: min_gap(scene.sprites, size.frames) > 0


@pytest.mark.parametrize("tokens", [(8, 16, 16), (14, 24, 24), (4, 24, 24)])
def test_judge_agrees_with_the_rendered_scene(tokens):
    size, verdicts = Size.from_tokens(*tokens), []
    for seed in range(16):
        scene, video = make_clip(seed, size, without_overlap(size))
        verdicts += judge(video, scene.sprites)
    assert accuracy(verdicts)["everything"] >= 0.98


def test_judge_rejects_the_wrong_sprite():
    size = Size.from_tokens(8, 16, 16)
    clips = [make_clip(seed, size, without_overlap(size)) for seed in range(12)]
    for (scene, _), (other, video) in pairwise(clips):
        sprite, present = scene.sprites[0], {(s.colour, s.shape, s.direction) for s in other.sprites}
        (verdict,) = judge(video, [sprite])
        accepted = verdict.colour and verdict.shape and verdict.direction
        assert accepted == ((sprite.colour, sprite.shape, sprite.direction) in present)


def test_judge_sees_a_double_a_jump_and_a_gap():
    size = Size.from_tokens(8, 16, 32)
    is_single = lambda scene: len(scene.sprites) == 1 and scene.sprites[0].direction in ("up", "down")
    for seed in range(6):
        scene, video = make_clip(seed, size, is_single)
        (good,) = judge(video, scene.sprites)
        assert all((good.colour, good.number, good.shape, good.direction, good.path))
        doubled = torch.where(video.std(dim=0) > 0.4, video, video.roll(64, 3))
        assert not judge(doubled, scene.sprites)[0].number
        jumping, missing = video.clone(), video.clone()
        jumping[:, 4] = video[:, 4].roll(12, 2)
        assert not judge(jumping, scene.sprites)[0].path
        missing[:, 5] = video[:, 5].mean(0, keepdim=True)
        assert not judge(missing, scene.sprites)[0].colour


def test_held_out_pairs_are_fixed_and_never_trained_on():
    size = Size.from_tokens(8, 16, 16)
    tasks = held_out_tasks(60, size)
    assert len(tasks) == 60 and tasks == held_out_tasks(60, size)
    names = lambda scene: {(s.colour, s.shape, s.direction) for s in scene.sprites}
    held_out = [names(task.scene(size)) for task in tasks if len(task.scene(size).sprites) == 2]
    assert len(held_out) == 36
    accept = lambda scene: not prompts.is_held_out(scene)
    assert not any(names(make_clip(seed, Size(2, 64, 64), accept)[0]) in held_out for seed in range(100))
