"""The training loop: checkpoints, progress and the ways to stop."""

import signal
import time
from pathlib import Path
from typing import Any

from .loss_meter import LossMeter

CHECKPOINT = "checkpoint.pt"


def train(trainer: Any, out: Path, name: str, save_every: float = 180.0, **save_options: Any) -> None:
    """Train until the budget is used, SIGTERM arrives or ``out/STOP`` exists; then save and export to ``out/name``.

    Args:
        trainer: has ``step()``, ``save(path, **save_options)``, ``export(folder)`` and what `LossMeter.report` reads.
        save_every: seconds between checkpoints.
    """
    stop_requests = []
    signal.signal(signal.SIGTERM, lambda *_: stop_requests.append(True))
    meter, saved_at = LossMeter(), time.monotonic()
    while trainer.fraction < 1 and not stop_requests and not (out / "STOP").exists():
        meter.update(*trainer.step())
        meter.report(trainer)
        if time.monotonic() - saved_at > save_every:
            trainer.save(out / CHECKPOINT, **save_options)
            saved_at = time.monotonic()
    meter.report(trainer, force=True)
    trainer.save(out / CHECKPOINT, **save_options)
    trainer.export(out / name)
