"""Share work among the processes of a launch, and stop it at a signal.

The first process sends the list of remaining items to the others, and each process takes every n-th item. The processes
do not communicate after that, so none waits for a process that was killed.
"""

from __future__ import annotations

import functools
import itertools
import json
import logging
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

_log = logging.getLogger("dit_sparse")
_shard_numbers = itertools.count()


class Interrupted(Exception):
    """SIGINT or SIGTERM was received, and the current denoising step has ended."""


def shard(names_left: Callable[[], list[str]]) -> list[str]:
    """Return this process's share of the remaining clips, as listed by the first process."""
    if int(os.environ.get("WORLD_SIZE", 1)) < 2:
        return names_left()
    from torch.distributed import DistStoreError

    store, rank, world_size = _rendezvous()
    key = f"dit-sparse-batch-{next(_shard_numbers)}"
    if rank == 0:
        store.set(key, json.dumps(names_left()))
    names = json.loads(store.get(key))
    store.set(f"{key}-{rank}", "received")
    if rank == 0:  # the store may end with this process: wait for the others, with a limit in case one was killed
        with suppress(DistStoreError):
            store.wait([f"{key}-{other}" for other in range(world_size)], timedelta(minutes=1))
    return names[rank::world_size]


@functools.cache
def _rendezvous() -> tuple[Any, int, int]:
    """Return the store, the rank and the number of processes of a launch."""
    from torch.distributed import rendezvous

    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    return next(rendezvous("env://"))


@contextmanager
def file_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Hold an exclusive lock of this machine's processes, and yield whether it was acquired.

    The operating system releases the lock of a process that was killed. The file is removed at the end. Without locks,
    as on Windows and some network file systems, the lock counts as acquired after a warning.

    Args:
        path: the lock file.
        wait: whether to wait for a process that holds the lock.
    """
    try:
        descriptor = _acquire(path, wait)
    except (ImportError, OSError) as error:
        _log.warning("cannot lock %s (%s): do not run two batches in this folder at once", path, error)
        yield True
        return
    try:
        yield descriptor is not None
    finally:
        if descriptor is not None:
            path.unlink(missing_ok=True)
            os.close(descriptor)


def _acquire(path: Path, wait: bool) -> int | None:
    """Return the descriptor of a locked file, or None if another process holds the lock."""
    import fcntl

    while True:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            with suppress(FileNotFoundError):  # otherwise the previous holder has removed the file
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return descriptor
            os.close(descriptor)
        except BlockingIOError:
            os.close(descriptor)
            return None
        except BaseException:
            os.close(descriptor)
            raise


@contextmanager
def interruptible(on_signal: Callable[[], Any]) -> Iterator[list[int]]:
    """Yield a list that the first SIGINT or SIGTERM is appended to; a second one ends the process at once."""
    signals: list[int] = []
    handlers = {}

    def handle(number: int, _: Any) -> None:
        signals.append(number)
        signal.signal(number, handlers[number])
        on_signal()

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers[number] = signal.signal(number, handle)
    try:
        yield signals
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
