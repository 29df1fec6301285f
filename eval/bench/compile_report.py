"""Compile the Triton kernels for a GPU architecture, without such a GPU, and report the resources they use.

    python -m dit_sparse.eval.bench.compile_report [--architecture 90] [--demanding] [--json]

It covers every architecture of `kernels/gpu/architectures.py` and prints, for every launch, registers and spilled bytes
per thread, shared memory per program, the instruction counts of the main loop, and the matrix and copy instructions in
use.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from dit_sparse.kernels.gpu.architectures import AMD, ARCHITECTURES, Architecture

from .disassembly import main_loop_counts
from .kernel_launches import KernelLaunch, demanding_launches, kernel_launches

MODULE = "dit_sparse.eval.bench.compile_report"
MI300 = "gfx942"
LaunchesOf = Callable[[Architecture], Iterator[KernelLaunch]]
ATTENTION_KERNELS = ("block_sparse", "block_ragged")
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor")
HEADER = (
    "kernel              sm   block  head_dim  registers  spilled  shared memory | in the main loop: instructions  "
    "products  barriers | instructions in use"
)


def nvidia_rows(capability: int, launches: LaunchesOf = kernel_launches) -> Iterator[dict]:
    """Compile every kernel in bfloat16 for one compute capability, such as 90, and yield a row per launch.

    Triton caches the first architecture that it compiles for, so a process can report one only.
    """
    import triton

    _set_triton_target("cuda", capability, warp_size=32)
    triton.knobs.compilation.always_compile = True  # cached kernels print no ptxas log
    triton.knobs.nvidia.dump_ptxas_log = True
    for launch in launches(ARCHITECTURES[capability]):
        with redirect_stdout(StringIO()) as output:
            compiled = launch.program.warmup(grid=(1,), **launch.arguments)
        log = output.getvalue()
        yield _row(launch, capability) | {
            "triton": triton.__version__,
            "warps": launch.arguments["num_warps"],
            "registers": int(re.search(r"Used (\d+) registers", log)[1]),
            "spilled": int(re.search(r"(\d+) bytes spill stores", log)[1]),
            "serialized": "serialized" in log,
            "loop": main_loop_counts(compiled.asm["cubin"]) if launch.kernel in ATTENTION_KERNELS else {},
            "instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
            "buffers": _buffers(compiled.asm["ttgir"]),
            "shared_memory": compiled.metadata.shared,
        }


def amd_rows(launches: LaunchesOf = kernel_launches) -> Iterator[dict]:
    """Compile every kernel for AMD's MI300 and yield a row per launch, without counts of the main loop."""
    _set_triton_target("hip", MI300, warp_size=64)
    for launch in launches(AMD):
        compiled = launch.program.warmup(grid=(1,), **launch.arguments)
        assembly = compiled.asm["amdgcn"]
        count = lambda kind, text=assembly: int(re.search(rf"\.vgpr_{kind}count:\s+(\d+)", text)[1])
        yield _row(launch, MI300) | {
            "registers": count(""),
            "spilled": 4 * count("spill_"),
            "loop": {},
            "instructions": ["v_mfma"] if "v_mfma" in assembly else [],
            "shared_memory": compiled.metadata.shared,
        }


def _row(launch: KernelLaunch, architecture: int | str) -> dict:
    return {
        "kernel": launch.kernel,
        "architecture": architecture,
        "block": launch.block,
        "head_dim": launch.head_dim,
        "features": launch.features,
    }


def _set_triton_target(backend: str, architecture: int | str, warp_size: int) -> None:
    """Make Triton compile for a GPU that is not present. Kernels cannot be run afterwards."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class CompileOnlyDriver:
        def get_current_target(self):
            return GPUTarget(backend, architecture, warp_size)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(CompileOnlyDriver())


def _buffers(ttgir: str) -> int:
    """Return how many steps of the first loop have a buffer for their keys in shared memory."""
    match = re.search(r"memdesc<(\d+)x\d+x\d+x\w+, #shared\d*, #smem, mutable>", ttgir[: ttgir.find("scf.for")])
    return int(match[1]) if match else 1


def rows_in_subprocess(architecture: int | str, triton: Path | None = None, *, demanding: bool = False) -> list[dict]:
    """Return `nvidia_rows` or `amd_rows` from a new process, with an empty cache and Triton's interpreter off.

    Args:
        architecture: a compute capability, or ``MI300``.
        triton: folder with another Triton; None: the installed one.
        demanding: compile only the launches that need the most registers or shared memory.

    Raises:
        RuntimeError: the compilation fails.
    """
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    command = [sys.executable, "-m", MODULE, "--json", "--architecture", str(architecture)]
    command += ["--demanding"] if demanding else []
    with tempfile.TemporaryDirectory() as cache:
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise RuntimeError(f"compiling for {architecture} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*map(str, ARCHITECTURES), MI300]
    parser.add_argument("--architecture", choices=known, help="only this one; by default all")
    parser.add_argument("--demanding", action="store_true", help="only launches that need most registers or memory")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    launches = demanding_launches if options.demanding else kernel_launches
    if options.architecture == MI300:
        rows = list(amd_rows(launches))
    elif options.architecture:
        rows = list(nvidia_rows(int(options.architecture), launches))
    else:
        rows = [row for one in known for row in rows_in_subprocess(one, demanding=options.demanding)]
    print(json.dumps(rows, indent=1) if options.json else "\n".join([HEADER, *map(_line, rows)]))


def _line(row: dict) -> str:
    loop = row["loop"] or dict.fromkeys(("instructions", "products", "barriers"), "-")
    return (
        f"{row['kernel']:16} {row['architecture']:>6} {row['block']:6} {row['head_dim']:9} {row['registers']:10} "
        f"{row['spilled']:8} {row['shared_memory']:14} | {loop['instructions']:31} {loop['products']:9} "
        f"{loop['barriers']:9} | {', '.join(row['instructions'])}  {row['features']}"
    )


if __name__ == "__main__":
    main()
