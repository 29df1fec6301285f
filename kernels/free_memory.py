"""Free memory of a device, for methods that keep tensors over many steps."""

from __future__ import annotations

import logging
from pathlib import Path

import torch

log = logging.getLogger("dit_sparse")


def require_memory(what: str, need: int, reserved_bytes: int, device: torch.device, advice: str) -> None:
    """Log how much memory a method needs. Raises RuntimeError, with ``advice``, if it is not free."""
    free, message = _free_bytes(device), f"{what} needs {need / 2**30:.2f} GiB on {device}"
    if need + reserved_bytes > free:
        reserved = f", {reserved_bytes / 2**30:.2f} GiB are reserved for other branches" if reserved_bytes else ""
        raise RuntimeError(f"{message}{reserved}, and {free / 2**30:.2f} GiB are free; {advice}")
    log.info("%s", message)


def has_memory(what: str, need: int, device: torch.device) -> bool:
    """Whether ``need`` bytes are free in addition to the largest amount that was allocated so far on a GPU. Logs the
    amount, or warns that it is not free."""
    free, message = _free_bytes(device), f"{what} needs {need / 2**30:.2f} GiB on {device}"
    if device.type == "cuda":
        free -= torch.cuda.max_memory_allocated(device) - torch.cuda.memory_allocated(device)
    if need > free:
        log.warning("%s, %.2f GiB are free: it is left out", message, max(free, 0) / 2**30)
    else:
        log.info("%s", message)
    return need <= free


def _free_bytes(device: torch.device) -> int:
    """Return the free memory of a device; of the CPU what Linux reports as available without swapping."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), 1 << 62)
