"""Start of a Gradio page: its address, and an ASGI filter for its routes, small bodies, and names of this machine."""

from __future__ import annotations

import ipaddress
import socket
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

if TYPE_CHECKING:
    import gradio as gr

MAX_BODY_BYTES = 64 * 1024
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_API = "/gradio_api/"
_READABLE = ("file=/", "heartbeat/", "queue/data", "startup-events", "info", "theme.css", "app_id")
_WRITABLE = ("queue/join", "run/", "cancel", "reset")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequestFilter:
    """Reject requests that the page does not make: uploads and other routes of Gradio, large bodies, foreign hosts.

    Another site can reach the page under its own name (DNS rebinding), or post to it. So ``Host`` must name this
    machine, and ``Origin`` the same host. If the page is not bound to localhost, any IP address is a valid host,
    because DNS rebinding requires a host name.

    Args:
        app: the ASGI application.
        local: whether the page is bound to localhost.
        hosts: further names of this machine.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], local: bool, hosts: Collection[str] = ()) -> None:
        self.app, self.local = app, local
        own = () if local else (socket.gethostname(), f"{socket.gethostname()}.local")
        self.hosts = LOCAL_HOSTS | {host.lower().rstrip(".") for host in (*own, *hosts)}

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] != "http":
            return await send({"type": "websocket.close"})
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        if refusal := self._refusal(scope["method"], scope["path"], headers):
            return await _refuse(send, *refusal)
        messages = await _read_body(receive) if scope["method"] == "POST" else []
        if messages is None:
            return await _refuse(send, 413, f"the request must have at most {MAX_BODY_BYTES} bytes")

        async def replay() -> Message:
            return messages.pop(0) if messages else await receive()

        return await self.app(scope, replay, send)

    def _is_own(self, host: str) -> bool:
        return host in self.hosts or (not self.local and _is_address(host))

    def _refusal(self, method: str, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        host = _host_name(f"//{headers.get(b'host', '')}")
        if not self._is_own(host):
            allowed = "localhost" if self.local else "an address or a name of this machine; see --allow-host"
            return 400, f"the Host header must be {allowed}"
        if b"origin" in headers and _host_name(headers[b"origin"]) not in (LOCAL_HOSTS if self.local else {host}):
            return 403, "the Origin header must be the host of the page"
        path = unquote(path)
        routes = {"GET": _READABLE, "HEAD": _READABLE, "POST": _WRITABLE}.get(method, ())
        if path.startswith(_API):
            known = path.removeprefix(_API).startswith(routes) if routes else method == "OPTIONS"
        else:
            known = method in ("GET", "HEAD", "OPTIONS")
        return None if known else (403, "the page has no such route")


def _host_name(url: str) -> str:
    try:
        return (urlsplit(url).hostname or "").rstrip(".")
    except ValueError:
        return ""


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


async def _read_body(receive: Receive) -> list[Message] | None:
    """Return the messages of a body, or None if it is too long."""
    messages, size = [], 0
    while not messages or (messages[-1]["type"] == "http.request" and messages[-1].get("more_body")):
        messages.append(await receive())
        size += len(messages[-1].get("body", b""))
        if size > MAX_BODY_BYTES:
            return None
    return messages


async def _refuse(send: Send, status: int, reason: str) -> None:
    headers = [(b"content-type", b"text/plain; charset=utf-8")]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": reason.encode()})


def check_address(host: str, port: int) -> None:
    """Raise ValueError if the page cannot listen on the address."""
    if not 1 <= port <= 65535:
        raise ValueError(f"the port must be in [1, 65535], got {port}")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"cannot listen on {host}:{port}: {reason}; choose another --host or --port") from None


def launch_filtered(
    blocks: gr.Blocks, css: str, script: str, folder: Path, local: bool, hosts: Collection[str] = (), **where: Any
) -> None:
    """Launch a page behind the filter, with the settings of safety that all pages share.

    Args:
        css: style sheet of the page.
        script: contents of its ``<head>``.
        folder: the only folder whose files are served.
        local, hosts: as in `RequestFilter`.
        where: address, port and other arguments of ``gr.Blocks.launch``.
    """
    blocks.queue(max_size=64, api_open=False).launch(
        css=css,
        head=script,
        allowed_paths=[str(folder)],
        app_kwargs={"middleware": [(RequestFilter, (), {"local": local, "hosts": tuple(hosts)})]},
        max_file_size=1,
        share=False,
        ssr_mode=False,
        mcp_server=False,
        enable_monitoring=False,
        show_error=False,
        **where,
    )
