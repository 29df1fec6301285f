"""Clicks and running requests of the sessions of the page."""

from __future__ import annotations

from collections import OrderedDict
from concurrent.futures import Future
from dataclasses import dataclass, field
from tempfile import TemporaryDirectory
from threading import Event, Lock
from typing import Any

from .device_pool import Cancelled

MAX_SESSIONS = 1000
MAX_REQUESTS = 16  # of all sessions together, running or waiting
MAX_REQUESTS_PER_ADDRESS = 4  # so that one visitor with many tabs does not block others


@dataclass(eq=False)
class ActiveRequest:
    """A request that waits or runs.

    Attributes:
        click: number of its click, which increases within a session.
        address: network address of the visitor.
        cancel: set when the request is cancelled or replaced.
    """

    click: int
    address: str = ""
    cancel: Event = field(default_factory=Event)
    _wake: Event = field(default_factory=Event)

    def stop(self) -> None:
        self.cancel.set()
        self._wake.set()

    def wait(self, future: Future) -> Any:
        """Return the result of ``future``. Raises Cancelled as soon as the request is cancelled."""
        future.add_done_callback(lambda _: self._wake.set())
        self._wake.wait()
        if self.cancel.is_set():
            future.cancel()
            raise Cancelled
        return future.result()


@dataclass
class _Session:
    click: int = 0  # the latest
    request: ActiveRequest | None = None
    folder: TemporaryDirectory | None = None  # of the latest result


class Sessions:
    """The latest click of each session, with at most one request. A newer click cancels the request of an older one."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._sessions: OrderedDict[str, _Session] = OrderedDict()  # the least recently used one first

    def start(self, name: str, click: int, address: str = "") -> ActiveRequest | None:
        """Cancel the request of a session and return a new one, or None if there was a newer click.

        Raises:
            ValueError: there are too many requests, of this address or of all.
        """
        with self._lock:
            session = self._session(name)
            if click <= session.click:
                return None
            self._supersede(session, click)
            active = [each.request for each in self._sessions.values() if each.request is not None]
            if sum(request.address == address for request in active) >= MAX_REQUESTS_PER_ADDRESS:
                raise ValueError(f"{MAX_REQUESTS_PER_ADDRESS} of your requests are waiting or running; try again later")
            if len(active) >= MAX_REQUESTS:
                raise ValueError(f"{MAX_REQUESTS} requests are waiting or running; try again later")
            session.request = ActiveRequest(click, address)
            return session.request

    def supersede(self, name: str, click: int) -> tuple[bool, bool]:
        """Cancel the request of a session, if it is older than the click. Returns whether the click is the latest one,
        and whether a request was cancelled."""
        with self._lock:
            session = self._session(name)
            if click <= session.click:
                return False, False
            return True, self._supersede(session, click)

    def is_new(self, name: str) -> bool:
        """Return whether a session has no clicks yet."""
        with self._lock:
            return name not in self._sessions or self._sessions[name].click == 0

    def is_active(self, name: str) -> bool:
        """Return whether a request of a session waits or runs."""
        with self._lock:
            return name in self._sessions and self._sessions[name].request is not None

    def finish(self, name: str, request: ActiveRequest, folder: TemporaryDirectory | None = None) -> bool:
        """End a request and keep the folder of its result. Returns whether the result may be displayed."""
        with self._lock:
            session = self._sessions.get(name)
            if session is None or session.request is not request:
                return False
            session.request = None
            session.folder = folder or session.folder
            return not request.cancel.is_set()

    def close(self, name: str) -> None:
        """Cancel the request of a session, and forget the session."""
        with self._lock:
            if session := self._sessions.pop(name, None):
                self._supersede(session, session.click)

    def _session(self, name: str) -> _Session:
        session = self._sessions.setdefault(name, _Session())
        self._sessions.move_to_end(name)
        idle = [key for key, each in self._sessions.items() if each.request is None and key != name]
        for key in idle[: max(0, len(self._sessions) - MAX_SESSIONS)]:
            del self._sessions[key]
        return session

    @staticmethod
    def _supersede(session: _Session, click: int) -> bool:
        request, session.request, session.click = session.request, None, click
        if request:
            request.stop()
        return request is not None
