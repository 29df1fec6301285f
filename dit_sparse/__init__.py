"""dit-sparse: sparse attention for diffusion transformers, a plug-in for Hugging Face diffusers."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

# A wheel carries kernels, pipelines, profiles and eval inside this package; a checkout has them next to it.
_here = Path(__file__).parent
if not (_here / "kernels").is_dir():
    __path__.append(str(_here.parent))

from .attention import attention  # noqa: E402
from .budget import Above, Mass, Top  # noqa: E402
from .clusters import ClusterPlan, Clusters  # noqa: E402
from .composition import Cached, PerHead  # noqa: E402
from .engine.enable import SparseAttnProcessor, enable, prepare  # noqa: E402
from .engine.parallelism import enable_parallelism  # noqa: E402
from .engine.run import Run  # noqa: E402
from .grid import Grid, Site  # noqa: E402
from .method import Method, Scorer  # noqa: E402
from .methods import DEFAULT_METHOD, METHODS  # noqa: E402
from .pattern import Pattern  # noqa: E402
from .pipelines.family import Family  # noqa: E402
from .pipelines.module_adapter import ModuleAdapter  # noqa: E402
from .pipelines.proposal import propose_family  # noqa: E402
from .plan import Plan  # noqa: E402
from .schedule import Schedule  # noqa: E402
from .voxels.grid import VoxelGrid  # noqa: E402

if TYPE_CHECKING:
    from .profiling.head_profile import Profile

__version__ = "0.1.0"
__all__ = [
    "DEFAULT_METHOD", "METHODS", "Above", "Cached", "ClusterPlan", "Clusters", "Family", "Grid", "Mass", "Method",
    "ModuleAdapter", "Pattern", "PerHead", "Plan", "Profile", "Run", "Schedule", "Scorer", "Site",
    "SparseAttnProcessor", "Top", "VoxelGrid", "attention", "enable", "enable_parallelism", "prepare",
    "propose_family",
]  # fmt: skip


def __getattr__(name: str) -> object:
    if name == "Profile":  # pydantic takes longer to import than the rest of the package
        from .profiling.head_profile import Profile

        return Profile
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
