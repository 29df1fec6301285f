"""The page of app.py in a real browser, and what may be asked of it."""

import importlib.util
import json
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

import pytest

from attention_cases import ALL
from dit_sparse.demo.device_pool import Cancelled, DevicePool, GenerationRequest, Limits, options_from, options_of

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not (BROWSER or ALL), reason="needs Chromium")
SMALL = {"Frames": 3, "Height": 48, "Width": 48}
LONG = {"Frames": 8, "Height": 80, "Width": 80}  # a second a step: minutes, if nobody stops it
PATIENCE = 120_000  # milliseconds
WISH = {"prompt": "a red circle moves right", "steps": 2, "frames": 3, "height": 48, "width": 48}


# What may be asked


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ({"prompt": "  "}, "a prompt has 1 to 500 characters"),
        ({"prompt": "x" * 501}, "a prompt has 1 to 500 characters"),
        ({"steps": 1}, "the number of steps is a whole number from 2 to 50"),
        ({"steps": 51}, "the number of steps is a whole number from 2 to 50"),
        ({"steps": 2.5}, "the number of steps is a whole number from 2 to 50"),
        ({"steps": None}, "the number of steps is a whole number from 2 to 50"),
        ({"seed": -1}, "seed is a whole number"),
        ({"seed": True}, "seed is a whole number"),
        ({"seed": 2**31}, "seed is a whole number"),
        ({"frames": 33}, "frames is a whole number from 1 to 32"),
        ({"height": 10_000}, "height is a whole number from 1 to 128"),
        ({"width": "80"}, "width is a whole number from 1 to 128"),
        ({"method": "nope"}, "there is no method 'nope'"),
        ({"density": 0}, "density"),
        ({"density": float("nan")}, "density"),
        ({"density": "a"}, "density|settings"),
        ({"dense_steps": 1.5}, "dense_steps"),
        ({"dense_steps": None}, "settings"),
        ({"options": {"dense_distance": (1, 2)}}, "settings|dense_distance"),
        ({"options": {"nope": 1}}, "no setting 'nope'"),
    ],
)
def test_a_wish_is_checked(given, told):
    with pytest.raises(ValueError, match=told) as refused:
        GenerationRequest(**WISH | given)
    assert "\n" not in str(refused.value)


def test_other_models_may_be_larger():
    assert Limits.for_model("a/b").frames > Limits.for_model("shapes-wan").frames
    assert GenerationRequest(**WISH | {"model": "a/b", "frames": 81}).call["num_frames"] == 81
    assert "guidance_scale" not in GenerationRequest(**WISH | {"model": "a/b"}).call


def test_options_are_the_fields_of_the_method():
    assert [option.name for option in options_of("radial")] == ["decay", "dense_distance", "min_width", "sink"]
    assert [option.name for option in options_of("radial|sink")] == ["decay", "dense_distance", "min_width", "sink"]
    assert [option.name for option in options_of("pooled(subblock)")] == ["variance"]
    assert [option.name for option in options_of("sol")] == options_of("nope") == []


def test_options_are_read_from_what_a_form_gives():
    assert options_from("radial", {"dense_distance": 1, "decay": 0.5, "sink": True}) == {"decay": 0.5, "sink": True}
    assert (
        options_from("radial", {"dense_distance": 2.0}) == {"dense_distance": 2}
        and options_from("radial", {"other": 1}) == {}
    )
    assert options_from("neighborhood", {"tile": "(1, 4, 4)"}) == {"tile": (1, 4, 4)}
    assert options_from("adaspa", {"search_interval": "3", "queries_per_block": ""}) == {
        "search_interval": 3,
        "queries_per_block": None,
    }
    with pytest.raises(ValueError, match="search_interval is int"):
        options_from("adaspa", {"search_interval": "__import__('os')"})


def test_the_script_makes_the_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    wish = GenerationRequest(
        **WISH | {"prompt": "a 'red' \\ circle\n\"moves\" right", "options": {"dense_distance": 2}}
    )
    known = {}
    exec(compile(wish.snippet(), "snippet", "exec"), known)
    assert known["run"].report().settings["dense_distance"] == 2 and (tmp_path / "video.mp4").stat().st_size > 1000
    known["run"].disable()
    compile(GenerationRequest(**WISH | {"model": "a/b"}).snippet(), "snippet", "exec")


def test_a_device_is_free_again_after_a_cancel_and_an_error(tmp_path):
    playground, cancel, told = DevicePool(["cpu"]), Event(), []
    silent = lambda name: lambda *_: None

    def stage(name):
        return lambda done, steps: (told.append((name, done)), cancel.set())

    with pytest.raises(Cancelled):
        playground.run(GenerationRequest(**WISH), tmp_path / "a", stage, cancel)
    assert told == [("dense", 1)] and not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="/etc is no diffusers pipeline"):
        playground.run(GenerationRequest(**WISH | {"model": "/etc"}), tmp_path / "b", silent, Event())
    assert playground.run(GenerationRequest(**WISH), tmp_path / "c", silent, Event())["steps"] == 2


# The page


@pytest.fixture(scope="module")
def app():
    spec = importlib.util.spec_from_file_location("app_page", ROOT / "app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_off_localhost_only_offered_models_run(app):
    page = app.Page(["shapes-wan"], any_model=False)
    form = ["/etc", "a circle", 0, 2, "radial", 0.25, False, 0.25, None, None, None, {}]
    with pytest.raises(ValueError, match="this page draws with shapes-wan"):
        page._wish(*form)
    assert page._wish("shapes-wan", *form[1:]).method == "radial"


def test_density_may_be_left_to_the_method(app):
    page = app.Page(["shapes-wan"], any_model=False)
    form = ["shapes-wan", "a circle", 0, 2, "radial", 0.25, True, 0.25, None, None, None, {"decay": 0.3}]
    assert page._wish(*form).processor.settings.method.settings() == {
        "density": None, "decay": 0.3, "dense_distance": 1, "min_width": 1.0, "sink": False,
    }  # fmt: skip


@pytest.fixture(scope="module")
def address(app):
    blocks = app.Page(["shapes-wan"], any_model=True).build()
    app.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture(scope="module")
def chromium():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        )
        yield browser
        browser.close()


