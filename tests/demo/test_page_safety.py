"""The page under hostile or impatient use: refused requests, overtaking clicks, texts, the start."""

import asyncio
import importlib
import json
import os
import re
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from concurrent.futures import Future
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from dit_sparse.cli.main import app as cli
from dit_sparse.demo.demo import Demo
from dit_sparse.demo.device_pool import Cancelled
from dit_sparse.demo.request import GenerationRequest
from dit_sparse.demo.request_filter import MAX_BODY_BYTES, RequestFilter
from dit_sparse.demo.result_page import read_result, result_table
from dit_sparse.demo.sessions import MAX_REQUESTS, MAX_REQUESTS_PER_ADDRESS, MAX_SESSIONS, Sessions
from dit_sparse.output.files import save_json

ROOT = Path(__file__).parents[2]
MARKUP = "<img src=x onerror=\"document.title='injected'\"> ![a](b) $x$ ${1+1} {{value}}"


@pytest.fixture(scope="module")
def app():
    return importlib.import_module("dit_sparse.demo.page")


@pytest.fixture(scope="module")
def page(app):
    return app.Page(["shapes-wan-i2v"], local=True)


@pytest.fixture(scope="module")
def server(app, page):
    blocks = page.build()
    app.launch(blocks, server_name="127.0.0.1", prevent_thread_lock=True, quiet=True)
    yield blocks
    blocks.close()


def status(server, path="", headers=None, data=None) -> int:
    request = urllib.request.Request(f"{server.local_url}{path}", data, {"content-type": "application/json"} | headers)
    try:
        return urllib.request.urlopen(request, timeout=10).status
    except urllib.error.HTTPError as error:
        return error.code


# --- results


def example() -> dict:
    return json.loads((ROOT / "docs/examples/1/result.json").read_text())


def test_a_result_with_numbers_that_json_lacks_is_shown(tmp_path):
    values = {"psnr": float("inf"), "ssim": float("nan"), "speedup": float("nan"), "density_achieved": None}
    save_json(tmp_path / "result.json", example() | values)
    table = result_table(read_result(tmp_path))
    assert "inf / -" in table and "<td>-</td>" in table
    assert read_result(tmp_path)["psnr"] == float("inf")


def test_equal_clips_are_a_result(app, tmp_path):
    request = GenerationRequest(
        prompt="a red circle moves up", steps=2, frames=1, height=16, width=16, dense_steps=1.0, method="radial"
    )
    Demo(request.prompt, request.processor, tmp_path, 0, request.call).run(lambda name: lambda *_: None)
    assert "inf" in app._outputs(tmp_path, read_result(tmp_path))[0]


def test_texts_of_a_result_are_escaped():
    texts = ("prompt", "method", "grid", "executor", "device")
    table = result_table(example() | dict.fromkeys(texts, MARKUP))
    assert "<img" not in table and table.count("&lt;img") == len(texts) + 1, "the method is in the title, too"


# --- clicks


def test_an_older_click_never_replaces_a_newer_one():
    sessions = Sessions()
    first = sessions.start("a", 1)
    second = sessions.start("a", 3)
    assert first.cancel.is_set() and not sessions.finish("a", first)
    assert sessions.start("a", 2) is None, "arrives after a newer click"
    assert sessions.supersede("a", 4) == (True, True) and not sessions.finish("a", second)
    assert sessions.supersede("a", 4) == (False, False)
    assert sessions.finish("a", sessions.start("a", 5))


def test_a_cancel_does_not_wait_for_the_device():
    sessions, future = Sessions(), Future()
    future.set_running_or_notify_cancel()
    request, ended = sessions.start("a", 1), []

    def wait():
        with pytest.raises(Cancelled):
            request.wait(future)
        ended.append(True)

    thread = Thread(target=wait)
    thread.start()
    sessions.supersede("a", 2)
    thread.join(5)
    assert ended


def test_one_session_has_one_request_and_all_have_a_limit():
    sessions = Sessions()
    for click in range(1, 5 * MAX_REQUESTS):
        sessions.start("greedy", click, "one")
    for tab in range(MAX_REQUESTS_PER_ADDRESS - 1):
        sessions.start(f"tab {tab}", 1, "one")
    with pytest.raises(ValueError, match="of your requests are waiting or running"):
        sessions.start("another tab", 1, "one")
    for number in range(MAX_REQUESTS - MAX_REQUESTS_PER_ADDRESS):
        sessions.start(f"visitor {number}", 1, f"address {number}")
    with pytest.raises(ValueError, match=f"^{MAX_REQUESTS} requests are waiting or running"):
        sessions.start("another", 1, "another")
    sessions.close("greedy")
    assert sessions.start("another tab", 2, "one")
    for number in range(2 * MAX_SESSIONS):
        sessions.is_new(f"idle {number}"), sessions.supersede(f"idle {number}", 1)
    assert len(sessions._sessions) <= MAX_SESSIONS


