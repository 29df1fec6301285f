"""The Gradio page: validated requests, the method settings of the form, and the page in a browser."""

import dataclasses
import importlib
import json
import math
import re
import shutil
import urllib.error
import urllib.request
from pathlib import Path
from threading import Event

import pytest

from attention_cases import ALL
from dit_sparse import METHODS
from dit_sparse.demo.device_pool import Cancelled, DevicePool
from dit_sparse.demo.form import preset_values
from dit_sparse.demo.request import GenerationRequest, Limits
from dit_sparse.demo.result_page import result_title
from dit_sparse.demo.settings_form import changed_settings, check_names, method_settings, sets_density
from dit_sparse.methods import method_text
from dit_sparse.notation.presets import PRESETS

ROOT = Path(__file__).parents[2]
BROWSER = shutil.which("chromium") or shutil.which("google-chrome")
in_a_browser = pytest.mark.skipif(not (BROWSER or ALL), reason="needs Chromium")
SMALL = {"Frames": 3, "Height": 48, "Width": 48}
LONG = {"Frames": 8, "Height": 80, "Width": 80}  # about a second per step
TIMEOUT = 120_000  # milliseconds
REQUEST = {"prompt": "a red circle moves right", "steps": 2, "frames": 3, "height": 48, "width": 48}


# --- requests


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "  "}, "the prompt must have 1 to 500 characters"),
        ({"prompt": "x" * 501}, "the prompt must have 1 to 500 characters"),
        ({"steps": 1}, "the number of steps must be a whole number in [2, 50]"),
        ({"steps": 51}, "the number of steps must be a whole number in [2, 50]"),
        ({"steps": 2.5}, "the number of steps must be a whole number in [2, 50]"),
        ({"steps": None}, "the number of steps must be a whole number in [2, 50]"),
        ({"seed": -1}, "seed must be a whole number"),
        ({"seed": True}, "seed must be a whole number"),
        ({"seed": 2**31}, "seed must be a whole number"),
        ({"frames": 33}, "frames must be a whole number in [1, 32]"),
        ({"height": 10_000}, "height must be a whole number in [1, 128]"),
        ({"width": "80"}, "width must be a whole number in [1, 128]"),
        ({"method": "nope"}, "there is no method 'nope'"),
        ({"method": "radial("}, "cannot read the method"),
        ({"method": "radial(decay=0.2)", "settings": {"decay": 0.3}}, "decay of radial is given twice"),
        ({"method": "profile:shapes-wan-i2v", "density": 0.25}, "takes no density"),
        ({"method": "routed", "density": 0}, "density must be in (0, 1]"),
        ({"method": "routed", "density": float("nan")}, "density must be in (0, 1]"),
        ({"method": "routed", "density": "a"}, "density of routed must be a number"),
        ({"dense_steps": 1.5}, "dense_steps must be a count"),
        ({"dense_steps": "0.25"}, "dense_steps must be a number"),
        ({"executor": "nope"}, "executor must be one of auto"),
        (
            {"method": "radial", "settings": {"dense_distance": (1, 2)}},
            "dense_distance of radial must be a whole number",
        ),
        ({"settings": {"nope": 1}}, "no setting 'nope'"),
    ],
)
def test_requests_are_validated(values, message):
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        GenerationRequest(**REQUEST | values)
    assert "\n" not in str(error.value)


def test_other_models_may_be_larger():
    assert Limits.for_model("a/b").frames > Limits.for_model("shapes-wan-i2v").frames
    assert GenerationRequest(**REQUEST | {"model": "a/b", "frames": 81}).call["num_frames"] == 81
    assert "guidance_scale" not in GenerationRequest(**REQUEST | {"model": "a/b"}).call


def names(method: str) -> list[str]:
    return [setting.name for setting in method_settings(method)]


def test_the_form_has_the_settings_that_the_text_does_not_set():
    radial = names("radial")
    assert radial == [field.name for field in dataclasses.fields(METHODS["radial"]) if field.name != "density"]
    assert names("radial|sink") == names("radial(density=0.3)") == names("(radial|sink)|sink") == radial
    assert names("radial(sink=true)") == [name for name in radial if name != "sink"]
    assert names("pooled(subblock)") == ["group"]
    assert names("sol") == names("nope") == names("radial(") == names("profile:shapes-wan-i2v") == []


