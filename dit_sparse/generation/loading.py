"""How a pipeline is loaded: data type, offload to the CPU, and tiled decoding."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from ..notation.settings import alternatives_to

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
OFFLOADS = {"model": "enable_model_cpu_offload", "sequential": "enable_sequential_cpu_offload"}


@dataclass(frozen=True)
class LoadOptions:
    """Options of `load_pipeline`, checked before any long work.

    Attributes:
        dtype: ``"float32"``, ``"bfloat16"`` or ``"float16"`` of the weights. Default: bfloat16 on a GPU, float32 on a
            CPU and for the bundled model.
        offload: ``"model"`` keeps one component at a time on the GPU, ``"sequential"`` one layer, which is much slower
            and needs the least memory. Default: the whole pipeline stays on the GPU.
        vae_tiling: decode the video in tiles, which needs less memory.

    Raises:
        ValueError: a value is unknown, or there is no GPU to offload from.
    """

    dtype: str | None = None
    offload: str | None = None
    vae_tiling: bool = False

    def __post_init__(self) -> None:
        for name, known in (("dtype", DTYPES), ("offload", OFFLOADS)):
            value = getattr(self, name)
            if value is not None and value not in known:
                raise ValueError(f"there is no {name} {value[:60]!r}; {alternatives_to(value, known)}")
        if self.offload and not torch.cuda.is_available():
            raise ValueError(f"offload={self.offload} moves components between a GPU and the CPU: there is no GPU")

    def torch_dtype(self, default: torch.dtype) -> torch.dtype:
        return DTYPES.get(self.dtype, default)

    def place(self, pipe: Any, device: str) -> Any:
        """Move a loaded pipeline to its device, and return it. Raises ValueError if its autoencoder has no tiles."""
        if self.vae_tiling:
            if not hasattr(getattr(pipe, "vae", None), "enable_tiling"):
                raise ValueError(f"the autoencoder of {type(pipe).__name__} cannot decode in tiles")
            pipe.vae.enable_tiling()
        if self.offload is None:
            return pipe.to(device)
        getattr(pipe, OFFLOADS[self.offload])()
        return pipe
