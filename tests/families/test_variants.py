"""Other forms of the forward calls of a class: several images, refiners, causal masks, packed latents."""

from __future__ import annotations

from dataclasses import dataclass, field

import diffusers
import pytest
import torch

import dit_sparse as ds
from tiny_models import Call, first_output, tiny_models

SETTINGS = dict(dense_steps=0, min_tokens=0, block=16, executor="reference")


@dataclass
class Variant:
    """A form of a call: changes of the configuration and of the arguments, and what the run reports."""

    transformer: str
    grids: list[str]
    config: dict = field(default_factory=dict)
    arguments: dict = field(default_factory=dict)
    grid: tuple[int, int, int] = (1, 12, 16)
    reason: str = ""  # of the dense calls


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def two_items() -> torch.Tensor:
    """Return latents of an image and its reference, ``[B, items, C, F, H, W]``."""
    return noise(1, 2, 4, 1, 24, 32)


def ids(frame: int, height: int, width: int, axes: int = 3) -> torch.Tensor:
    return Call((1, height, width)).ids(axes) + torch.tensor([float(frame)] + [0.0] * (axes - 1))


VARIANTS = {
    "refiner of HunyuanImage": Variant(
        "HunyuanImageTransformer2DModel",
        ["3x8x8 + 20 text"],
        dict(patch_size=(1, 1, 1), rope_axes_dim=(4, 6, 6)),
        dict(hidden_states=noise(1, 4, 3, 8, 8)),
    ),
    "JoyImage-Edit with a reference": Variant(
        "JoyImageEditTransformer3DModel", ["2x12x16 + 20 text"], arguments=dict(hidden_states=two_items())
    ),
    "Qwen-Image-Edit with a larger reference": Variant(
        "QwenImageTransformer2DModel",
        ["20 text + 1x12x16 + 240 text"],
        arguments=dict(img_shapes=[[(1, 12, 16), (1, 15, 16)]], hidden_states=noise(1, 192 + 240, 4)),
    ),
    "Qwen-Image-Layered": Variant(
        "QwenImageTransformer2DModel",
        ["20 text + 3x12x16"],
        arguments=dict(img_shapes=[[(1, 12, 16)] * 3], hidden_states=noise(1, 3 * 192, 4)),
    ),
    "Flux 2 with references": Variant(
        "Flux2Transformer2DModel",
        ["20 text + 3x12x16"],
        arguments=dict(
            hidden_states=noise(1, 3 * 192, 4),
            img_ids=torch.cat([ids(0, 12, 16, 4), ids(10, 12, 16, 4), ids(20, 12, 16, 4)])[None],
            txt_ids=torch.zeros(1, 20, 4),
        ),
    ),
    "Flux 3 with a reference": Variant(
        "Flux3Transformer2DModel",
        ["20 text + 1x12x16 + 60 text"],
        arguments=dict(image_cond_hidden_states=noise(1, 60, 4), image_cond_ids=ids(1, 6, 10, 4)),
        reason="192 queries and 192 keys do not fit the grid 1x12x16 with 60 reference tokens",
    ),
    "SkyReels V2, one timestep per frame": Variant(
        "SkyReelsV2Transformer3DModel",
        ["4x8x8"],
        arguments=dict(timestep=torch.tensor([[900, 700, 500, 300]]), enable_diffusion_forcing=True),
        grid=(4, 8, 8),
    ),
    "SkyReels V2, causal": Variant(
        "SkyReelsV2Transformer3DModel",
        ["2x8x8", "4x8x8"],
        dict(num_frame_per_block=2),
        grid=(4, 8, 8),
    ),
    "CogVideoX 1.5": Variant(
        "CogVideoXTransformer3DModel",
        ["20 text + 2x8x8"],
        dict(patch_size_t=2, patch_bias=False),
        grid=(4, 8, 8),
    ),
    "Motif-Video with an image": Variant(
        "MotifVideoTransformer3DModel",
        ["3x8x8 + 23 text"],
        dict(image_embed_dim=8),
        dict(image_embeds=noise(1, 3, 8)),
        grid=(3, 8, 8),
    ),
    "LTX-Video with coordinates": Variant(
        "LTXVideoTransformer3DModel",
        ["3x8x8"],
        arguments=dict(video_coords=Call((3, 8, 8)).ids().T[None], num_frames=None, height=None, width=None),
        grid=(3, 8, 8),
    ),
    "Z-Image in omni mode, with a reference": Variant(
        "ZImageTransformer2DModel",
        ["192 text + 1x14x17 + 18 text"],
        arguments=dict(
            x=[[noise(4, 1, 16, 20), noise(4, 1, 28, 34)]],
            cap_feats=[[noise(20, 16), noise(40, 16)]],
            siglip_feats=[None],
            image_noise_mask=[[0, 1]],
        ),
    ),
    "Kandinsky 6 without audio": Variant(
        "Kandinsky6Transformer3DModel", ["3x8x8"], arguments=dict(audio_hidden_states=None), grid=(3, 8, 8)
    ),
}


@pytest.mark.parametrize("name", VARIANTS)
def test_variant_is_exact_and_sparse_or_dense_with_a_reason(name):
    variant = VARIANTS[name]
    tiny = tiny_models()[variant.transformer]
    torch.manual_seed(0)
    model = getattr(diffusers, tiny.name)(**tiny.config | variant.config).eval().requires_grad_(False)
    compute = lambda: first_output(model(**tiny.arguments(Call(variant.grid)) | variant.arguments, return_dict=False))
    stock = compute()
    with ds.enable(model, "random_blocks", density=1.0, **SETTINGS):
        torch.testing.assert_close(compute(), stock, rtol=1e-4, atol=1e-5 * float(stock.abs().max()))
    with ds.enable(model, "random_blocks", density=0.5, **SETTINGS) as run:
        compute()
    report = run.report()
    assert report.grids == variant.grids and list(report.dense_calls) == ([variant.reason] if variant.reason else [])
    if variant.grids:
        assert report.density_achieved == pytest.approx(0.5, abs=0.01)
    assert compute().equal(stock)


def test_nabla_of_kandinsky_stays_as_it_is():
    """The model's own sparse attention, a mask of FlexAttention, is left alone and counted."""
    tiny, grid = tiny_models()["Kandinsky5Transformer3DModel"], (2, 8, 8)
    blocks = 2 * 8 * 8 // 64
    torch.manual_seed(0)
    model = diffusers.Kandinsky5Transformer3DModel(**tiny.config | dict(attention_type="nabla"))
    model.eval().requires_grad_(False)
    sparse = dict(sta_mask=torch.ones(1, 1, blocks, blocks, dtype=torch.bool), to_fractal=True, P=0.9)
    compute = lambda: first_output(model(**tiny.arguments(Call(grid)), sparse_params=sparse, return_dict=False))
    model.set_attention_backend("flex")
    try:
        stock = compute()
        with ds.enable(model, "random_blocks", density=0.5, **SETTINGS) as run:
            assert compute().equal(stock)
    finally:
        model.reset_attention_backend()
    assert run.report().dense_calls == {"the model's attention mask is a BlockMask": tiny.sites}