def test_settings_are_read_from_the_form():
    assert changed_settings("radial", {"dense_distance": 1, "decay": 0.5, "sink": True}) == {"decay": 0.5, "sink": True}
    assert changed_settings("radial", {"dense_distance": 2.0}) == {"dense_distance": 2}
    assert changed_settings("radial", {"other": 1}) == {}
    assert changed_settings("neighborhood", {"tile": "(1, 4, 4)"}) == {"tile": (1, 4, 4)}
    assert changed_settings("adaspa", {"search_interval": "3", "queries_per_block": ""}) == {
        "search_interval": 3,
        "queries_per_block": None,
    }
    with pytest.raises(ValueError, match="cannot read the value"):
        changed_settings("adaspa", {"search_interval": "__import__('os').x"})
    settings = changed_settings("adaspa", {"search_interval": "radial"})
    with pytest.raises(ValueError, match="search_interval of adaspa must be a number"):
        GenerationRequest(**REQUEST | {"method": "adaspa", "settings": settings})


def test_texts_that_set_their_density():
    for text in (
        "radial(density=0.3)",
        "pooled(radial(density=0.3))",
        "asa(budget=mass(0.9))",
        "profile:shapes-wan-i2v",
    ):
        assert sets_density(text)
    assert not sets_density("radial(sink=true)|sink")


def test_only_shipped_profiles_have_a_name():
    check_names("cached(profile:shapes-wan-i2v)|radial", {})
    for text in ("profile:/etc/passwd", "cached(profile:../x.json)"):
        with pytest.raises(ValueError, match="the profile must be one of"):
            check_names(text, {})


def test_only_bundled_weights_have_a_name():
    check_names("cached(seer(weights=shapes-wan))", {"weights": "shapes-wan-i2v"})
    for text, form in (("cached(seer(weights=/x.safetensors))", {}), ("seer", {"weights": "x.safetensors"})):
        with pytest.raises(ValueError, match="weights must be the name of bundled weights"):
            check_names(text, form)