def test_only_requests_are_queued(server, page):
    queued = [fn for fn in server.fns.values() if fn.queue and fn.targets[0][1] != "unload"]
    assert [fn.fn.__name__ for fn in queued] == ["_run"] and queued[0].concurrency_limit is None


# --- the filter of requests


@pytest.mark.parametrize(
    ("path", "headers", "body", "expected"),
    [
        ("", {}, None, 200),
        ("", {"Host": "evil.example"}, None, 400),
        ("", {"Host": "localhost.evil.example:7860"}, None, 400),
        ("", {"Host": "[::1]:7860"}, None, 200),
        ("gradio_api/queue/join", {"Origin": "http://evil.example"}, b"{}", 403),
        ("gradio_api/upload", {}, b"x", 403),
        ("gradio_api//upload", {}, b"x", 403),
        ("gradio_api/%75pload", {}, b"x", 403),
        ("gradio_api/process_recording", {}, b"x", 403),
        ("gradio_api/component_server", {}, b"{}", 403),
        ("gradio_api/deep_link?session_hash=a", {}, None, 403),
        ("gradio_api/file=http://example.com", {}, None, 403),
        ("login", {}, b"x", 403),
        ("gradio_api/queue/join", {}, b" " * (MAX_BODY_BYTES + 1), 413),
    ],
)
def test_requests_that_the_page_never_makes_are_refused(server, path, headers, body, expected):
    assert status(server, path, headers, body) == expected


@pytest.mark.parametrize(
    ("host", "origin", "expected"),
    [
        ("localhost:7860", None, 200),
        ("192.168.0.7:7860", "http://192.168.0.7:7860", 200),
        ("[fe80::1]:7860", "http://[fe80::1]:7860", 200),
        (f"{socket.gethostname()}:7860", None, 200),
        ("Demo.Example.org", "https://demo.example.org", 200),
        ("evil.example", None, 400),
        ("192.168.0.7.evil.example", None, 400),
        ("[", None, 400),
        ("", None, 400),
        ("192.168.0.7", "http://10.0.0.1", 403),
        ("192.168.0.7", "null", 403),
    ],
)
def test_a_public_page_answers_to_addresses_and_its_own_names(host, origin, expected):
    """Another site that has its name point to this machine (DNS rebinding) sends its own name as the host."""
    sent = []

    async def page(scope, receive, send):
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message):
        sent.append(message)

    headers = [(b"host", host.encode())] + ([(b"origin", origin.encode())] if origin else [])
    scope = {"type": "http", "method": "GET", "path": "/", "headers": headers}
    asyncio.run(RequestFilter(page, local=False, hosts=["demo.example.org."])(scope, None, send))
    assert sent[0]["status"] == expected


@pytest.mark.parametrize("field", ["model", "prompt", "method", "settings"])
def test_long_texts_are_refused_before_they_are_parsed(page, field):
    long = "pooled(" * 10_000
    values = {"model": "shapes-wan-i2v", "prompt": "a red circle moves up", "method": "radial", "settings": {}}
    values |= {field: {"decay": long} if field == "settings" else long}
    model, prompt, method, settings = values.values()
    with pytest.raises(ValueError, match="must have at most 500 characters"):
        page._request(model, prompt, "custom", 0, 2, 0, 0, 0, "auto", method, 0.25, False, 0.25, settings)


# --- the start


def start(*arguments: str, **environment: str) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-W", "ignore", "app.py", *arguments],
        cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | environment,
    )  # fmt: skip
    return process.returncode, process.stderr


def test_a_failing_start_is_one_sentence(app):
    with socket.create_server(("127.0.0.1", 0)) as busy:
        cases = {
            ("--port", str(busy.getsockname()[1])): "cannot listen on 127.0.0.1:",
            ("--port", "70000"): "the port must be in [1, 65535], got 70000",
            ("--host", "no.such.host.invalid"): "cannot listen on no.such.host.invalid:7860",
            ("--model", "/no/such/model"): "cannot load the model /no/such/model: it is not a diffusers pipeline",
            ("--model", "nope"): "cannot load the model nope: it is not a diffusers pipeline",
        }
        for arguments, message in cases.items():
            result = CliRunner().invoke(cli, ["app", *arguments])
            assert result.exit_code == 2 and result.stderr.startswith(f"dit-sparse: {message}"), result.stderr
            assert result.stderr.count("\n") == 1


def test_a_start_without_gradio_is_one_sentence(tmp_path):
    (tmp_path / "gradio.py").write_text("raise ModuleNotFoundError('no module', name='gradio')")
    code, output = start(PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert code == 2 and re.fullmatch(r"dit-sparse: the page needs Gradio: .*\n", output)
