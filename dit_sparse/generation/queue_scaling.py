"""Measure how the queue of ``--engine ray`` scales on this machine: the time of many tiny clips with one worker and
with several, each with one CPU thread or one GPU.

The time is that from the start of the first clip to the end of the last one, without starting Ray and loading the
model. Run it on an idle machine:

    python -m dit_sparse.generation.queue_scaling --rows 200 --workers 2
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections import Counter
from datetime import datetime
from pathlib import Path

from ..output.environment import conditions
from ..output.files import save_json
from .batch import Batch
from .prompts import Row
from .ray_batch import run_batch

CALL = {"num_inference_steps": 4, "num_frames": 4, "height": 64, "width": 64}


def measure(rows: int, workers: int) -> dict:
    """Return the seconds of a batch of tiny clips on a new local cluster, and the number of clips of each worker."""
    import ray

    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level="error")
    prompts = [(f"clip{number:04d}", Row(prompt="a red circle moves left", seed=number)) for number in range(rows)]
    try:
        with tempfile.TemporaryDirectory() as folder:
            batch = Batch(prompts, Path(folder), settings={"method": "radial", "executor": "gather"}, call=CALL)
            clips = run_batch(batch, lambda name: lambda done, total: None, workers)["clips"]
    finally:
        ray.shutdown()
    if failed := next((clip for clip in clips if clip["status"] != "done"), None):
        raise RuntimeError(f"{failed['name']} is {failed['status']}: {failed.get('error')}")
    start, end = min(clip["start"] for clip in clips), max(clip["end"] for clip in clips)
    seconds = (datetime.fromisoformat(end) - datetime.fromisoformat(start)).total_seconds()
    return {"workers": workers, "seconds": seconds, "clips": sorted(Counter(c["process"] for c in clips).values())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=200, help="number of clips")
    parser.add_argument("--workers", type=int, default=2, help="number of workers that is compared with one")
    parser.add_argument("--out", type=Path, help="JSON file of the result")
    options = parser.parse_args()
    alone, together = measure(options.rows, 1), measure(options.rows, options.workers)
    ratio = together["seconds"] * options.workers / alone["seconds"]
    result = conditions() | {"rows": options.rows, "call": CALL, "runs": [alone, together], "time_to_ideal": ratio}
    if options.out:
        save_json(options.out, result)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