def test_the_script_generates_the_video(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    values = {"prompt": "a 'red' \\ circle\n\"moves\" right", "method": "radial(sink=true)", "density": 0.25}
    request = GenerationRequest(**REQUEST | values | {"settings": {"dense_distance": 2}})
    variables = {}
    exec(compile(request.snippet(), "snippet", "exec"), variables)
    report = variables["run"].report()
    assert report.method == "radial(dense_distance=2, sink=true)" and report.density_asked == 0.25
    assert (tmp_path / "video.mp4").stat().st_size > 1000
    variables["run"].disable()
    compile(GenerationRequest(**REQUEST | {"model": "a/b"}).snippet(), "snippet", "exec")
    assert "ds.enable(pipe, 'balanced')\n" in GenerationRequest(**REQUEST).snippet()
    assert "'fast', executor='gather')" in GenerationRequest(**REQUEST, method="fast", executor="gather").snippet()


def test_a_device_is_free_again_after_a_cancel_and_an_error(tmp_path):
    pool, cancel, steps = DevicePool(["cpu"]), Event(), []
    silent_stage = lambda name: lambda *_: None

    def stage(name):
        return lambda done, _: (steps.append((name, done)), cancel.set())

    with pytest.raises(Cancelled):
        pool.run(GenerationRequest(**REQUEST), tmp_path / "a", stage, cancel)
    assert steps == [("dense", 1)] and not list((tmp_path / "a").iterdir())
    with pytest.raises(ValueError, match="cannot load the model /etc: it is not a diffusers pipeline"):
        pool.run(GenerationRequest(**REQUEST | {"model": "/etc"}), tmp_path / "b", silent_stage, Event())
    request = GenerationRequest(**REQUEST)
    result = pool.run(request, tmp_path / "c", silent_stage, Event())
    assert result["preset"].startswith("balanced") and result["steps"] == 2
    estimate = pool.estimate(request)
    assert estimate.tokens == 4 * 12 * 12 == math.prod(map(int, result["grid"].split("x")))
    measured = pytest.approx((result["seconds_dense"], result["seconds_sparse"]))
    assert (estimate.dense, estimate.sparse) == measured, "the last clip corrects the estimate"


# --- the page


@pytest.fixture(scope="module")
def app():
    return importlib.import_module("dit_sparse.demo.page")


def fields(model="shapes-wan-i2v", preset="custom", method="radial", own_density=False, settings=None) -> list:
    clip = [model, "a red circle moves up", preset, 0, 2, None, None, None, "auto"]
    return [*clip, method, 0.25, own_density, 0.25, settings or {}]


def test_on_other_hosts_only_offered_models_and_shipped_profiles_run(app):
    page = app.Page(["shapes-wan-i2v"], local=False)
    with pytest.raises(ValueError, match="the model must be one of shapes-wan-i2v"):
        page._request(*fields(model="/etc"))
    with pytest.raises(ValueError, match="the profile must be one of"):
        page._request(*fields(method="profile:/etc/passwd"))
    with pytest.raises(ValueError, match="the preset must be one of quality, balanced, fast and custom"):
        page._request(*fields(preset="profile:/etc/passwd"))
    assert page._request(*fields()).method == "radial"
    assert page._request(*fields(method="profile:shapes-wan-i2v")).density is None


def test_a_preset_decides_instead_of_the_method(app):
    page = app.Page(["shapes-wan-i2v"], local=True)
    settings = page._request(*fields(preset="fast", settings={"decay": 0.3})).processor.settings
    assert settings.preset == "fast" and method_text(settings.method) == PRESETS["fast"].method
    for preset in PRESETS:
        name, density, own_density, dense_steps, settings = preset_values(preset)
        values = [*fields()[:9], name, density, own_density, dense_steps, settings]
        as_custom = page._request(*values).processor.settings
        assert as_custom.method == page._request(*fields(preset=preset)).processor.settings.method


def test_settings_may_determine_the_density(app):
    page = app.Page(["shapes-wan-i2v"], local=True)
    request = page._request(*fields(own_density=True, settings={"decay": 0.3}))
    assert method_text(request.processor.settings.method) == "radial(decay=0.3)"
    request = page._request(*fields(method="radial(density=0.4, sink=true)"))
    assert method_text(request.processor.settings.method) == "radial(density=0.4, sink=true)"


def test_an_invalid_form_is_said_in_place_of_estimate_and_script(app):
    page = app.Page(["shapes-wan-i2v"], local=True)
    estimate, script = page._preview(*fields(method="radail"))
    assert "there is no method &#x27;radail&#x27;; did you mean" in estimate
    assert script.startswith("# there is no method 'radail'; did you mean 'radial'?")
    estimate, script = page._preview(*fields())
    assert re.fullmatch(
        r"Estimate: about \S+ \w+ for the dense clip and \S+ \w+ for the sparse one, 8,064 tokens\.", estimate
    )
    assert "ds.enable(pipe, 'radial', density=0.25, dense_steps=0.25)" in script


def test_an_example_names_its_preset_while_it_exists():
    result = {"preset": "balanced, dense steps of a paper", "method": "routed", "density_asked": 0.15, "prompt": "a"}
    assert result_title(result) == "balanced (routed at density 0.15): a"
    assert result_title(result | {"density_asked": 0.3}) == "routed at density 0.3: a"
    assert result_title(result | {"preset": None, "density_asked": None}) == "routed: a"


@pytest.fixture(scope="module")
def address(app):
    blocks = app.Page(["shapes-wan-i2v"], local=True).build()
    app.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield blocks.local_url
    blocks.close()


@pytest.fixture
def visit(chromium, address):
    """Open the page in a session of its own; errors in the browser's console fail the test."""
    contexts, errors = [], []

    def open_page(**settings):
        contexts.append(chromium.new_context(**settings))
        tab = contexts[-1].new_page()
        tab.set_default_timeout(TIMEOUT)
        tab.on("pageerror", lambda error: errors.append(str(error)))
        tab.goto(address)
        tab.get_by_role("button", name="Generate", exact=True).wait_for()
        tab.locator("#clips video").nth(2).wait_for()
        return tab

    yield open_page
    for context in contexts:
        context.close()
    assert errors == []


def fill(tab, steps=2, **size):
    if not tab.get_by_label("Frames", exact=True).is_visible():
        tab.get_by_role("button", name="Advanced").click()
    for label, value in (SMALL | size).items():
        tab.get_by_label(label, exact=True).fill(str(value))
    box = tab.get_by_label("number input for Denoising steps")
    box.fill(str(steps))
    box.press("Enter")


def numbers(tab):
    return tab.locator("#numbers")


def wait_for_result(tab, text):
    """Wait for a result with this text, and return all of its text."""
    numbers(tab).get_by_text(text).wait_for()
    return numbers(tab).inner_text()


@in_a_browser
def test_an_example_is_loaded_and_its_clips_play_together(visit):
    tab = visit()
    text = numbers(tab).inner_text()
    assert "Example: balanced (routed at density 0.15)" in text and "PSNR" in text
    assert tab.get_by_label("balanced: ").is_checked()
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
def test_generate_with_another_method_and_setting(visit, tmp_path):
    tab = visit()
    fill(tab)
    tab.get_by_label("Method", exact=True).fill("svg")
    tab.get_by_role("option", name="svg", exact=True).click()
    tab.get_by_label("samples").fill("32")
    tab.get_by_label("samples").press("Tab")
    tab.get_by_role("button", name="Python script").click()
    tab.get_by_text("samples").last.wait_for()
    tab.get_by_role("button", name="Generate", exact=True).click()
    assert "Result: svg" in wait_for_result(tab, "4x12x12 tokens, 2 steps")
    assert tab.get_by_label("custom: ").is_checked()
    with tab.expect_download() as download:
        tab.locator("a[download='result.json']").click()
    download.value.save_as(tmp_path / "result.json")
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["method"] == "svg(samples=32)" and result["settings"]["samples"] == 32 and result["steps"] == 2
    tab.wait_for_function(
        "[...document.querySelectorAll('#clips video')].every(v => v.readyState > 2 && v.duration > 0)"
    )


def start_a_long_run(tab) -> None:
    """Start a request that takes minutes, and wait until it runs."""
    fill(tab, steps=50, **LONG)
    tab.get_by_role("button", name="Generate", exact=True).click()
    tab.get_by_text("s left").first.wait_for()


@in_a_browser
def test_a_request_can_be_cancelled_and_followed_by_another(visit):
    tab = visit()
    cancel = tab.get_by_role("button", name="Cancel")
    assert not cancel.is_visible()
    start_a_long_run(tab)
    cancel.click()
    tab.get_by_text("Cancelled.").wait_for()
    cancel.wait_for(state="hidden")
    fill(tab)
    tab.get_by_role("button", name="Generate", exact=True).click()
    cancel.wait_for()
    assert "Result: balanced (routed" in wait_for_result(tab, "4x12x12 tokens, 2 steps")
    cancel.wait_for(state="hidden")


@in_a_browser
def test_an_example_fills_in_its_settings_and_a_preset_its_own(visit):
    tab = visit()
    tab.get_by_role("button", name="Advanced").click()
    tab.get_by_role("button", name="svg at density 0.2: a green triangle moves left over a still background").click()
    wait_for_result(tab, "Example: svg at density 0.2")
    method, density = tab.get_by_label("Method", exact=True), tab.get_by_label("number input for Density")
    assert (method.input_value(), density.input_value()) == ("svg", "0.2") and tab.get_by_label("custom: ").is_checked()
    assert tab.get_by_label("Prompt").input_value() == "a green triangle moves left over a still background"
    tab.get_by_label("quality: ").check()
    tab.get_by_label("spread").wait_for()  # a setting of routed
    assert (method.input_value(), density.input_value()) == ("routed", "0.25")
    tab.get_by_label("spread").uncheck()
    tab.wait_for_function("document.querySelector('#preset input[value=custom]').checked")


@in_a_browser
def test_a_new_request_replaces_the_previous_one(visit):
    tab = visit()
    start_a_long_run(tab)
    fill(tab)
    tab.get_by_role("button", name="Generate", exact=True).click()
    wait_for_result(tab, "4x12x12 tokens, 2 steps")


@in_a_browser
def test_an_invalid_field_is_a_message(visit):
    tab = visit()
    fill(tab, Frames=1000)
    tab.get_by_role("button", name="Generate", exact=True).click()
    tab.get_by_text("frames must be a whole number in [1, 32], got 1000").first.wait_for()


@in_a_browser
def test_texts_of_a_form_are_no_markup(visit):
    tab = visit()
    markup = "<img src=x onerror=\"document.title='injected'\"> ![a](b) ${1+1} {{value}} a red circle moves right"
    fill(tab)
    tab.get_by_label("Prompt").fill(markup)
    tab.get_by_role("button", name="Generate", exact=True).click()
    assert markup in wait_for_result(tab, "4x12x12 tokens, 2 steps")
    tab.get_by_label("Method", exact=True).fill(markup)
    tab.get_by_label("Method", exact=True).press("Enter")
    tab.get_by_role("button", name="Generate", exact=True).click()
    tab.get_by_text("cannot read the method").first.wait_for()
    assert tab.title() == "dit-sparse" and tab.locator("img[src=x], #numbers img").count() == 0


@in_a_browser
def test_two_sessions_have_their_own_results(visit):
    tabs = visit(), visit()
    for seed, tab in enumerate(tabs):
        fill(tab)
        tab.get_by_label("Seed").fill(str(40 + seed))
        tab.get_by_role("button", name="Generate", exact=True).click()
    for seed, tab in enumerate(tabs):
        wait_for_result(tab, f"seed {40 + seed}")


@in_a_browser
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_page_fits_on_a_phone(visit, scheme):
    tab = visit(viewport={"width": 390, "height": 844}, color_scheme=scheme)
    for name in ("Advanced", "Python script"):
        tab.get_by_role("button", name=name).click()
    tab.get_by_text("from dit_sparse.bundled").wait_for()
    assert tab.evaluate("document.documentElement.scrollWidth") <= 390
    clips, form, details = (tab.locator(f"#{name}").bounding_box()["y"] for name in ("clips", "form", "details"))
    assert clips < form < details
    background = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, background.strip("rgba()").split(",")[:3])) < 200) == (scheme == "dark")


@pytest.mark.parametrize(
    "path", ["/etc/passwd", str(ROOT / "pyproject.toml"), str(ROOT / "docs/examples/../design.md"), "app.py"]
)
def test_files_of_the_server_are_not_served(address, path):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f"{address}gradio_api/file={path}")
    assert error.value.code in (403, 404)
