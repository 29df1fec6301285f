"""Blind votes: the clips of a folder, the choice of pairs, the file of votes, the Bradley-Terry ranking."""

import json
import math
from collections import Counter
from itertools import combinations
from random import Random
from threading import Thread

import numpy as np
import pytest
from pydantic import ValidationError
from typer.testing import CliRunner

from dit_sparse.cli.main import app
from dit_sparse.eval.comparison.clip_store import ClipRecord, ClipStore
from dit_sparse.eval.preference.clip_source import ClipSource, PromptSeed, Video, read_clip_source
from dit_sparse.eval.preference.pairing import all_pairs, next_pair, progress
from dit_sparse.eval.preference.ranking import PRIOR, rank
from dit_sparse.eval.preference.votes import Vote, VoteFile
from dit_sparse.eval.report.tables import RESULTS
from dit_sparse.output.media import save_video


def vote(left: str, right: str, choice: str = "left", prompt: str = "p", rater: str = "r") -> Vote:
    return Vote(rater=rater, prompt=prompt, seed=0, left=left, right=right, vote=choice)


def source(methods: str, prompts: int = 3) -> ClipSource:
    samples = [PromptSeed(f"p{i}", 0) for i in range(prompts)]
    clip = Video(np.zeros((2, 8, 8, 3), np.uint8), 8.0)
    return ClipSource({name: {sample: lambda: clip for sample in samples} for name in methods})


def simulated_votes(strengths: dict[str, float], count: int, ties: float = 0.0) -> list[Vote]:
    """Return votes on every pair of methods by their strengths, on ten prompts, a share of them replaced by ties."""
    random, votes = Random(0), []
    for number in range(count):
        for left, right in combinations(strengths, 2):
            wins = random.random() < 1 / (1 + math.exp(strengths[right] - strengths[left]))
            choice = "tie" if random.random() < ties else "left" if wins else "right"
            votes.append(vote(left, right, choice, f"p{number % 10}"))
    return votes


# --- ranking


def test_planted_strengths_are_recovered():
    planted = {"dense": 0.0, "a": 1.0, "b": -0.5, "c": -1.5}
    ranking = rank(simulated_votes(planted, 400))
    found = {row.method: row for row in ranking.rows}
    assert [row.method for row in ranking.rows] == ["a", "dense", "b", "c"] and ranking.references == ["dense"]
    for name, strength in planted.items():
        low, high = found[name].interval
        assert found[name].strength == pytest.approx(strength, abs=0.25)
        assert low <= found[name].strength <= high and high - low < 0.9
        assert found[name].preferred == pytest.approx(1 / (1 + math.exp(-found[name].strength)))
    assert found["dense"].interval == [0, 0] and ranking.notes == []
    assert (ranking.votes, ranking.raters, ranking.prompts) == (2400, 1, 10)


def test_two_methods_have_a_closed_form():
    votes = [vote("a", "b")] * 6 + [vote("b", "a")] * 2 + [vote("a", "b", "tie")] * 2
    a, b = rank(votes).rows
    assert a.strength - b.strength == pytest.approx(math.log((7 + PRIOR) / (3 + PRIOR)), abs=1e-4)
    assert (a.wins, a.ties, a.losses, a.votes) == (6, 2, 2, 10) and (b.wins, b.losses) == (2, 6)
    assert a.strength == -b.strength, "without the reference, the mean is 0"


def test_sides_do_not_matter():
    votes = simulated_votes({"a": 0.0, "b": 1.0, "c": 2.0}, 20, ties=0.2)
    mirror = {"left": "right", "right": "left", "tie": "tie"}
    mirrored = [
        one.model_copy(update={"left": one.right, "right": one.left, "vote": mirror[one.vote]}) for one in votes
    ]
    assert rank(mirrored) == rank(votes)


def test_ties_bring_methods_together():
    strengths = {"a": 0.0, "b": 1.5}
    gap = lambda ties: rank(simulated_votes(strengths, 200, ties), "a").rows[0].strength
    assert gap(0.0) > gap(0.5) > gap(0.95) > 0
    rows = rank([vote("a", "b", "tie", f"p{i}") for i in range(4)]).rows
    assert all(row.strength == pytest.approx(0, abs=1e-6) and row.ties == 4 for row in rows)


