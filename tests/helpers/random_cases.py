"""Random attention calls. Each is determined by a seed and a number; `case_checks` computes and checks them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import dit_sparse as ds
from dit_sparse.kernels.executors import ON_GPU
from dit_sparse.kernels.executors import executor as find_executor
from dit_sparse.notation.syntax import Call, Node, UnionNode, nodes, write

TRIPLES = ((1, 1, 1), (1, 2, 2), (2, 4, 4), (3, 1, 5))
SAMPLED: dict[str, tuple] = {"samples": (1, 16, 64), "seed": (0, 7)}
BUDGETED: dict[str, tuple] = {"budget": ()}  # of `random_budgets`
SETTINGS: dict[str, dict[str, tuple]] = {
    "dense": {},
    "random_blocks": {"seed": (0, 7)},
    "window": {"radius": (0.05, 0.25, 1.0)},
    "neighborhood": {"window": (0.1, 0.5, 1.0), "stride": (*TRIPLES, (0, 0, 0)), "dilation": TRIPLES, "tile": TRIPLES},
    "radial": {"decay": (0.2, 0.95, 9.0), "dense_distance": (-1, 0, 2), "min_width": (0.0, 0.5), "sink": (True, False)},
    "svg": SAMPLED,
    "svg2": {
        "query_clusters": (30, 3000), "key_clusters": (30, 9000), "top_p": (0.5, 1.0), "min_ratio": (0.0, 0.5),
        "init_iterations": (1, 5),
    },
    "adaspa": {"head_adaptive": (True, False), "search_interval": (1, 0.4), "queries_per_block": (None, 1, 4)},
    "sparsed": {"groups": (1, 5), "queries_per_block": (None, 1, 4)},
    "tidal": {"selection_interval": (1, 0.4), "average_heads": (True, False), "queries_per_block": (None, 1, 4)},
    "spatten": {"slope": (0.0, 1.0), "share_heads": (True, False), "skipped_heads": (0.0, 0.5), **SAMPLED},
    "seqboat": {},
    "asa": {"samples": (1, 4, 64), "seed": (0, 7), **BUDGETED},
    "dhsa": {"window": (1, 4), "threshold": (1.0, 1.5), "spacing": (1, 8, 99), **BUDGETED},
    "double_sparsity": {
        "share": (0.1, 0.5, 1.0), "adjacent_pairs": (True, False), "samples": (1, 256), "queries_per_block": (1, 4, 64),
        **BUDGETED,
    },
    "gui_kv": {
        "samples": (1, 16), "rank": (1, 99), "norm_weight": (0.0, 1.0), "redundancy": (0.0, 1.0), **BUDGETED,
    },
    "proxyattn": {"group_size": (1, 2, 9), "stride": (1, 4), "probes": (1, 64), "mass": (0.3, 1.0)},
    "pbs": {"probe_queries": (1, 16), "segment_blocks": (1, 3), "subblocks": (1, 9), "top_p": (0.5, 1.0)},
    "sparge": {"similarity_threshold": (0.0, 0.3, 0.9), "hilbert": (True, False), **BUDGETED},
    "subblock": {"subblocks": (1, 2, 4), **BUDGETED},
    "xattention": {"stride": (1, 2, 8), **BUDGETED},
    "flexprefill": {
        "gamma": (0.5, 1.0), "tau": (0.0, 0.1, 1.0), "probe_blocks": (2, 8), "queries_per_block": (1, 16),
    },
    "anchor": BUDGETED,
    "sale": {"queries_per_block": (1, 4), "max_error": (0.01, 0.5), **BUDGETED},
    "hip": {"keys": (64, 512), "queries_per_block": (1, 16)},
    "infllm_v2": {
        "stride": (1, 8), "window": (0, 2), "min_tokens": (0, 8192), "head_group": (1, 2, 3), **BUDGETED,
    },
    "spark": {"channels": (0.1, 0.5, 1.0), "keys": (16, 256), **BUDGETED},
    "deltallm": {"threshold": (0.0, 0.5, 2.0), "window": (0, 1, 99), **BUDGETED},
    "nosa": {"agnostic": (0.0, 0.5, 1.0), **SAMPLED},
    "token_select": {"similarity": (0.9, -1.0), "queries_per_block": (None, 1, 4)},
    "vdit": SAMPLED,
    "sol": BUDGETED,
    "routed": {
        "boxes": (True, False), "key_tile": (8, 16, 50), "tail": (None, 4, 16), "spread": (True, False),
        "every": (None, 1, 5, 99),
    },
    "sink": {"frames": (0.5, 1.0, 2.5)},
    "power": {"width": (0.0, 0.3), "window": (0.0, 1.0, 5.0), "sink": (True, False), "by_frame": (True, False)},
    "svga": {"width": (0.0, 0.3), "stride": (1, 2, 3)},
    "arrow": {"band": (0.01, 0.2), "plus": (0.0, 0.3, 1.0), "frames": (0.0, 0.05, 1.0)},
    "moa": {"alpha": (-1.0, 0.0, 2.0), "beta": (0.0, 0.3, 2.0), "sink": (True, False)},
    "masformer": {"full_layers": (0.0, 1.0), "share": (0.5, 1.0), "radius": (0.1, 0.5)},
    "routing": {"init_iterations": (1, 4), "rounds": (1, 2, 9)},
    "seer": {"rank": (1, 8), **BUDGETED},
    "sparsifiner": {"rank": (1, 4), **BUDGETED},
    "sea": {"group": (1, 8, 99), "features_per_head": (4, 99), "width": (2, 128), "seed": (0, 7), **BUDGETED},
    "dma": BUDGETED,
    "swinbert": BUDGETED,
    "svg.spatial": {"width": (0.01, 0.25, 1.0)},
    "svg.temporal": {"width": (0.01, 0.25, 1.0)},
    "vdit.vertical": {**SAMPLED, **BUDGETED},
    "vdit.skip": {},
}  # fmt: skip
SAME_ORDER = (("radial", "sink", "svg.spatial"), ("sink", "radial"), ("window", "window"), ("svg.temporal",) * 2)
MAKES_CLUSTERS = ("svg2", "pbs", "routed", "routing")
CHANGES_OUTPUT = ("sol", "vdit.skip", "seqboat", "spatten")

DTYPES = (*[torch.float32] * 4, *[torch.bfloat16] * 2, torch.float16, torch.float64)
CONTENTS = ("drift", "drift", "normal", "peaked", "offset", "equal", "zero", "outlier")
FILLS = {"random": None, "zero": 0.0, "nan": torch.nan, "inf": torch.inf, "-inf": -torch.inf}
EXECUTORS = ("auto", "reference", "gather", "cpu")


@dataclass(frozen=True)
class Case:
    """A call of `dit_sparse.attention`.

    Attributes:
        seed, number: determine all other attributes.
        method: text of the method.
        density: the argument, or None.
        contents: kind of random values, of `CONTENTS`.
        fill: values of padded tokens, of `FILLS`.
        strided: whether tokens lie before heads in memory, as the projections of a model return them.
    """

    seed: int
    number: int
    method: str
    density: float | None
    grid: ds.Grid
    batch: int
    heads: int
    key_heads: int
    head_dim: int
    block: int
    dtype: torch.dtype
    executor: str
    scale: float | None
    lengths: tuple[int, ...] | None
    contents: str
    fill: str
    strided: bool

    @classmethod
    def random(cls, seed: int, number: int, executors: tuple[str, ...] = EXECUTORS, model: tuple = ()) -> Case:
        """Return a case; ``model`` holds the heads and layers that the method is for, by default random heads."""
        rng = random.Random(f"{seed}/{number}")
        heads, layers = model or (rng.choice((1, 2, 2, 3, 4, 6)), 1)
        method, density = random_method_and_density(rng, heads, layers)
        sides = [rng.randint(1, rng.choice((2, 6, 9))) for _ in range(3)]
        grid = ds.Grid(*sides, *rng.choice(((0, 0), (0, rng.randint(1, 70)), (rng.randint(1, 70), 0), (3, 20))))
        batch, lengths, executor = rng.choice((1, 2, 3)), None, rng.choice(executors)
        on_gpu = executor in ON_GPU  # their requirements are narrower
        third_party = on_gpu and getattr(find_executor(executor), "THIRD_PARTY", False)
        fills = ("random", "zero") if third_party else tuple(FILLS)  # kernels of others read padding
        if rng.random() < 0.4:
            shortest = rng.choice((*[grid.tokens - grid.after or 1] * 9, 1))  # only few cases pad video tokens
            lengths = tuple(rng.randint(shortest, grid.tokens) for _ in range(batch))
        return cls(
            seed, number, write(method), density, grid, batch, heads,
            key_heads=rng.choice([divisor for divisor in range(1, heads + 1) if heads % divisor == 0]),
            head_dim=rng.choice((16, 16, 32, 32, 64, 128, 80) if on_gpu else (8, 16, 16, 32, 32, 64, 128, 80, 12, 1)),
            block=rng.choice((16, 16, 32, 64, 64, 128) if on_gpu else (16, 16, 32, 64, 64, 128, 48, 7, 1)),
            dtype=rng.choice((torch.float16, torch.float16, torch.bfloat16) if on_gpu else DTYPES), executor=executor,
            scale=rng.choice((None, None, None, 0.05, 1.0, 0.0, -0.3)), lengths=lengths,
            contents=rng.choice(CONTENTS), fill=rng.choice(fills), strided=rng.random() < 0.5,
        )  # fmt: skip

    def tensors(self, device: str = "cpu") -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        """Return q, k, v and the lengths."""
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + self.number)
        normal = lambda *shape: torch.randn(*shape, generator=generator)
        tokens, dim = self.grid.tokens, self.head_dim
        q, k, v = (normal(self.batch, heads, tokens, dim) for heads in (self.heads, self.key_heads, self.key_heads))
        if self.contents in ("drift", "peaked"):
            drift = torch.linspace(-1, 1, tokens)[:, None] * normal(dim)
            q, k = ((4 if self.contents == "peaked" else 1) * (x + drift) for x in (q, k))
        elif self.contents == "offset":
            k = k + 5 * normal(dim)
        elif self.contents in ("equal", "zero"):
            q, k = (x[:, :, :1].expand_as(x) * (self.contents == "equal") for x in (q, k))
        elif self.contents == "outlier":
            k[:, :, tokens // 2] *= 30
        lengths = None if self.lengths is None else torch.tensor(self.lengths)
        if lengths is not None and FILLS[self.fill] is not None:
            padding = (torch.arange(tokens) >= lengths[:, None])[:, None, :, None]
            q, k, v = (x.masked_fill(padding, FILLS[self.fill]) for x in (q, k, v))
        if self.strided:
            q, k, v = (x.transpose(1, 2).contiguous().transpose(1, 2) for x in (q, k, v))
        return *(x.to(device, self.dtype) for x in (q, k, v)), lengths


def random_method_and_density(rng: random.Random, heads: int, layers: int) -> tuple[Node, float | None]:
    """Return the syntax tree of a random method, and the density as an argument, or None."""
    method = random_method(rng, heads, layers)
    if rng.random() < 0.3 or not accepts_density(method):
        return method, None
    density = rng.choice((0.02, 0.1, 0.25, 0.5, 0.9, 1.0, round(rng.uniform(0.05, 1), 3)))
    if rng.random() < 0.3 and isinstance(method, Call):
        return Call(method.name, method.positional, (*method.settings, ("density", density))), None
    return method, density


def random_method(rng: random.Random, heads: int, layers: int) -> Node:
    """Return the syntax tree of a random method: of one paper, or a composition of several."""
    kind = rng.choice(("single", "single", "single", "union", "cached", "corrected", "per head"))
    if kind == "union":
        first, *others = (random_settings(rng, name) for name in rng.choice(SAME_ORDER))
        return UnionNode(first, UnionNode(*others) if len(others) > 1 else others[0])
    if kind == "cached":
        settings = (("replan_interval", rng.choice((None, 3))), ("drift", rng.choice((None, 0.1))))
        return Call("cached", (random_method(rng, heads, layers),), settings)
    if kind == "corrected":
        inner = random_settings(rng, rng.choice([name for name in SETTINGS if name not in CHANGES_OUTPUT]))
        inner = rng.choice((inner, inner, Call("cached", (inner,))))
        pooled = Call("pooled", (inner,), (("group", rng.choice((None, 7, 16))),))
        return rng.choice((pooled, Call("rettention", (inner,))))
    if kind == "per head":
        names = rng.sample([name for name in SETTINGS if name not in MAKES_CLUSTERS], 3)
        methods = tuple((letter, random_settings(rng, name)) for letter, name in zip("abc", names, strict=True))
        letters = tuple("".join(rng.choice("abc") for _ in range(heads)) for _ in range(layers))
        return Call("per_head", (), (("methods", methods), ("layers", letters)))
    return random_settings(rng, rng.choice(tuple(SETTINGS)))


def random_settings(rng: random.Random, name: str) -> Call:
    """Return a method of one paper with about a third of its settings."""
    chosen = {key: values for key, values in SETTINGS[name].items() if rng.random() < 1 / 3}
    return Call(name, (), tuple((key, rng.choice(values or random_budgets(rng))) for key, values in chosen.items()))


def random_budgets(rng: random.Random) -> tuple[Any, ...]:
    """Return a budget of each kind."""
    bounds = (("min_ratio", rng.choice((0.0, 0.1))), ("max_ratio", rng.choice((0.3, 1.0))))
    mass = Call("mass", (rng.choice((0.3, 0.9, 1.0)),), rng.choice(((), bounds)))
    return Call("top", (rng.choice((0.05, 0.3, 1.0)),)), mass, Call("above", (rng.choice((-1.0, 0.5, 1e9)),))


def accepts_density(method: Node) -> bool:
    """Return whether a method takes a density: it has no budget and no method for each head."""
    calls = [one for one in nodes(method) if isinstance(one, Call)]
    return not any(call.name == "per_head" or "budget" in dict(call.settings) for call in calls)
