"""Instruction counts of a compiled Triton kernel's main loop, from NVIDIA's disassembler. Needs no GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")


def main_loop_counts(cubin: bytes) -> dict[str, int]:
    """Return the instruction counts of the main loop of a CUDA binary; see `count_main_loop`."""
    return count_main_loop(_disassemble(cubin))


def count_main_loop(sass: str) -> dict[str, int]:
    """Count instructions in one iteration of the main loop: the first innermost loop with matrix products.

    Args:
        sass: output of ``nvdisasm``.

    Returns:
        ``instructions``, ``products`` (matrix products), ``barriers`` (of the whole thread block) and ``spilled``
        (accesses to spilled registers). Empty if no loop has matrix products.
    """
    code, loops = _parse(sass)
    product_loops = [span for span in loops if _count(code[span], "MMA")]
    innermost = [span for span in product_loops if not any(_is_inside(other, span) for other in product_loops)]
    if not innermost:
        return {}
    body = code[min(innermost, key=lambda span: span.start)]
    return {
        "instructions": len(body),
        "products": _count(body, "MMA"),
        "barriers": _count(body, r"^BAR\b"),
        "spilled": _count(body, r"^(LDL|STL)\b"),
    }


def _disassemble(cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout


def _parse(sass: str) -> tuple[list[str], list[slice]]:
    """Return the instructions, and the loops: the spans between a label and a branch back to it."""
    code, labels, loops = [], {}, []
    for line in sass.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.search(line):
            code.append(instruction[1])
            branch = BRANCH.match(instruction[1])
            if branch and branch[1] in labels:
                loops.append(slice(labels[branch[1]], len(code)))
    return code, loops


def _is_inside(inner: slice, outer: slice) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _count(code: Sequence[str], pattern: str) -> int:
    """Count the instructions whose opcode matches a pattern."""
    return sum(bool(re.search(pattern, instruction.split()[0])) for instruction in code)
