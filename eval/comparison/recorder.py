"""Measurements taken while a clip is generated: retained attention mass, and latents or their error."""

from __future__ import annotations

from contextlib import nullcontext

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dit_sparse import ClusterPlan, Plan, Site
from dit_sparse.engine.report import Stopwatch
from dit_sparse.eval.analysis.retained_mass import retained_mass
from dit_sparse.eval.quality.fidelity import relative_error

LATENT_STEPS = 9  # steps after which latents are recorded
MASS_INTERVAL = 8  # the retained mass is measured at every eighth call of a layer
MASS_ROWS = 64  # query rows of a measurement


class ClipRecorder:
    """Records one clip while it is generated.

    Args:
        reference: latents that another recorder stored, float16 ``[steps, ...]``; None: store the latents.

    Attributes:
        stopwatch: time of the measurements before the last step ended, which is no part of generating a clip.
        steps: number of denoising steps.
        latents: the recorded latents, float16; empty with a reference.
        latent_errors: ``[step, relative error]`` against the reference, both rounded to float16.
    """

    def __init__(self, reference: NDArray | None) -> None:
        self.reference, self.stopwatch, self.steps = reference, Stopwatch(), 0
        self.latents: list[NDArray] = []
        self.latent_errors: list[list] = []
        self._calls: dict[int, int] = {}
        self._mass: dict[int, list[Tensor]] = {}

    def observe_attention(self, site: Site, q: Tensor, k: Tensor, plan: Plan | ClusterPlan) -> None:
        """Measure the retained mass of a sparse call; an observer for ``Run.observe``."""
        calls = self._calls.get(site.layer, 0)
        self._calls[site.layer] = calls + 1
        if calls % MASS_INTERVAL == 0:
            with self.stopwatch.timing(q.device):
                mass = retained_mass(q, k, plan, rows=MASS_ROWS).mean(0).cpu()
            self._mass.setdefault(site.layer, []).append(mass)

    def observe_latents(self, step: int, steps: int, latents: Tensor) -> None:
        """Record or compare the latents after a step; a ``watch`` callback of ``generate``."""
        self.steps = steps
        recorded = sorted({round(x) for x in np.linspace(0, steps - 1, min(LATENT_STEPS, steps))})
        if step not in recorded:
            return
        # The time of a clip ends with its last step, before this callback.
        with self.stopwatch.timing(latents.device) if step < steps - 1 else nullcontext():
            rounded = latents.detach().half().cpu().numpy()
            if self.reference is None:
                self.latents.append(rounded)
            else:
                error = relative_error(rounded, self.reference[recorded.index(step)])
                self.latent_errors.append([step, error])

    def mean_mass(self) -> list[list[float]]:
        """Return the mean retained mass by layer and head; empty if no call was sparse."""
        return [torch.stack(self._mass[layer]).mean(0).tolist() for layer in sorted(self._mass)]
