"""Checks of the arguments of the page before it starts."""

from __future__ import annotations

import socket


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
