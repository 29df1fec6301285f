"""Launch settings of the Triton kernels for each GPU architecture. They are fixed; nothing is tuned at the first call.

``python -m dit_sparse.eval.bench.compile_report`` compiles every setting without a GPU and lists registers, spills and
shared memory.
"""

from __future__ import annotations

from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Tiling:
    """Launch settings of one attention program.

    Attributes:
        keys: keys of one step of the main loop; divides the block.
        warps: warps of a program.
        stages: stages of the software pipeline. Pointers get ``stages - 1`` buffers for keys and for values, so they
            need 3 stages to load during computation; tensor descriptors get ``stages`` buffers.
        tma: load through tensor descriptors (Hopper and newer) instead of pointers.
    """

    keys: int
    warps: int
    stages: int
    tma: bool = False

    def tile_widths(self, queries: int, dim: int) -> tuple[int, ...]:
        """Return the widths of the column tiles of ``dim`` for a program with this many queries.

        With pointers, a tile is at most as wide as the number of queries, for the reason given in `tiles`, and at most
        64 columns wide, which saves registers.
        """
        return split_head_dim(dim, dim if self.tma or self.warps == 1 else min(queries, 64))


def split_head_dim(dim: int, max_width: int) -> tuple[int, ...]:
    """Split ``dim`` columns into tiles of at most ``max_width``. Widths are powers of two, as Triton requires."""
    width = 1 << min(max_width, dim).bit_length() - 1
    return (width,) * (dim // width) + (split_head_dim(dim % width, width) if dim % width else ())


@dataclass(frozen=True)
class Architecture:
    """A GPU generation.

    Attributes:
        shared_memory: bytes of shared memory that one program may use.
        l2_cache: bytes of L2 cache of its typical card.
        tilings: settings by (block, head_dim rounded up to 64, 128 or 256); blocks below 64 use those of 64.
    """

    shared_memory: int
    l2_cache: int
    tilings: dict[tuple[int, int], Tiling]

    def tiling(self, block: int, dim: int) -> Tiling:
        """Return the settings for a block size and head_dim."""
        setting = self.tilings[max(block, 64), next(size for size in (64, 128, 256) if dim <= size)]
        if block >= 64:
            return setting
        return Tiling(16 if dim > 128 else min(block, setting.keys), block // 16, setting.stages)


AMPERE = Architecture(
    shared_memory=166_912,
    l2_cache=40 << 20,
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
    l2_cache=72 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 3),
        (64, 128): Tiling(64, 4, 3),
        (64, 256): Tiling(16, 4, 3),
        (128, 64): Tiling(64, 8, 3),
        (128, 128): Tiling(64, 8, 3),
        (128, 256): Tiling(16, 8, 3),
    },
)
GEFORCE_AMPERE = replace(ADA, l2_cache=6 << 20)
HOPPER = Architecture(
    shared_memory=232_448,
    l2_cache=50 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 3, tma=True),
        (64, 128): Tiling(64, 4, 3, tma=True),
        (64, 256): Tiling(64, 8, 2, tma=True),
        (128, 64): Tiling(128, 8, 3, tma=True),
        (128, 128): Tiling(128, 8, 3, tma=True),
        (128, 256): Tiling(64, 8, 2, tma=True),
    },
)
BLACKWELL = replace(HOPPER, l2_cache=126 << 20)
GEFORCE_BLACKWELL = replace(ADA, l2_cache=96 << 20)

# Compiled for MI300 (gfx942), where Triton selects the matrix instructions; the L2 cache is that of one die.
AMD = Architecture(
    shared_memory=65_536,
    l2_cache=4 << 20,
    tilings={
        (64, 64): Tiling(64, 4, 2),
        (64, 128): Tiling(64, 4, 2),
        (64, 256): Tiling(32, 4, 2),
        (128, 64): Tiling(64, 4, 2),
        (128, 128): Tiling(64, 4, 2),
        (128, 256): Tiling(16, 8, 2),
    },
)

# Triton's interpreter, for tests: small tiles, and tensor descriptors for blocks of 128.
INTERPRETER = Architecture(
    shared_memory=0,
    l2_cache=0,
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
    """Return the newest listed architecture up to a compute capability such as 89, or None."""
    known = [number for number in ARCHITECTURES if number <= capability]
    return ARCHITECTURES[max(known)] if known else None