def test_more_prompts_make_intervals_narrower():
    width = lambda count: np.ptp(rank(simulated_votes({"dense": 0.0, "a": 0.5}, count)).rows[0].interval)
    assert width(400) < 0.6 * width(40)


def test_groups_without_common_votes_are_not_compared():
    votes = [vote("a", "b", choice, prompt) for choice in ("left", "right", "tie") for prompt in "pq"]
    ranking = rank(votes + [vote("dense", "c", "right"), vote("dense", "c")])
    assert {row.method: row.group for row in ranking.rows} == {"a": 0, "b": 0, "c": 1, "dense": 1}
    assert ranking.references == [None, "dense"]
    (note,) = ranking.notes
    assert note.startswith("No vote connects these groups") and {"; c, dense", "; dense, c"} & {
        note[i : i + 10] for i in range(len(note))
    }


def test_a_method_that_won_every_vote_has_a_finite_strength_and_a_note():
    ranking = rank([vote("a", "dense", prompt=prompt) for prompt in "pqrs"])
    assert ranking.rows[0].strength == pytest.approx(math.log((4 + PRIOR) / PRIOR), abs=1e-3)
    assert "a won every vote, dense lost every vote, so only the prior" in ranking.notes[0]


def test_one_prompt_has_no_interval():
    ranking = rank([vote("a", "b"), vote("b", "a")])
    assert all(row.interval is None for row in ranking.rows) and "one prompt" in ranking.notes[0]
    json.dumps(ranking.as_dict(), allow_nan=False)
    with pytest.raises(ValueError, match="no votes to rank"):
        rank([])


# --- pairs


def test_every_pair_is_shown_once_and_methods_evenly():
    clips, votes, random = source("abcd"), [], Random(0)
    total = len(list(all_pairs(clips)))
    assert progress(clips, votes, "r") == (0, total) == (0, 18)
    while pair := next_pair(clips, votes, "r", random):
        votes.append(vote(pair.left, pair.right, prompt=pair.sample.prompt))
        counts = Counter(one.methods for one in votes)
        assert max(counts.values()) - min(counts[frozenset(two)] for two in combinations("abcd", 2)) <= 1
    assert len({(one.prompt, one.methods) for one in votes}) == len(votes) == total
    assert progress(clips, votes, "r") == (total, total) and progress(clips, votes, "other") == (0, total)
    assert next_pair(clips, votes, "other", random) is not None


def test_sides_are_random():
    sides = Counter(next_pair(source("ab"), [], "r", Random(seed)).left for seed in range(200))
    assert 60 < sides["a"] < 140


# --- votes


def test_many_raters_write_one_file(tmp_path):
    files = [VoteFile(tmp_path / "new" / "votes.jsonl") for _ in range(4)]
    raters = [
        Thread(target=lambda file=file, i=i: [file.add(vote("a", "b", rater=f"r{i}")) for _ in range(25)])
        for i, file in enumerate(files)
    ]
    for rater in raters:
        rater.start()
    for rater in raters:
        rater.join()
    assert Counter(one.rater for one in files[0].read()) == {f"r{i}": 25 for i in range(4)}


def test_an_interrupted_vote_is_left_out(tmp_path, caplog):
    file = VoteFile(tmp_path / "votes.jsonl")
    assert file.read() == []
    file.add(vote("a", "b"))
    with file.path.open("a") as stream:
        stream.write('{"rater": "r", "prom')
    file.add(vote("b", "a", "tie", "é“x”"))
    assert [(one.left, one.prompt) for one in file.read()] == [("a", "p"), ("b", "é“x”")]
    assert "1 of 3 lines" in caplog.text


def test_votes_are_validated(tmp_path):
    for values in ({"vote": "middle"}, {"right": "a"}, {"rater": ""}, {"rater": "x" * 41}):
        with pytest.raises(ValidationError):
            Vote(**{"rater": "r", "prompt": "p", "seed": 0, "left": "a", "right": "b", "vote": "tie"} | values)
    with pytest.raises(ValueError, match="cannot be the folder"):
        VoteFile(tmp_path)


# --- clips


