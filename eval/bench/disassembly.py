"""What a compiled Triton kernel does at every step of its main loop, read from NVIDIA's disassembler, without a GPU."""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

LABEL = re.compile(r"\s*(\.L_x_\d+):")
INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?(.*?);")
BRANCH = re.compile(r"BRA\b.*`\((\.L_x_\d+)\)")


def main_loop(cubin: bytes) -> dict[str, int]:
    """Counts of the first loop that multiplies matrices, once through it: all instructions, matrix products, barriers
    of the whole program, and accesses to registers that were spilled. Empty where nothing is multiplied."""
    return main_loop_of(_disassembled(cubin))


def main_loop_of(text: str) -> dict[str, int]:
    """`main_loop` of what the disassembler has written."""
    code, loops = _read(text)
    multiplying = [span for span in loops if _count(code[span], "MMA")]
    innermost = [span for span in multiplying if not any(_inside(other, span) for other in multiplying)]
    if not innermost:
        return {}
    step = code[min(innermost, key=lambda span: span.start)]
    return {
        "instructions": len(step),
        "products": _count(step, "MMA"),
        "barriers": _count(step, r"^BAR\b"),
        "spilled": _count(step, r"^(LDL|STL)\b"),
    }


def _disassembled(cubin: bytes) -> str:
    import triton

    program = Path(triton.__file__).parent / "backends/nvidia/bin/nvdisasm"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([program, "-c", file.name], check=True, capture_output=True, text=True).stdout


def _read(text: str) -> tuple[list[str], list[slice]]:
    """The instructions, and the loops among them: what lies between a label and a branch back to it."""
    code, labels, loops = [], {}, []
    for line in text.splitlines():
        if label := LABEL.match(line):
            labels[label[1]] = len(code)
        elif found := INSTRUCTION.search(line):
            code.append(found[1])
            branch = BRANCH.match(found[1])
            if branch and branch[1] in labels:
                loops.append(slice(labels[branch[1]], len(code)))
    return code, loops


def _inside(inner: slice, outer: slice) -> bool:
    return inner != outer and outer.start <= inner.start and inner.stop <= outer.stop


def _count(code: Sequence[str], pattern: str) -> int:
    return sum(bool(re.search(pattern, instruction.split()[0])) for instruction in code)