@pytest.fixture
def visit(chromium, address):
    """Opens the page as a visitor of its own; errors in the browser's console fail the test."""
    contexts, wrong = [], []

    def opened(**settings):
        contexts.append(chromium.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(PATIENCE)
        tab.on("pageerror", lambda error: wrong.append(str(error)))
        tab.goto(address)
        tab.get_by_role("button", name="Draw both").wait_for()
        tab.locator("#clips video").nth(2).wait_for()
        return tab

    yield opened
    for context in contexts:
        context.close()
    assert wrong == []


def fill(tab, steps=2, **size):
    if not tab.get_by_label("Frames", exact=True).is_visible():
        tab.get_by_role("button", name="Size").click()
    for label, value in (SMALL | size).items():
        tab.get_by_label(label, exact=True).fill(str(value))
    box = tab.get_by_label("number input for Denoising steps")
    box.fill(str(steps))
    box.press("Enter")


def numbers(tab):
    return tab.locator("#numbers")


def drawn(tab, told):
    """Waits for a result that tells it."""
    numbers(tab).get_by_text(told).wait_for()
    return numbers(tab).inner_text()


@in_a_browser
def test_an_example_is_there_at_once_and_its_clips_run_together(visit):
    tab = visit()
    assert "PSNR" in numbers(tab).inner_text()
    times = "[...document.querySelectorAll('#clips video')].map(v => v.currentTime)"
    paused = "[...document.querySelectorAll('#clips video')].map(v => v.paused)"
    tab.wait_for_function(f"{times}.length == 3 && {times}.every(t => t > 0)")
    tab.evaluate("document.querySelectorAll('#clips video')[1].pause()")
    tab.wait_for_function(f"{paused}.every(p => p)")
    tab.evaluate("document.querySelectorAll('#clips video')[2].currentTime = 0.5")
    tab.wait_for_function(f"{times}.every(t => Math.abs(t - 0.5) < 0.05)")
    tab.evaluate("document.querySelectorAll('#clips video')[0].play()")
    tab.wait_for_function(f"{paused}.every(p => !p)")


@in_a_browser
def test_draw_both_with_another_method_and_setting(visit, tmp_path):
    tab = visit()
    fill(tab)
    tab.get_by_label("Method", exact=True).fill("svg")
    tab.get_by_role("option", name="svg", exact=True).click()
    tab.get_by_role("button", name="Settings of the method").click()
    tab.get_by_label("samples").fill("32")
    tab.get_by_label("samples").press("Tab")
    tab.get_by_role("button", name="As a Python script").click()
    tab.get_by_text("samples").last.wait_for()
    tab.get_by_role("button", name="Draw both").click()
    assert "svg" in drawn(tab, "4x12x12 tokens, 2 steps")
    with tab.expect_download() as download:
        tab.locator("a[download='result.json']").click()
    download.value.save_as(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "svg" and result["settings"]["samples"] == 32 and result["steps"] == 2
    tab.wait_for_function(
        "[...document.querySelectorAll('#clips video')].every(v => v.readyState > 2 && v.duration > 0)"
    )


def begin_a_long_run(tab) -> None:
    """Of minutes, if nobody ends it; seen to be under way."""
    fill(tab, steps=50, **LONG)
    tab.get_by_role("button", name="Draw both").click()
    numbers(tab).get_by_text("s left").wait_for()


@in_a_browser
def test_cancel_ends_a_run_and_the_next_one_starts(visit):
    tab = visit()
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_text("Nothing is being drawn.").wait_for()
    begin_a_long_run(tab)
    tab.get_by_role("button", name="Cancel").click()
    tab.get_by_text("It ends with the current step.").wait_for()
    drawn(tab, "Cancelled.")
    fill(tab)
    tab.get_by_role("button", name="Draw both").click()
    drawn(tab, "4x12x12 tokens, 2 steps")


@in_a_browser
def test_a_new_wish_takes_the_place_of_the_one_before(visit):
    tab = visit()
    begin_a_long_run(tab)
    fill(tab)
    tab.get_by_role("button", name="Draw both").click()
    drawn(tab, "4x12x12 tokens, 2 steps")


@in_a_browser
def test_wrong_input_is_told_in_a_sentence(visit):
    tab = visit()
    fill(tab, Frames=1000)
    tab.get_by_role("button", name="Draw both").click()
    tab.get_by_text("frames is a whole number from 1 to 32, not 1000").first.wait_for()


@in_a_browser
def test_two_visitors_get_what_they_asked_for(visit):
    tabs = visit(), visit()
    for seed, tab in enumerate(tabs):
        fill(tab)
        tab.get_by_label("Seed").fill(str(40 + seed))
        tab.get_by_role("button", name="Draw both").click()
    for seed, tab in enumerate(tabs):
        drawn(tab, f"seed {40 + seed}")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_fits_on_a_phone(visit, scheme):
    tab = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "docs/examples/../design.md"), "app.py"]
)
def test_files_of_the_server_stay_there(address, path):
    with pytest.raises(urllib.error.HTTPError) as refused:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert refused.value.code in (403, 404)
