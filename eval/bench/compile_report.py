"""Compile the Triton kernels for a GPU architecture, without such a GPU, and report the resources they use.

    python -m dit_sparse.eval.bench.compile_report [--json]

Prints what the compiler made of every row of `kernels/architectures.py`: registers and spilled bytes of a thread,
shared memory of a program, the instructions that do the work, and what a step of the main loop consists of.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stdout
from dataclasses import replace
from io import StringIO
from itertools import product
from pathlib import Path

import torch

from dit_sparse import ClusterPlan, Clusters, Plan
from dit_sparse.kernels import permute
from dit_sparse.kernels.executors import block_ragged, block_sparse
from dit_sparse.kernels.gpu.architectures import AMD, ARCHITECTURES, Architecture
from dit_sparse.kernels.planning import block_mass, cluster, selection

from .disassembly import main_loop

DIMS = (64, 80, 96, 128, 256)
BLOCKS = (64, 128)
MI300 = "gfx942"
ATTENTION = ("block_sparse", "block_ragged")
WORST = (128, 128, "order, lengths")  # the most that a program has to remember
TOKENS = 1000  # the last block is ragged
INSTRUCTIONS = ("mma.sync", "wgmma.mma_async", "tcgen05.mma", "cp.async.bulk.tensor")


def rows(capability: int) -> Iterator[dict]:
    """What became of every kernel in bfloat16 for one architecture, a row for every launch that differs.

    Triton remembers the first architecture that it compiles for: ask for one in each process.
    """
    import triton

    pretend_gpu("cuda", capability, 32)
    triton.knobs.compilation.always_compile = True  # what lies in Triton's cache would bring no report
    triton.knobs.nvidia.dump_ptxas_log = True
    for name, block, dim, features, program, arguments in launches(ARCHITECTURES[capability]):
        with redirect_stdout(StringIO()) as said:
            compiled = program.warmup(grid=(1,), **arguments)
        yield {
            "kernel": name,
            "triton": triton.__version__,
            "architecture": capability,
            "block": block,
            "head_dim": dim,
            "features": features,
            "warps": arguments["num_warps"],
            "registers": int(re.search(r"Used (\d+) registers", said.getvalue())[1]),
            "spilled": int(re.search(r"(\d+) bytes spill stores", said.getvalue())[1]),
            "serialized": "serialized" in said.getvalue(),
            "loop": main_loop(compiled.asm["cubin"]) if name in ATTENTION else {},
            "instructions": [name for name in INSTRUCTIONS if name in compiled.asm["ptx"]],
            "buffers": buffers(compiled.asm["ttgir"]),
            "shared_memory": compiled.metadata.shared,
        }


def amd_rows() -> Iterator[dict]:
    """The same for AMD's MI300, as far as its assembly tells."""
    pretend_gpu("hip", MI300, 64)
    for name, block, dim, features, program, arguments in launches(AMD):
        compiled = program.warmup(grid=(1,), **arguments)
        code = compiled.asm["amdgcn"]
        count = lambda what, code=code: int(re.search(rf"\.vgpr_{what}count:\s+(\d+)", code)[1])
        yield {
            "kernel": name,
            "architecture": MI300,
            "block": block,
            "head_dim": dim,
            "features": features,
            "registers": count(""),
            "spilled": 4 * count("spill_"),
            "loop": {},
            "instructions": ["v_mfma"] if "v_mfma" in code else [],
            "shared_memory": compiled.metadata.shared,
        }


def launches(machine: Architecture) -> Iterator[tuple]:
    """Kernel, block, head_dim, what else is special, the program and its arguments."""
    yield from _attention_launches(machine)
    yield from _mass_launches(machine)
    yield from _companion_launches()


def _attention_launches(machine: Architecture) -> Iterator[tuple]:
    from dit_sparse.kernels.gpu.block_ragged import forward as ragged
    from dit_sparse.kernels.gpu.block_sparse import forward

    for block, dim, features in (*product(BLOCKS, DIMS, ("",)), (16, 128, ""), (32, 128, ""), WORST):
        q, plan = torch.empty(1, 2, TOKENS, dim, dtype=torch.bfloat16), Plan.dense(TOKENS, block)
        if features:
            plan = replace(plan, order=torch.arange(TOKENS), lengths=torch.tensor([TOKENS], dtype=torch.int32))
        arguments, *_ = block_sparse.launch(q, q, q, plan, None, machine)
        yield "block_sparse", block, dim, features, forward, arguments

    for count, dim in (*product((3,), DIMS[:-1]), *product((15,), DIMS)):  # large clusters and small ones
        q = torch.empty(1, 2, TOKENS, dim, dtype=torch.bfloat16)
        clusters = Clusters.from_labels(torch.arange(TOKENS).mul(count).div(TOKENS).long()[None, None], count)
        plan = ClusterPlan.from_mask(torch.ones(1, 1, count, count, dtype=torch.bool), clusters, clusters)
        arguments, *_ = block_ragged.launch(q, q, q, plan, None, machine)
        yield "block_ragged", arguments["ROWS"], dim, "", ragged, arguments


