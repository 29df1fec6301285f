"""Checks of the arguments of the page before it starts."""

from __future__ import annotations

import socket
from pathlib import Path

from ..bundled import BUNDLED


def check_model(model: str) -> None:
    """Raise ValueError if a model is neither a folder with a pipeline nor a name on the hub."""
    is_folder = Path(model).exists() or model.startswith((".", "/", "~"))
    if is_folder and not (Path(model) / "model_index.json").is_file():
        raise ValueError(f"{model} is not a diffusers pipeline: it has no model_index.json")
    if not is_folder and model != BUNDLED and model.count("/") != 1:
        raise ValueError(f"the model must be {BUNDLED}, a folder or OWNER/NAME on the Hugging Face hub, got {model!r}")


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
