"""Training of gates: the loss falls, results do not depend on interruptions, bad input is refused before any work."""

from __future__ import annotations

import json

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

import dit_sparse as ds
from attention_cases import qkv
from dit_sparse import Grid, Site
from dit_sparse.cli.main import app
from dit_sparse.gating.weights import weights_of
from dit_sparse.methods import method
from dit_sparse.methods.gates import GATES
from dit_sparse.training import train as training
from dit_sparse.training.distillation import TrainingState, best_mass, example_loss, group, kept_mass, train
from dit_sparse.training.examples import Example, Recorder, example_of

GRID, DIM, LAYERS, HEADS = Grid(4, 6, 8, after=5), 16, 2, 2
TINY = ["--frames", "3", "--height", "32", "--width", "32", "--steps", "4", "--block", "16", "--sampled-steps", "2"]
every_gate = pytest.mark.parametrize("name", GATES)


def examples_of(name: str, calls: int = 3) -> list[Example]:
    """Return examples of a made-up model: queries attend by a few channels, and to keys that resemble their values; the
    lengths of values do not matter."""
    made, generator = [], torch.Generator().manual_seed(0)
    for number in range(calls * LAYERS):
        q, k, v = qkv(GRID.tokens, heads=HEADS, dim=DIM, seed=number)
        q[..., :4], k = 4 * q[..., :4], k + 2 * F.normalize(v, dim=-1)
        v = v * torch.randn(GRID.tokens // 16 + 1, 1, generator=generator).exp().repeat_interleave(16, 0)[: GRID.tokens]
        site = Site(GRID, 16, layer=number % LAYERS, layers=LAYERS, component="transformer")
        made.append(example_of(method(name), q, k, v, site, seed=number))
    return made


def state_of(name: str) -> TrainingState:
    return TrainingState.create(method(name), ["transformer"], LAYERS, HEADS, DIM)


def test_examples_hold_the_mass_of_blocks_without_text():
    """Against the softmax of all scores: means over every query of a block, with the rows and columns of text left
    out."""
    q, k, _ = qkv(GRID.tokens, batch=2, heads=HEADS, dim=DIM)
    one = example_of(method("seer"), q, k, None, Site(GRID, 16, layer=1, layers=2, component="a"), seed=3)
    weights = (q[0] @ k[0].mT * DIM**-0.5).softmax(-1)[:, :192, :192]
    expected = weights.unflatten(1, (12, 16)).mean(2).unflatten(2, (12, 16)).sum(-1)
    torch.testing.assert_close(one.mass[0].float(), expected[:, one.own[0]], atol=1e-3, rtol=1e-2)
    assert one.mass.shape == (1, HEADS, 12, 12) and one.columns.tolist() == [list(range(12))]
    assert (one.component, one.layer) == ("a", 1)
    assert one.queries["mean"].shape[2] == 12 and one.keys["mean"].shape[2] == 13


@every_gate
def test_training_lowers_the_loss_and_keeps_more_mass(name):
    gate, groups, state = method(name), group(examples_of(name)), state_of(name)

    @torch.no_grad()
    def loss() -> float:
        return sum(float(example_loss(gate, one, state.layer(one.component, one.layer))) for one in groups.values())

    before, kept = loss(), kept_mass(gate, groups, state, 0.3)
    train(gate, state, groups, 60, seed=0)
    assert loss() < 0.9 * before
    assert kept < kept_mass(gate, groups, state, 0.3) <= best_mass(groups, 0.3) + 1e-6


def test_a_higher_price_keeps_fewer_entries():
    """The mask of `SwinBERT`, the mean of its sigmoid after the training; without a price nothing holds it down."""
    groups, kept = group(examples_of("swinbert")), []
    for price in (0.3, 1.0, 3.0):
        gate, state = method("swinbert", price=price), state_of("swinbert")
        train(gate, state, groups, 60, seed=0)
        one = next(iter(groups.values()))
        queries, keys = ({name: x.float() for name, x in part.items()} for part in (one.queries, one.keys))
        kept.append(float(gate.gate(queries, keys, state.layer("transformer", 0)).sigmoid().detach().mean()))
    assert kept[0] > 1.2 * kept[1] > 1.2 * 1.2 * kept[2]


@every_gate
def test_the_state_before_training_is_the_untrained_gate(name):
    """Every layer and head scores as the gate without weights does."""
    q, k, v = qkv(192, heads=HEADS, dim=DIM)
    gate, site, state = method(name), Site(Grid(4, 6, 8), 16), state_of(name)
    scores = gate.gate(*gate.features(q, k, v, site), state.layer("transformer", 1)).detach()
    torch.testing.assert_close(scores, gate.score(q, k, v, site, {}).expand_as(scores))


@pytest.mark.parametrize("stop", [1, 7])
def test_a_restored_state_continues_exactly(stop):
    gate, groups = method("seer"), group(examples_of("seer"))
    whole, first, second = (state_of("seer") for _ in range(3))
    train(gate, whole, groups, 12, seed=5)

    class Interrupted(Exception):
        pass

    def interrupt(state: TrainingState, loss: float) -> None:
        if state.step == stop:
            raise Interrupted

    with pytest.raises(Interrupted):
        train(gate, first, groups, 12, seed=5, after_step=interrupt)
    second.restore(first.to_dict())
    train(gate, second, groups, 12, seed=5)
    assert all(second.parameters[name].equal(tensor) for name, tensor in whole.parameters.items())


def test_a_clip_stays_below_its_limit_and_others_store_other_calls():
    """All layers and steps are stored by some clip."""
    q, k, _ = qkv(192, heads=1, dim=DIM)
    gate, stored = method("seer"), set()
    size = example_of(gate, q, k, None, Site(Grid(4, 6, 8), 16), 0).bytes
    for turn in range(8):
        recorder = Recorder(max_bytes=3 * size, turn=turn, steps=(1, 2))
        for step in (1, 2):
            for layer in range(4):
                site = Site(Grid(4, 6, 8), 16, layer=layer, layers=4, step=step)
                recorder.add(gate, q, k, None, site)
                stored |= {(step, layer)} if recorder.examples and recorder.examples[-1].layer == layer else set()
        assert sum(example.bytes for example in recorder.examples) <= 3 * size + size
    assert len(stored) == 8


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.slow
def test_an_interrupted_command_gives_the_same_weights(tmp_path, monkeypatch):
    """The weights work on the model, and the file says how they were made."""
    command = ["seer", "--prompts", "2", "--iterations", "6", *TINY]
    whole, resumed = tmp_path / "whole.safetensors", tmp_path / "resumed.safetensors"
    output = run(*command, "--out", str(whole))
    assert "untrained" in output and "best blocks" in output
    generate, clips = training.generate, []

    def fail_at_the_second_clip(*arguments):
        clips.append(arguments[1])
        if len(clips) == 2:
            raise KeyboardInterrupt
        return generate(*arguments)

    monkeypatch.setattr(training, "generate", fail_at_the_second_clip)
    assert CliRunner().invoke(app, ["train", *command, "--out", str(resumed)]).exit_code == 130
    other = CliRunner().invoke(app, ["train", *command, "--seed", "9", "--out", str(resumed)])
    assert other.exit_code == 2 and "holds another interrupted training" in other.output
    run(*command, "--out", str(resumed))
    assert len(clips) == 3 and clips.count(clips[0]) == 1, "the first clip is not generated again"
    assert {path.name for path in tmp_path.iterdir()} == {whole.name, resumed.name}
    first, second = (weights_of("Seer", str(path)) for path in (whole, resumed))
    assert all(second.tensors[name].equal(tensor) for name, tensor in first.tensors.items())
    assert (first.model, first.layers, first.heads, first.head_dim) == ("shapes-wan-i2v", 6, 3, 64)
    assert {"prompts", "seed", "call", "device", "versions", "commit", "kept_mass"} <= first.training.keys()
    pipe = ds.prepare(training.load_pipeline("shapes-wan-i2v"))
    text = f"seer(weights={json.dumps(str(whole))})"
    with ds.enable(pipe, text, density=0.5, min_tokens=0, block=16, dense_steps=1) as sparse:
        training.generate(pipe, "a red circle moves left", 0, dict(first.training["call"]))
    assert sparse.report().density_achieved == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["radial"], "radial has nothing to train; the gates are seer"),
        (["seer(density=0.2)"], "without weights, density or budget"),
        (["sear"], "no method 'sear'"),
        (["seer", "--prompts", "1"], "at least one prompt and one held-out prompt"),
        (["seer", "--prompts", "4", "--held-out", "4"], "at least one prompt and one held-out prompt"),
        (["seer", "--out", "gate.json"], "must end in .safetensors"),
        (["seer", "--iterations", "0"], "iterations must be in [1, 1000000], got 0"),
        (["seer", "--sampled-steps", "0"], "sampled_steps must be at least 1"),
        (["seer", "--dense-steps", "8", "--steps", "8"], "keeps all 8 steps dense"),
    ],
    ids=str,
)
def test_bad_input_is_refused_in_one_sentence(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "generate", lambda *_: pytest.fail("a clip was generated"))
    result = CliRunner().invoke(app, ["train", *arguments])
    assert result.exit_code == 2 and words in result.output and result.output.count("\n") == 1
