"""Transformers without an adapter: a reason, a proposed family, or the family that the user gives."""

from __future__ import annotations

import re

import diffusers
import pytest
import torch

import dit_sparse as ds
from dit_sparse.pipelines.family import (
    Family,
    family_named,
    family_of,
    merged_grid,
    merged_references,
    packed_shapes,
)
from dit_sparse.pipelines.unsupported import UNSUPPORTED
from tiny_models import Call, tiny_model, tiny_models

SETTINGS = dict(density=0.5, dense_steps=0, min_tokens=0, block=16, executor="reference")
OTHER_SITES = {"SD3Transformer2DModel"}  # its second self-attention bears the name of cross-attention
OTHER_ARGUMENTS = {"Cosmos3OmniTransformer"}  # sequences of text and video tokens, with names of their own
OTHER_TEXT = {  # not concatenated in a line that names it
    "BriaFibo2Transformer2DModel",
    "MiniMaxH3Transformer3DModel",
    "MochiTransformer3DModel",
    "Flux3Transformer2DModel",
    "Lumina2Transformer2DModel",
    "ZImageTransformer2DModel",
}


def renamed(name: str, **members) -> torch.nn.Module:
    """Return a tiny model as an instance of an unknown class with the same code."""
    stock = tiny_models()[name].build()
    cls = type(stock)
    members |= {"forward": cls.forward, "__init__": cls.__init__, "_repeated_blocks": cls._repeated_blocks}
    stock.__class__ = type("NovelTransformer", (diffusers.ModelMixin, diffusers.ConfigMixin), members)
    return stock


def matches(model: torch.nn.Module, family: Family) -> set[str]:
    return {path for path, _ in model.named_modules() if re.fullmatch(family.sites, path)}


@pytest.mark.parametrize("name", [name for name in tiny_models() if name not in OTHER_ARGUMENTS])
def test_structure_gives_the_family(name):
    model, tiny = tiny_model(name), tiny_models()[name]
    family, proposal = family_of(model), ds.propose_family(model)
    assert (matches(model, proposal) == matches(model, family)) == (name not in OTHER_SITES)
    assert proposal.text == (None if name in OTHER_TEXT else family.text)
    assert tiny.latents == proposal.latents and proposal.timestep == family.timestep


def test_an_unknown_class_is_proposed_and_runs():
    tiny, model = tiny_models()["FluxTransformer2DModel"], renamed("FluxTransformer2DModel")
    proposed = r"supports NovelTransformer; pass family=dit_sparse.propose_family\(model\).*text before"
    with pytest.raises(ValueError, match=proposed) as error:
        ds.enable(model, "random_blocks", **SETTINGS)
    assert "\n" not in str(error.value)
    call = Call((1, 12, 16))
    stock = model(**tiny.arguments(call), return_dict=False)[0]
    with ds.enable(model, "random_blocks", **SETTINGS | dict(density=1.0), family=ds.propose_family(model)) as run:
        torch.testing.assert_close(model(**tiny.arguments(call), return_dict=False)[0], stock, rtol=1e-4, atol=1e-4)
    assert run.report().grids == ["20 text + 1x12x16"] and run.report().sparse_calls == 2


def test_a_family_of_the_user_comes_first_and_only_for_its_classes():
    tiny, model = tiny_models()["WanTransformer3DModel"], tiny_model("WanTransformer3DModel")
    first_block = Family("mine", (type(model).__name__,), r"blocks\.0\.attn1", family_of(model).grid)
    with ds.enable(model, "random_blocks", **SETTINGS, family=first_block) as run:
        model(**tiny.arguments(Call((3, 8, 8))))
    assert run.report().sparse_calls == 1
    others = Family("mine", ("Another",), r"blocks\.0\.attn1", family_of(model).grid)
    with ds.enable(model, "random_blocks", **SETTINGS, family=others) as run:
        model(**tiny.arguments(Call((3, 8, 8))))
    assert run.report().sparse_calls == 2
    with pytest.raises(ValueError, match="'mine' is for Another, got the transformer Linear"):
        ds.enable(torch.nn.Linear(1, 1), family=others)
    with pytest.raises(ValueError, match=r"family must be a dit_sparse\.Family or ModuleAdapter, got str"):
        ds.enable(model, family="wan")