def test_folders_of_videos_are_matched_by_file_name(tmp_path):
    frames = np.zeros((3, 16, 16, 3), np.uint8)
    for method, names in {"dense": ["a cat-3", "b", "only here"], "svg": ["a cat-3", "b"], "empty": []}.items():
        (tmp_path / method).mkdir()
        for name in names:
            save_video(tmp_path / method / f"{name}.mp4", frames, 8)
    clips = read_clip_source(tmp_path)
    assert clips.methods == ["dense", "svg"]
    assert clips.samples_of("dense", "svg") == [PromptSeed("a cat", 3), PromptSeed("b", None)]
    assert clips.read("svg", PromptSeed("b", None)).frames.shape[0] == 3
    assert len(list(all_pairs(clips))) == 2
    with pytest.raises(ValueError, match="no row 'x'; there are dense, svg"):
        read_clip_source(tmp_path, ["x"])
    with pytest.raises(ValueError, match="no two clips to compare"):
        read_clip_source(tmp_path, ["svg"])
    with pytest.raises(ValueError, match="there is no folder"):
        read_clip_source(tmp_path / "missing")


def test_a_broken_video_is_a_sentence(tmp_path):
    for method in ("a", "b"):
        (tmp_path / method).mkdir()
        (tmp_path / method / "x.mp4").write_bytes(b"no video")
    with pytest.raises(ValueError, match="cannot read a video"):
        read_clip_source(tmp_path).read("a", PromptSeed("x", None))


# --- the command


def test_the_command_prints_and_draws_the_ranking(tmp_path):
    file = VoteFile(tmp_path / "votes.jsonl")
    for one in simulated_votes({"dense": 0.0, "routed 0.25": 1.0, "asa 0.25": -1.0}, 20):
        file.add(one)
    run = lambda *options: CliRunner().invoke(app, ["ab", str(tmp_path), "--table", *options])
    printed = run("--plot", str(tmp_path / "ranking.svg"))
    assert printed.exit_code == 0, printed.output
    assert "60 votes of 1 rater on 10 prompts" in printed.output and "relative to dense" in printed.output
    assert (tmp_path / "ranking.svg").read_text().count("routed 0.25") >= 1
    rows = json.loads(run("--json", "--quiet", "--row", "dense", "--row", "asa 0.25").stdout)["rows"]
    assert [row["method"] for row in rows] == ["dense", "asa 0.25"]


def test_wrong_folders_are_one_sentence(tmp_path):
    run = lambda *options: CliRunner().invoke(app, ["ab", *map(str, options)])
    for options, words in [
        ((tmp_path / "missing",), "there is no folder"),
        ((tmp_path,), "no two clips to compare"),
        ((tmp_path, "--table"), "there are no votes to rank"),
        ((tmp_path, "--plot", tmp_path / "x.txt"), "--plot must end in"),
    ]:
        result = run(*options)
        assert result.exit_code == 2 and words in result.output.replace("\n", " "), result.output
    assert not (tmp_path / "missing").exists()


def test_clips_of_a_comparison_are_read_by_row(tmp_path):
    stored = json.loads((RESULTS / "cpu" / "compare.json").read_text())
    result = stored | {"rows": stored["rows"][:3], "prompts": ["a", "b"], "seeds": 2, "first_seed": 3}
    (tmp_path / "compare.json").write_text(json.dumps(result))
    store = ClipStore(tmp_path / "clips")
    for level, row in enumerate(result["rows"]):
        for prompt in "ab":
            for seed in (3, 4):
                note = {"row": row["name"], "prompt": prompt, "seed": seed, "seconds": 1.0, "grids": []}
                note |= {"settings": row["settings"], "steps": row["steps"]}
                store.put(row["name"], note, ClipRecord(np.full((2, 8, 8, 3), level, np.uint8), note))
    clips = read_clip_source(tmp_path)
    names = [row["name"] for row in result["rows"]]
    assert clips.methods == names and len(list(all_pairs(clips))) == 3 * 4
    assert clips.samples_of(*names[:2]) == [PromptSeed(prompt, seed) for prompt in "ab" for seed in (3, 4)]
    assert [clips.read(name, PromptSeed("b", 4)).frames.max() for name in names] == [0, 1, 2]
    assert read_clip_source(tmp_path, names[1:]).methods == names[1:]
    next((tmp_path / "clips").glob(f"{names[0]}-*")).unlink()
    with pytest.raises(ValueError, match="clips of 'dense' are not in the folder"):
        read_clip_source(tmp_path)
