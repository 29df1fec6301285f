"""The page of the blind test, in a browser, and what a rater could learn from it."""

import json
import logging
import shutil
import socket
import urllib.error
import urllib.request

import numpy as np
import pytest

from attention_cases import ALL
from dit_sparse.demo.blind_test import BlindTest, rater_name
from dit_sparse.demo.blind_test_page import launch, pair_html
from dit_sparse.eval.preference.clip_source import ClipSource, PromptSeed, Video, read_clip_source
from dit_sparse.eval.preference.ranking import rank
from dit_sparse.eval.preference.votes import VoteFile
from dit_sparse.output.media import save_video

BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not (BROWSER or ALL), reason="needs Chromium")
METHODS = ("dense", "zebrafish", "quokka")  # words that cannot occur on the page by chance
PROMPTS = ("a red circle <b>moves</b> right", "a blue square")


def clip(level: int) -> Video:
    frames = np.full((8, 48, 48, 3), level, np.uint8)
    frames[:, 10:20, 10:20] = 255 - level
    return Video(frames, 8.0)


def source(methods=METHODS) -> ClipSource:
    levels = {method: 40 + 60 * number for number, method in enumerate(methods)}
    return ClipSource({m: {PromptSeed(p, 0): lambda m=m: clip(levels[m]) for p in PROMPTS} for m in methods})


@pytest.fixture
def blind(tmp_path) -> BlindTest:
    (tmp_path / "videos").mkdir()
    return BlindTest(source(), VoteFile(tmp_path / "votes.jsonl"), tmp_path / "videos")


# --- without a browser


def test_votes_are_stored_with_the_methods_that_were_shown(blind):
    seen = set()
    while view := blind.show("anna"):
        seen |= {view.left, view.right}
        assert blind.vote(view.token, "left") == "anna"
    votes = blind.votes.read()
    assert len(votes) == 6 and blind.progress("anna") == (6, 6) and blind.progress("ben") == (0, 6)
    assert {vote.prompt for vote in votes} == set(PROMPTS) and {name for v in votes for name in v.methods} == set(
        METHODS
    )
    assert len(seen) == 6, "one video for each clip"
    again = BlindTest(source(), VoteFile(blind.votes.path), blind.folder)
    assert again.show("anna") is None and again.show("ben") is not None


def test_a_view_has_one_vote(blind):
    view = blind.show("anna")
    assert blind.vote(view.token, "tie") == "anna"
    assert blind.vote(view.token, "tie") is None and blind.vote("unknown", "left") is None
    assert len(blind.votes.read()) == 1


def test_what_a_rater_receives_names_no_method(blind):
    for rater in ("anna", "ben", "cleo"):
        view = blind.show(rater)
        html = pair_html(view)
        assert not any(method in html for method in METHODS) and "<b>" not in html
        assert {view.left.stem, view.right.stem}.isdisjoint(METHODS) and view.left.name != view.right.name
        for path in (view.left, view.right):
            assert not any(method.encode() in path.read_bytes() for method in METHODS)


def test_clips_that_cannot_be_read_are_left_out(tmp_path, caplog):
    (tmp_path / "videos").mkdir()
    for method in ("dense", "quokka"):
        (tmp_path / "clips" / method).mkdir(parents=True)
        for name in ("a", "b"):
            save_video(tmp_path / "clips" / method / f"{name}.mp4", clip(90).frames, 8)
    (tmp_path / "clips" / "quokka" / "a.mp4").write_bytes(b"broken")
    test = BlindTest(read_clip_source(tmp_path / "clips"), VoteFile(tmp_path / "v.jsonl"), tmp_path / "videos")
    with caplog.at_level(logging.WARNING):
        views = [test.show(f"rater {i}") for i in range(4)]
    assert {view.prompt for view in views} == {"b"} and "the clip of quokka for 'a' is left out" in caplog.text
    assert test.progress("x") == (0, 1)