def test_a_module_without_a_config_takes_a_family():
    """The user's own transformer needs no diffusers class, only processors that call attention as diffusers does."""
    tiny, inner = tiny_models()["WanTransformer3DModel"], tiny_models()["WanTransformer3DModel"].build()

    class Plain(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = inner

        def forward(self, hidden_states, timestep, encoder_hidden_states):
            return self.model(hidden_states, timestep, encoder_hidden_states, return_dict=False)[0]

    family = Family("mine", ("Plain",), r"model\.blocks\.\d+\.attn1", lambda config, arguments: (3, 8, 8))
    model = Plain()
    with ds.enable(model, "random_blocks", **SETTINGS, family=family) as run:
        model(**tiny.arguments(Call((3, 8, 8))))
    assert run.report().sparse_calls == 2


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_an_unsupported_class_is_refused_with_its_reason(name):
    assert hasattr(diffusers, name) and family_named({name}) is None
    model = torch.nn.Module()
    model.__class__ = type(name, (torch.nn.Module,), {})
    with pytest.raises(ValueError, match=f"supports {name}: {re.escape(UNSUPPORTED[name])}") as error:
        ds.enable(model)
    assert len(str(error.value)) < 240


def test_images_of_one_size_are_frames_and_others_references():
    assert merged_grid([(1, 4, 6), (2, 4, 6)]) == (3, 4, 6)
    assert merged_grid([(1, 4, 6), (1, 2, 6)]) == (1, 4, 6)
    assert merged_references([(1, 4, 6), (2, 4, 6)]) == (0, 0)
    assert merged_references([(1, 4, 6), (1, 2, 6), (2, 3, 3)]) == (0, 30)
    image, reference = Call((1, 5, 7)).ids(4), Call((1, 5, 7)).ids(4) + torch.tensor([10.0, 0, 0, 0])
    assert packed_shapes(torch.cat([image, reference])) == [(1, 5, 7), (1, 5, 7)]
    assert packed_shapes(torch.cat([image, reference])[None].expand(2, -1, -1)) == [(1, 5, 7), (1, 5, 7)]
    assert packed_shapes(torch.cat([image, reference[:21]])) == [(1, 5, 7), (1, 3, 7)]


@pytest.mark.parametrize("size", [(12, 16), (6, 10)])
def test_references_of_flux_are_frames_or_stay_dense(size):
    """Kontext appends its reference. The density counts the image, and the reference only if it is a frame."""
    tiny, model = tiny_models()["FluxTransformer2DModel"], tiny_model("FluxTransformer2DModel")
    arguments, reference = tiny.arguments(Call((1, 12, 16))), Call((1, *size), seed=9)
    ids = reference.ids() + torch.tensor([1.0, 0, 0])
    arguments["hidden_states"] = torch.cat([arguments["hidden_states"], reference.packed(4)], 1)
    arguments["img_ids"] = torch.cat([arguments["img_ids"], ids])
    stock = model(**arguments, return_dict=False)[0]
    with ds.enable(model, "random_blocks", **SETTINGS | dict(density=1.0)):
        torch.testing.assert_close(model(**arguments, return_dict=False)[0], stock, rtol=1e-4, atol=1e-4)
    with ds.enable(model, "random_blocks", **SETTINGS) as run:
        model(**arguments)
    grid = "20 text + 2x12x16" if size == (12, 16) else "20 text + 1x12x16 + 60 text"
    assert run.report().grids == [grid] and not run.report().dense_calls
    assert run.report().density_achieved == pytest.approx(0.5, abs=0.01)