def _mass_launches(machine: Architecture) -> Iterator[tuple]:
    from dit_sparse.kernels.gpu.block_mass import mass

    every = [(block, dim, None, False) for block, dim in (*product(BLOCKS, (64, 128)), (128, 80), (128, 256))]
    for block, dim, queries, kept in (*every, (128, 128, 16, False), (128, 128, None, True)):
        q, plan = torch.empty(1, 2, TOKENS, dim, dtype=torch.bfloat16), Plan.dense(TOKENS, block)
        layout = (queries or block, None, None, None, plan if kept else None)
        arguments, _ = block_mass.launch(q, q, torch.empty(1, 2, TOKENS), block, *layout, machine)
        features = f"{queries} queries a block" if queries else "kept blocks" if kept else ""
        yield "block_mass", block, dim, features, mass, arguments


def _companion_launches() -> Iterator[tuple]:
    """What is the same for every architecture."""
    from dit_sparse.kernels.gpu.cluster import assign, means
    from dit_sparse.kernels.gpu.permute import permute as move
    from dit_sparse.kernels.gpu.selection import select

    for dim in (80, 128):
        x, old = torch.empty(1, 2, TOKENS, dim, dtype=torch.bfloat16), torch.empty(1, 2, 100, dim)
        arguments, labels = cluster.launch_assign(x, old.to(x.dtype), old[..., 0].contiguous())
        yield "assign", cluster.ROWS, dim, "", assign, arguments
        arguments, _ = cluster.launch_means(x, Clusters.from_labels(torch.zeros_like(labels), 100), old)
        yield "means", 0, dim, "no products", means, arguments

    arguments = permute.launch(torch.arange(TOKENS), (x, x))  # one program for all of the same power of two
    yield "permute", arguments["ROWS"], dim, "no products", move, arguments
    for columns, weighted, to_nearest in ((1800, False, False), (1800, True, False), (selection.WIDEST, True, True)):
        scores = torch.empty(1, 2, 3, columns)
        arguments = selection.launch(scores, 0.9, scores if weighted else None, to_nearest)
        yield "select", columns, 0, "no products", select, arguments


def pretend_gpu(backend: str, architecture: int | str, warp: int) -> None:
    """Let Triton compile, though never run, for such a GPU, whose warps have so many threads."""
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Pretended:
        def get_current_target(self):
            return GPUTarget(backend, architecture, warp)

        def get_current_device(self):
            return 0

        def get_current_stream(self, device=None):
            return 0

    driver.set_active(Pretended())


def buffers(ttgir: str) -> int:
    """How many steps of the first loop, the one that does the work, have room for their keys in shared memory."""
    found = re.search(r"memdesc<(\d+)x\d+x\d+x\w+, #shared\d*, #smem, mutable>", ttgir[: ttgir.find("scf.for")])
    return int(found[1]) if found else 1


def rows_apart(capability: int | str, triton: Path | None = None) -> list[dict]:
    """`rows`, or `amd_rows`, in a process of its own, with an empty cache and with Triton's interpreter off; by another
    Triton where a folder with one is given."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    if triton is not None:
        environment["PYTHONPATH"] = str(triton)
    with tempfile.TemporaryDirectory() as cache:
        command = [sys.executable, "-m", "dit_sparse.eval.bench.compile_report", "--json"]
        command += ["--architecture", str(capability)]
        environment["TRITON_CACHE_DIR"] = cache
        done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    if done.returncode:
        raise RuntimeError(f"compiling for {capability} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    known = [*map(str, ARCHITECTURES), MI300]
    parser.add_argument("--architecture", choices=known, help="only this one, in this process")
    parser.add_argument("--json", action="store_true", help="print JSON")
    options = parser.parse_args()
    if options.architecture == MI300:
        found = list(amd_rows())
    elif options.architecture:
        found = list(rows(int(options.architecture)))
    else:
        found = [row for architecture in known for row in rows_apart(architecture)]
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print(
        "kernel          sm   block  head_dim  registers  spilled  shared memory | in the main loop: instructions  "
        "products  barriers | instructions of note"
    )
    for row in found:
        loop = row["loop"] or dict.fromkeys(("instructions", "products", "barriers"), "-")
        print(
            f"{row['kernel']:12} {row['architecture']:>6} {row['block']:6} {row['head_dim']:9} {row['registers']:10} "
            f"{row['spilled']:8} {row['shared_memory']:14} | {loop['instructions']:31} {loop['products']:9} "
            f"{loop['barriers']:9} | {', '.join(row['instructions'])}  {row['features']}"
        )


if __name__ == "__main__":
    main()
