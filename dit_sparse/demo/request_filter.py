"""ASGI filter in front of the Gradio page: only the routes of the page, small bodies, and the names of this machine."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import unquote, urlsplit

MAX_BODY_BYTES = 64 * 1024
LOCAL_HOSTS = frozenset({"localhost", "127.0.0.1", "::1"})

_API = "/gradio_api/"
_READABLE = ("file=/", "heartbeat/", "queue/data", "startup-events", "info", "theme.css", "app_id")
_WRITABLE = ("queue/join", "run/", "cancel", "reset")

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]


class RequestFilter:
    """Refuse requests that the page never makes: uploads and other routes of Gradio, large bodies, foreign hosts.

    Args:
        app: the ASGI application.
        local: whether the page is bound to localhost. Then ``Host`` and ``Origin`` must name this machine: another
            site can reach the page under its own name (DNS rebinding), or post to it.
    """

    def __init__(self, app: Callable[..., Awaitable[None]], local: bool) -> None:
        self.app, self.local = app, local

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

    def _refusal(self, method: str, path: str, headers: dict[bytes, str]) -> tuple[int, str] | None:
        if self.local and not _is_local(f"//{headers.get(b'host', '')}"):
            return 400, "the Host header must be localhost"
        if self.local and b"origin" in headers and not _is_local(headers[b"origin"]):
            return 403, "the Origin header must be localhost"
        path = unquote(path)
        routes = {"GET": _READABLE, "HEAD": _READABLE, "POST": _WRITABLE}.get(method, ())
        if path.startswith(_API):
            known = path.removeprefix(_API).startswith(routes) if routes else method == "OPTIONS"
        else:
            known = method in ("GET", "HEAD", "OPTIONS")
        return None if known else (403, "the page has no such route")


def _is_local(url: str) -> bool:
    try:
        return urlsplit(url).hostname in LOCAL_HOSTS
    except ValueError:
        return False


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
