"""Stand-ins for the 3-D denoisers that have an adapter: their class names, forward arguments, module names and calls of
attention, with random weights and a few small layers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from plain_modules import DIM, AnchoredBlock, AnchoredDenoiser, Attention, PackedDenoiser, SparseTensor
from voxel_sets import packed, surface

sdpa = nn.functional.scaled_dot_product_attention


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class SLatFlowModel(PackedDenoiser):
    """TRELLIS.2, and with ``patch_size`` the first TRELLIS: the blocks get the cells of merged voxels."""

    def __init__(self, patch_size: int = 1) -> None:
        super().__init__()
        self.patch_size = patch_size

    def forward(self, x: SparseTensor, t: Tensor, cond: Tensor, concat_cond: SparseTensor | None = None, **kwargs):
        if concat_cond is not None:
            x = x.replace(x.feats + 0.5 * concat_cond.feats)
        if self.patch_size == 1:
            return super().forward(x, t / 1000, cond)
        steps = torch.tensor([1, *[self.patch_size] * 3])
        cells, index = x.coords.div(steps, rounding_mode="floor").unique(dim=0, return_inverse=True)
        sums = torch.zeros(len(cells), DIM).index_add(0, index, x.feats)
        out = super().forward(SparseTensor(sums / 2, cells), t / 1000, cond).feats
        return x.replace(x.feats + out[index])


class RefineDiT(AnchoredDenoiser):
    """UltraShape."""

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor], **kwargs) -> Tensor:
        return super().forward(x, t[:, None, None], contexts["main"], voxel_cond=kwargs.get("voxel_cond"))


class GroupProcessor:
    """Attention between the tokens of ``groups`` consecutive batch items, such as the frames or parts of an object."""

    def __call__(self, module: Attention, x: Tensor, groups: int = 1, context: Tensor | None = None) -> Tensor:
        x = x.unflatten(0, (-1, groups)).flatten(1, 2)
        out = F.scaled_dot_product_attention(*module.heads(x, context))
        return module.out(out.transpose(1, 2).flatten(2)).unflatten(1, (groups, -1)).flatten(0, 1)


class GroupAttention(Attention):
    def __init__(self) -> None:
        super().__init__()
        self.processor = GroupProcessor()

    def forward(self, x: Tensor, groups: int = 1, context: Tensor | None = None) -> Tensor:
        return self.processor(self, x, groups, context)


class FlowMatchingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.s_attn, self.x_attn = GroupAttention(), GroupAttention()

    def forward(self, x: Tensor, context: Tensor, frames: int) -> Tensor:
        x = x + self.s_attn(x, frames)
        return x + self.x_attn(x, 1, context)


class ActionMeshDenoiser(nn.Module):
    """Its sampler calls ``forward`` itself, which runs no hooks."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(FlowMatchingBlock() for _ in range(2))

    def forward(self, hidden_states, context, framestep, diffusion_time, mask=None, freqs_rot=None):
        frames, tokens = hidden_states.shape[1:3]
        time = diffusion_time.repeat(frames)[:, None, None].expand(-1, 1, DIM) / 1000
        x = torch.cat([time, hidden_states.flatten(0, 1)], 1)
        for block in self.blocks:
            x = block(x, context.flatten(0, 1), frames)
        return x[:, -tokens:].unflatten(0, (-1, frames)), freqs_rot


class PartBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn1, self.attn2 = GroupAttention(), GroupAttention()

    def forward(self, x: Tensor, context: Tensor, parts: int) -> Tensor:
        x = x + self.attn1(x, parts)
        return x + self.attn2(x, 1, context)


class VecsetDenoiser(nn.Module):
    is_global = False, False  # whether each layer attends between parts

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(PartBlock() for _ in self.is_global)

    def forward(self, hidden_states, timestep, encoder_hidden_states=None, attention_kwargs=None, return_dict=True):
        time = timestep[:, None, None].expand(len(hidden_states), 1, DIM) / 1000
        x, parts = torch.cat([time, hidden_states], 1), (attention_kwargs or {}).get("num_parts", 1)
        for block, is_global in zip(self.blocks, self.is_global, strict=True):
            x = block(x, encoder_hidden_states, parts if is_global else 1)
        return (x[:, 1:],)


class TripoSGDiTModel(VecsetDenoiser):
    pass


class PartCrafterDiTModel(VecsetDenoiser):
    is_global = False, True


def attention(q: Tensor, k: Tensor, v: Tensor, **kwargs) -> Tensor:
    return sdpa(q, k, v).transpose(1, 2).flatten(2)


class DoubleStreamBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img_attn, self.txt_attn = Attention(), Attention()

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        parts = zip(self.txt_attn.heads(txt, None), self.img_attn.heads(img, None), strict=True)
        out = attention(*(torch.cat(pair, 2) for pair in parts))
        return img + self.img_attn.out(out[:, txt.shape[1] :]), txt + self.txt_attn.out(out[:, : txt.shape[1]])


class SingleStreamBlock(Attention):
    def forward(self, x: Tensor) -> Tensor:
        return x + self.out(attention(*self.heads(x, None)))


class Hunyuan3DDiT(nn.Module):
    """Hunyuan3D 2.0."""

    def __init__(self) -> None:
        super().__init__()
        self.double_blocks, self.single_blocks = nn.ModuleList([DoubleStreamBlock()]), nn.ModuleList()
        self.single_blocks.append(SingleStreamBlock())

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor], **kwargs) -> Tensor:
        x, condition = x + t[:, None, None], contexts["main"]
        for block in self.double_blocks:
            x, condition = block(img=x, txt=condition)
        x = torch.cat([condition, x], 1)
        for block in self.single_blocks:
            x = block(x)
        return x[:, condition.shape[1] :]


class HunYuanDiTPlain(nn.Module):
    """Hunyuan3D 2.1."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(AnchoredBlock(Attention) for _ in range(2))

    def forward(self, x: Tensor, t: Tensor, contexts: dict[str, Tensor], **kwargs) -> Tensor:
        x = torch.cat([t[:, None, None].expand(len(x), 1, DIM), x], 1)
        for block in self.blocks:
            x = block(x, contexts["main"])
        return x[:, 1:]


@dataclass(frozen=True)
class Case:
    """How a sampler calls a model.

    Attributes:
        build: returns the model.
        shape: of the latents.
        predict: ``predict(model, x, t, coordinates)`` returns the output for latents ``x``; t is in [0, 1].
        calls: intercepted self-attention calls of one forward call, one for each layer and item.
        coordinates: of the tokens, or None.
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, ...]
    predict: Callable[[nn.Module, Tensor, float, Tensor | None], Tensor]
    calls: int
    coordinates: Tensor | None = None


def _packed(model, x, t, coordinates):
    inputs = SparseTensor(x, coordinates)
    return model(inputs, torch.tensor([1000 * t]), random(2, 5, DIM, seed=1)).feats


def _plain(model, x, t, coordinates):
    contexts = {"main": random(len(x), 7, DIM, seed=1)}
    voxels = {} if coordinates is None else {"voxel_cond": coordinates}
    return model(x, torch.full((len(x),), t), contexts, **voxels)


def _frames(model, x, t, coordinates):
    context, time = random(*x.shape[:2], 5, DIM, seed=1), torch.full((len(x),), 1000 * t)
    return model.forward(x, context, framestep=torch.arange(x.shape[1]).expand(len(x), -1), diffusion_time=time)[0]


def _parts(model, x, t, coordinates):
    context, time = random(len(x), 5, DIM, seed=1), torch.full((len(x),), 1000 * t)
    is_parts = isinstance(model, PartCrafterDiTModel)
    options = {"attention_kwargs": {"num_parts": 4}} if is_parts else {}
    return model(x, time, encoder_hidden_states=context, **options, return_dict=False)[0]


VOXELS = torch.stack([surface(230, seed) for seed in range(2)])
CASES = {
    "trellis 2": Case(SLatFlowModel, (270, DIM), _packed, 4, packed(230, 40)),
    "trellis 1": Case(lambda: SLatFlowModel(patch_size=2), (840, DIM), _packed, 4, packed(700, 140)),
    "ultrashape": Case(RefineDiT, (2, 230, DIM), _plain, 4, VOXELS),
    "actionmesh": Case(ActionMeshDenoiser, (2, 5, 40, DIM), _frames, 2),
    "hunyuan3d 2.0": Case(Hunyuan3DDiT, (2, 210, DIM), _plain, 2),
    "hunyuan3d 2.1": Case(HunYuanDiTPlain, (2, 210, DIM), _plain, 2),
    "triposg": Case(TripoSGDiTModel, (2, 210, DIM), _parts, 2),
    "partcrafter": Case(PartCrafterDiTModel, (8, 50, DIM), _parts, 1),
}


@torch.no_grad()
def denoise(
    case: Case, model: nn.Module, *, order: Tensor | None = None, steps: int = 4, first: float = 1.0, seed: int = 0
) -> Tensor:
    """Return the latents after Euler steps from the time ``first`` to 0; the tokens may get another order."""
    x, coordinates = random(*case.shape, seed=seed), case.coordinates
    if order is not None:
        x, coordinates = x.index_select(-2, order), coordinates.index_select(-2, order)
    for step in range(steps):
        x = x - first / steps * case.predict(model, x, first * (1 - step / steps), coordinates)
    return x if order is None else x.index_select(-2, order.argsort())
