"""The devices that run the requests of the Gradio page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from contextvars import copy_context
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from threading import Event
from typing import Any

import torch

from ..generation.generate import Progress, Stage, load_pipeline
from ..generation.time_estimate import TimeEstimate, estimate_time
from .demo import Demo
from .request import GenerationRequest


class Cancelled(Exception):
    """The request was cancelled, and the current denoising step has ended."""


class DevicePool:
    """Devices with one loaded model each. A request waits for the next free device.

    Args:
        devices: default: all CUDA devices, or else the CPU.
    """

    def __init__(self, devices: Sequence[str] | None = None) -> None:
        cuda = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
        self.devices = list(devices or cuda or ["cpu"])
        self._free: SimpleQueue[str] = SimpleQueue()
        self._loaded: dict[str, tuple[str, Any]] = {}
        self._corrections: dict[str, tuple[float, float]] = {}  # by model: measured / estimated, dense and sparse
        self._threads = ThreadPoolExecutor(len(self.devices), "device")
        for device in self.devices:
            self._free.put(device)

    def submit(self, request: GenerationRequest, out: Path, stage: Stage, cancel: Event) -> Future:
        """Call `run` in a thread of a device, in the context of the caller."""
        return self._threads.submit(copy_context().run, self.run, request, out, stage, cancel)

    def run(self, request: GenerationRequest, out: Path, stage: Stage, cancel: Event) -> dict:
        """Generate videos, plots and ``result.json`` in ``out``, and return the result.

        Raises:
            ValueError: the model cannot be loaded or made sparse, or there is too little memory.
            Cancelled: ``cancel`` was set.
        """
        with self._device() as device:
            if cancel.is_set():
                raise Cancelled
            demo = Demo(request.prompt, request.processor, out, request.seed, request.call, request.model)
            try:
                result = demo.run(lambda name: _cancellable(stage, name, cancel), self._pipeline(request.model, device))
            except torch.OutOfMemoryError:
                raise ValueError("out of memory: use fewer frames or a smaller size") from None
            self._correct_estimates(request, result)
            return result

    def estimate(self, request: GenerationRequest) -> TimeEstimate | None:
        """Return the estimated denoising times of a request on one device, corrected by those of the last clip of its
        model; None if they cannot be estimated."""
        estimate = self._uncorrected_estimate(request)
        if estimate is None:
            return None
        dense, sparse = self._corrections.get(request.model, (1.0, 1.0))
        sparse_seconds = None if estimate.sparse is None else sparse * estimate.sparse
        return replace(estimate, dense=dense * estimate.dense, sparse=sparse_seconds)

    def _uncorrected_estimate(self, request: GenerationRequest) -> TimeEstimate | None:
        return estimate_time(request.model, request.call, request.processor, self.devices[0])

    def _correct_estimates(self, request: GenerationRequest, result: dict) -> None:
        estimate = self._uncorrected_estimate(request)
        if estimate is not None:
            dense = result["seconds_dense"] / estimate.dense
            sparse = result["seconds_sparse"] / estimate.sparse if estimate.sparse else dense
            self._corrections[request.model] = dense, sparse

    @contextmanager
    def _device(self) -> Iterator[str]:
        device = self._free.get()
        try:
            with torch.cuda.device(device) if device.startswith("cuda") else nullcontext():
                yield device
        finally:
            self._free.put(device)

    def _pipeline(self, model: str, device: str) -> Any:
        name, pipe = self._loaded.get(device, ("", None))
        if name != model:
            self._loaded.pop(device, None)
            pipe = None  # free the memory of the previous model first
            pipe = load_pipeline(model, device)
            self._loaded[device] = (model, pipe)
        return pipe


def _cancellable(stage: Stage, name: str, cancel: Event) -> Progress:
    """Return the progress of a stage. After a cancel it reports nothing and raises Cancelled."""

    def check() -> None:
        if cancel.is_set():
            raise Cancelled

    check()
    progress = stage(name)

    def on_step(done: int, steps: int) -> None:
        check()
        progress(done, steps)
        check()

    return on_step
