"""Random attention calls against float64 attention. ``python tests/fuzz.py`` computes thousands of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from case_checks import check, check_pipeline, check_plan
from dit_sparse import Grid, Plan
from dit_sparse.kernels.executors import gather
from dit_sparse.methods import method
from random_cases import SETTINGS, Case
from sparse_pipelines import cached_pipeline, count_layers

SEED = 20
CASES = [Case.random(SEED, number) for number in range(60)]


@pytest.fixture(autouse=True)
def one_thread_without_gradients():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # faster for calls as small as these
    with torch.no_grad():
        yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("case", CASES, ids=lambda case: str(case.number))
def test_random_call(case):
    check(case)


@pytest.mark.parametrize("number", range(4))
def test_random_video(number):
    stock = cached_pipeline("wan")
    check_pipeline(Case.random(SEED, number, model=(2, count_layers(stock))), stock)


def test_cases_hold_every_method_and_option():
    """The 2,000 cases of the command hold every method and every choice, and are the same in every process."""
    cases = [Case.random(SEED, number) for number in range(2000)]
    texts = " ".join(case.method for case in cases)
    assert all(name in texts for name in (*SETTINGS, "cached", "pooled", "rettention", "per_head", "|"))
    for name in ("dtype", "executor", "scale", "contents", "fill", "block", "head_dim", "batch"):
        assert min(Counter(getattr(case, name) for case in cases).values()) >= 50, name
    assert CASES[7] == Case.random(SEED, 7)


FAULTS = {
    r"output: the largest error": lambda out, lse: out[0, 0, 5].add_(0.01),
    r"output: .* are NaN": lambda out, lse: out[0, 0, 5].fill_(torch.nan),
    r"log-sum-exp: the largest error": lambda out, lse: lse[0, 0, 5].add_(0.01),
    r"items .* of the batch": lambda out, lse: out.mul_(len(out) == 2),
}


@pytest.mark.parametrize("message", FAULTS)
def test_check_notices_faults_of_an_executor(message, monkeypatch):
    plain = dict(method="radial", density=0.5, grid=Grid(2, 5, 7, after=9), batch=2, dtype=torch.float32)
    case = replace(CASES[0], **plain, number=1, scale=None, lengths=None, executor="gather")
    attend = gather.attend

    def attend_wrongly(*arguments, **options):
        out, lse = attend(*arguments, **options)
        FAULTS[message](out, lse)
        return out, lse

    assert check(case) is None
    monkeypatch.setattr(gather, "attend", attend_wrongly)
    with pytest.raises(AssertionError, match=message):
        check(case)


def test_check_notices_dropped_text_and_a_missed_density():
    grid = Grid(2, 4, 8, after=16)
    keep = torch.eye(5, dtype=torch.bool)[None, None]
    with pytest.raises(AssertionError, match="text"):
        check_plan(Plan.from_mask(keep, 80, 16), method("radial"), grid)
    with pytest.raises(AssertionError, match="density"):
        check_plan(Plan.dense(80, 16), method("radial", density=0.6), grid)