def test_names_of_raters():
    assert rater_name("  Anna\n B. ") == "Anna B." and len(rater_name("x" * 100)) == 40
    assert rater_name("") != rater_name("") and rater_name(" \x00").startswith("rater-")


# --- the page


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("blind")
    (folder / "videos").mkdir()
    test = BlindTest(source(), VoteFile(folder / "votes.jsonl"), folder / "videos")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    blocks = launch(test, "127.0.0.1", port, quiet=True)
    yield test, blocks.local_url
    blocks.close(verbose=False)


@pytest.fixture
def visit(chromium, served):
    """Open the page in a session of its own, and return it with all that the browser received."""
    contexts, errors = [], []

    def open_page(rater: str, **settings):
        contexts.append(chromium.new_context(**settings))
        tab, received = contexts[-1].new_page(), []
        tab.set_default_timeout(120_000)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.on("response", lambda response: received.append(response))
        tab.goto(served[1])
        tab.get_by_label("Your name or initials").fill(rater)
        tab.get_by_role("button", name="Start").click()
        tab.wait_for_function("document.body.classList.contains('ready')")
        return tab, received

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def wait_for(tab, done: int) -> None:
    tab.get_by_text(f"{done} of 6 pairs").wait_for()
    if done < 6:
        tab.wait_for_function("document.body.classList.contains('ready')")


@in_a_browser
def test_votes_by_key_and_by_button_until_all_pairs_are_compared(visit, served):
    tab, received = visit("anna")
    playing = "[...document.querySelectorAll('#pair video')].map(v => !v.paused || v.ended)"
    assert tab.evaluate(playing) == [True, True]
    for done, key in enumerate(("ArrowLeft", "ArrowRight", "ArrowDown", "t"), 1):
        tab.keyboard.press(key)
        tab.keyboard.press(key)  # before the next clips begin, a key is no vote
        wait_for(tab, done)
    for done, name in ((5, "Right"), (6, "No difference")):
        tab.get_by_role("button", name=name).click()
        wait_for(tab, done)
    tab.get_by_text("You have compared all pairs").wait_for()
    assert not tab.get_by_role("button", name="No difference").is_visible()
    votes = [vote for vote in served[0].votes.read() if vote.rater == "anna"]
    assert [vote.vote for vote in votes] == ["left", "right", "tie", "tie", "right", "tie"]
    assert rank(votes).votes == 6
    assert tab.locator("#pair b").count() == 0, "prompts are no markup"
    content = tab.content()
    for response in received:
        content += response.url + json.dumps(response.headers)
        if "video" not in response.headers.get("content-type", ""):
            content += response.body().decode(errors="replace")
    assert "blue square" in content and not any(method in content for method in METHODS[1:])


@in_a_browser
def test_a_rater_continues_after_a_reload(visit, served):
    tab, _ = visit("ben")
    tab.keyboard.press("ArrowLeft")
    wait_for(tab, 1)
    tab.reload()
    tab.wait_for_function("document.querySelector('input, textarea')?.value === 'ben'")
    tab.get_by_role("button", name="Start").click()
    wait_for(tab, 1)
    assert sum(vote.rater == "ben" for vote in served[0].votes.read()) == 1


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_on_a_phone(visit, scheme):
    tab, _ = visit(f"phone {scheme}", viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = tab.evaluate("[...document.querySelectorAll('#votes button')].map(b => b.getBoundingClientRect().bottom)")
    assert len(sizes) == 3 and max(sizes) - min(sizes) < 2 and max(sizes) <= 844, "one row, without scrolling"
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark")


def test_other_files_and_hosts_are_refused(served):
    test, address = served
    test.votes.path.touch()
    for path, headers in ((f"gradio_api/file={test.votes.path}", {}), ("", {"Host": "example.com"})):
        with pytest.raises(urllib.error.HTTPError) as error:
            urllib.request.urlopen(urllib.request.Request(f"{address}{path}", headers=headers))
        assert error.value.code in (400, 403, 404)
