"""Launch settings of the Triton kernels for each GPU architecture: reviewed, fixed, no autotuning at the first call.

`python -m dit_sparse.eval.bench.compile_report` compiles every row without a GPU and lists registers, spills and shared
memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiling:
    """How one program of `block_sparse` works.

    Attributes:
        keys: keys of one step of the loop; divides the block.
        warps: warps of a program.
        stages: depth of the software pipeline. Pointers get ``stages - 1`` buffers for keys and as many for values,
            so that they need 3 to fetch while they compute; descriptors get ``stages``.
        tma: fetch through tensor descriptors (Hopper and newer) instead of pointers.
    """

    keys: int
    warps: int
    stages: int
    tma: bool = False

    def columns(self, rows: int, dim: int) -> tuple[int, ...]:
        """The tiles of ``dim`` columns where a program has so many queries: what pointers fetch is not wider than that,
        for the reason given in `tiles_triton`, and not wider than 64, which saves registers."""
        return widths(dim, dim if self.tma or self.warps == 1 else min(rows, 64))


def widths(dim: int, widest: int) -> tuple[int, ...]:
    """Columns of the tiles that ``dim`` columns are cut into: powers of two, which is all that Triton's tiles can have,
    none wider than ``widest``."""
    width = 1 << min(widest, dim).bit_length() - 1
    return (width,) * (dim // width) + (widths(dim % width, width) if dim % width else ())


@dataclass(frozen=True)
class Architecture:
    """One GPU generation.

    Attributes:
        shared_memory: bytes that a program may use.
        cache: bytes of second-level cache of its usual card.
        tilings: by (block, head_dim rounded up to 64, 128 or 256); smaller blocks use the row of 64.
    """

    shared_memory: int
    cache: int
    tilings: dict[tuple[int, int], Tiling]

    def tiling(self, block: int, dim: int) -> Tiling:
        found = self.tilings[max(block, 64), next(size for size in (64, 128, 256) if dim <= size)]
        return found if block >= 64 else Tiling(16 if dim > 128 else min(block, found.keys), block // 16, found.stages)


AMPERE = Architecture(
    shared_memory=166_912,
    cache=40 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 3),
        (64, 128): Tiling(64, 4, 3),
        (64, 256): Tiling(32, 4, 3),
        (128, 64): Tiling(64, 8, 3),
        (128, 128): Tiling(64, 8, 3),
        (128, 256): Tiling(32, 8, 3),
    },
)
ADA = Architecture(
    shared_memory=101_376,
    cache=72 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 3),
        (64, 128): Tiling(64, 4, 3),
        (64, 256): Tiling(16, 4, 3),
        (128, 64): Tiling(64, 8, 3),
        (128, 128): Tiling(64, 8, 3),
        (128, 256): Tiling(16, 8, 3),
    },
)
GEFORCE_AMPERE = replace(ADA, cache=6 << 20)
HOPPER = Architecture(
    shared_memory=232_448,
    cache=50 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 3, tma=True),
        (64, 128): Tiling(64, 4, 3, tma=True),
        (64, 256): Tiling(64, 8, 2, tma=True),
        (128, 64): Tiling(128, 8, 3, tma=True),
        (128, 128): Tiling(128, 8, 3, tma=True),
        (128, 256): Tiling(64, 8, 2, tma=True),
    },
)
BLACKWELL = replace(HOPPER, cache=126 << 20)
GEFORCE_BLACKWELL = replace(ADA, cache=96 << 20)

# AMD, compiled for MI300 (gfx942), whose matrix units Triton finds by itself; the cache is one of its dies'.
AMD = Architecture(
    shared_memory=65_536,
    cache=4 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 2),
        (64, 128): Tiling(64, 4, 2),
        (64, 256): Tiling(32, 4, 2),
        (128, 64): Tiling(64, 4, 2),
        (128, 128): Tiling(64, 4, 2),
        (128, 256): Tiling(16, 8, 2),
    },
)

# Triton in Python, for tests: small tiles, and blocks of 128 go the way of the descriptors.
INTERPRETER = Architecture(
    shared_memory=0,
    cache=0,
    tilings={(block, dim): Tiling(64, 4, 1, tma=block == 128) for block in (64, 128) for dim in (64, 128, 256)},
)

ARCHITECTURES = {
    80: AMPERE,
    86: GEFORCE_AMPERE,
    89: ADA,
    90: HOPPER,
    100: BLACKWELL,
    120: GEFORCE_BLACKWELL,
}


def architecture(capability: int) -> Architecture | None:
    """The newest listed architecture that is not newer than a compute capability such as 89, or None."""
    known = [number for number in ARCHITECTURES if number <= capability]
    return ARCHITECTURES[max(known)] if known else None
