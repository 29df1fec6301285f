"""Shapes3DPipeline: from a prompt to a coloured solid."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor

from .meshes.mesh import Mesh, extract_mesh
from .model import PromptEncoder, SLatFlowModel, load_weights, save_weights
from .prompts import Scene, parse
from .solids import Cells, Solid, make_solid, surface_cells
from .sparse_tensor import SparseTensor
from .surface import CHANNELS, Surface

SHIFT = 3.0  # of the timesteps towards high noise
Callback = Callable[[int, int], None]  # number of finished steps, number of steps


@dataclass(frozen=True)
class Shape:
    """A generated solid.

    Attributes:
        prompt: its prompt.
        solid: the coarse solid.
        cells: its surface cells.
        surface: the generated values of the cells.
    """

    prompt: str
    solid: Solid
    cells: Cells
    surface: Surface

    @cached_property
    def mesh(self) -> Mesh:
        """The surface as coloured triangles. Bodies and holes of less than 2 % of the solid are removed."""
        return extract_mesh(self.solid, self.cells, self.surface)


class Shapes3DPipeline:
    """A coarse solid is made from the prompt by a program; the model generates its fine surface and colours.

    Args:
        model: the denoiser.
        encoder: the encoder of the prompts.
    """

    def __init__(self, model: SLatFlowModel, encoder: PromptEncoder) -> None:
        self.model, self.encoder = model, encoder
        self.scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Shapes3DPipeline:
        """Load a model from a folder.

        Raises:
            ValueError: the folder holds no model of this kind.
        """
        return cls(*load_weights(Path(folder)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model to a folder, with weights in float16."""
        save_weights(Path(folder), self.model, self.encoder)

    def to(self, device: str | torch.device) -> Shapes3DPipeline:
        """Move the model to a device."""
        self.model.to(device)
        self.encoder.to(device)
        return self

    def __call__(
        self,
        prompt: str,
        resolution: int = 48,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        generator: torch.Generator | None = None,
        callback: Callback | None = None,
    ) -> Shape:
        """Generate a solid.

        Args:
            prompt: such as "a striped red torus on a blue box".
            resolution: cells along each side of the grid, an even number; the mesh is twice as fine. A solid has about
                4.5 cells per squared resolution.
            num_inference_steps: number of denoising steps.
            guidance_scale: scale of classifier-free guidance; 1 is off and takes half the time.
            generator: random numbers of the proportions and of the noise, on the CPU.
            callback: called after every step with the numbers of finished and of all steps.

        Raises:
            ValueError: the prompt is not understood, or a number is out of range.
        """
        scene = parse(prompt)
        _check_steps(num_inference_steps, guidance_scale)
        seed = int(torch.randint(2**31, (), generator=generator))
        solid = make_solid(scene, seed)
        cells = surface_cells(solid, resolution)
        noise = torch.randn(len(cells.coordinates), CHANNELS, generator=generator)
        channels = self.denoise(scene, cells, noise, num_inference_steps, guidance_scale, callback)
        return Shape(prompt, solid, cells, Surface.from_channels(channels, cells))

    @torch.no_grad()
    def denoise(
        self,
        scene: Scene,
        cells: Cells,
        noise: Tensor,
        num_inference_steps: int = 12,
        guidance_scale: float = 1.0,
        callback: Callback | None = None,
    ) -> Tensor:
        """Return the channels of surface cells, ``[V, 32]``, from noise of that shape. Arguments as of a call."""
        device = self.encoder.slots.device
        x = SparseTensor.pack([noise], [cells.coordinates])
        x = SparseTensor(x.feats.to(device), x.coords.to(device))
        coarse, cond = x.replace(cells.condition().to(device)), self.encoder([scene])
        self.scheduler.set_timesteps(num_inference_steps, device=device)
        for step, t in enumerate(self.scheduler.timesteps):
            velocity = self.model(x, t[None], cond, coarse).feats
            if guidance_scale != 1:
                empty = self.model(x, t[None], self.encoder([None]), coarse).feats
                velocity = torch.lerp(empty, velocity, guidance_scale)
            x = x.replace(self.scheduler.step(velocity, t, x.feats, return_dict=False)[0])
            if callback is not None:
                callback(step + 1, num_inference_steps)
        return x.feats.cpu()


def _check_steps(steps: int, guidance_scale: float) -> None:
    if isinstance(steps, bool) or not isinstance(steps, int) or not 1 <= steps <= 1000:
        raise ValueError(f"num_inference_steps must be a whole number from 1 to 1000, got {steps}")
    if not 0 <= guidance_scale <= 30:
        raise ValueError(f"guidance_scale must be in [0, 30], got {guidance_scale}")
