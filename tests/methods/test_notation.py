"""The text form of methods: what is read, what is written, and that both agree."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, fields
from types import UnionType
from typing import get_args, get_origin, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dit_sparse import Above, Cached, Grid, Mass, Method, PerHead, Top
from dit_sparse.composition import changes_output
from dit_sparse.methods import METHODS, PARTS, method, method_at_density, method_text, name_of
from dit_sparse.methods.corrections.pooled import Pooled
from dit_sparse.methods.patterns.radial import Radial
from dit_sparse.methods.patterns.sink import Sink
from dit_sparse.notation.parser import parse, parse_value
from dit_sparse.notation.presets import PRESETS
from dit_sparse.notation.settings import _check_range
from dit_sparse.notation.syntax import nodes, split_list, write
from dit_sparse.pattern import Union

# --- random methods


def numbers(low: float, high: float) -> st.SearchStrategy[float]:
    return st.floats(low, high, allow_nan=False)


BUDGETS = st.one_of(
    st.builds(Top, numbers(0.01, 1)),
    st.builds(Mass, numbers(0.01, 1), min_ratio=numbers(0, 0.3), max_ratio=numbers(0.4, 1)),
    st.builds(Above, st.floats(allow_nan=False)),
)
WHOLE = st.integers(1, 300) | st.sampled_from([1, 2, 4, 8, 64])
SMALL = {
    int: WHOLE,
    float: numbers(0.01, 1),
    bool: st.booleans(),
    type(None): st.none(),
    str: st.just("shapes-wan-i2v"),
}


def values_of(hint: object) -> st.SearchStrategy:
    if Top in get_args(hint):
        return st.none() | BUDGETS
    if get_origin(hint) is UnionType:
        return st.one_of(*map(values_of, get_args(hint)))
    if get_args(hint)[1:] == (...,):
        return st.lists(values_of(get_args(hint)[0]), max_size=3).map(tuple)
    if get_origin(hint) is tuple:
        return st.tuples(*map(values_of, get_args(hint)))
    return SMALL[hint]


def is_allowed(ranges: dict) -> Callable[[object], bool]:
    """Return whether a value lies in the ranges of a field, see `dit_sparse.notation.settings.within`."""

    def check(value: object) -> bool:
        try:
            _check_range("value", value, ranges)
        except ValueError:
            return False
        return True

    return check


@st.composite
def plain_methods(draw, among: tuple[str, ...]) -> Method:
    """A method that holds no other one, with random settings."""
    cls = (METHODS | PARTS)[draw(st.sampled_from(among))]
    hints = get_type_hints(cls)
    names = draw(st.sets(st.sampled_from([f.name for f in fields(cls) if f.name not in ("density", "inner")] or [""])))
    allowed = {f.name: f.metadata.get("ranges", {}) for f in fields(cls)}
    chosen = {name: draw(values_of(hints[name]).filter(is_allowed(allowed[name]))) for name in sorted(names - {""})}
    if chosen.get("budget") is None and draw(st.booleans()):
        chosen["density"] = draw(numbers(0.01, 1))
    try:
        return cls(**chosen)
    except ValueError:  # settings that exclude each other
        return cls()


PLAIN = tuple(
    name
    for name, cls in (METHODS | PARTS).items()
    if not {"inner", "methods"} & {field.name for field in fields(cls)} and name != "vdit.skip"  # changes the output
)


def unions(parts: st.SearchStrategy) -> st.SearchStrategy:
    return st.tuples(parts, parts).map(lambda pair: pair[0] | pair[1])


ORDERED_ALIKE = plain_methods(("radial", "sink", "svg.spatial"))
UNIONS = st.recursive(ORDERED_ALIKE, unions, max_leaves=5) | st.builds(
    Union, parts=st.tuples(ORDERED_ALIKE, ORDERED_ALIKE, ORDERED_ALIKE), density=st.none() | numbers(0.1, 1)
)
SIMPLE = plain_methods(PLAIN) | UNIONS
CACHED = st.builds(Cached, inner=SIMPLE, replan_interval=st.none() | st.integers(1, 9), drift=st.none() | numbers(0, 2))
UNCHANGED = (SIMPLE | CACHED).filter(lambda one: not changes_output(one))
WRAPPED = CACHED | st.builds(Pooled, inner=UNCHANGED, group=st.none() | st.integers(1, 99), density=st.none())
BLOCKS = SIMPLE.filter(lambda one: not one.makes_cluster_plans)
PER_HEAD = st.builds(lambda a, b: PerHead(methods=(("a", a), ("b", b)), layers=("ab", "ba")), BLOCKS, BLOCKS)


@settings(max_examples=300)
@given(SIMPLE | WRAPPED | PER_HEAD)
def test_a_text_is_read_as_the_method_that_it_was_written_for(one):
    text = method_text(one)
    assert method(text) == one
    assert method_text(method(text)) == text, "the text is canonical"
    assert write(parse(text)) == text


@given(SIMPLE | WRAPPED)
def test_a_name_is_the_text_without_the_density(one):
    """`name_of` and the density that a report gives next to it make the method again."""
    settings = {} if one.density is None else {"density": one.density}
    assert method(name_of(one), **settings) == one


@given(st.text(max_size=40) | st.text("radialsinkcached()=,|.019 -\"'ep:none", max_size=40))
def test_any_text_is_a_method_or_one_sentence(text):
    for read in (method, parse, parse_value):
        try:
            read(text)
        except ValueError as error:
            assert str(error) and "\n" not in str(error) and len(str(error)) < 400


# --- what is read


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("radial( sink = true ,decay=0.2,)", Radial(sink=True, decay=0.2)),
        ("radial(sink=True, min_width=2)", Radial(sink=True, min_width=2.0)),
        ("radial|sink", Radial() | Sink()),
        ("radial(density=0.3)|sink(frames=2)", Radial(density=0.3) | Sink(frames=2.0)),
        ("(radial|sink)|sink", (Radial() | Sink()) | Sink()),
        ("radial|sink|sink", Radial() | (Sink() | Sink())),
        ("cached(svg2, replan_interval=3)", Cached(inner=method("svg2"), replan_interval=3)),
        ("cached(inner=svg2, replan_interval=3)", Cached(inner=method("svg2"), replan_interval=3)),
        (
            "rettention(svg2(init_iterations=4), refresh_interval=7)",
            method("rettention", inner=method("svg2", init_iterations=4), refresh_interval=7),
        ),
        ("asa(budget=top(0.2))", method("asa", budget=Top(0.2))),
        ("asa(budget=mass(0.9, min_ratio=0.1))", method("asa", budget=Mass(0.9, min_ratio=0.1))),
        ("asa(budget=mass(top_p=0.9))", method("asa", budget=Mass(0.9))),
        ("sol(budget=above(0))", method("sol", budget=Above(0.0))),
        ("neighborhood(stride=(1,2,2))", method("neighborhood", stride=(1, 2, 2))),
        (
            "adaspa(search_interval=3, queries_per_block=none)",
            method("adaspa", search_interval=3, queries_per_block=None),
        ),
        ("svg.temporal(width=1e-1)", method("svg.temporal", width=0.1)),
    ],
)
def test_texts_of_methods(text, expected):
    assert method(text) == expected and method(method_text(expected)) == expected


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("radial()", "radial"),
        ("radial(decay=0.95, sink=true)", "radial(sink=true)"),
        ("pooled(radial)", "pooled"),
        ("cached(svg2(density=0.2),replan_interval=3)", "cached(svg2, density=0.2, replan_interval=3)"),
        ("(radial)|sink(frames=2)", "radial|sink(frames=2.0)"),
        ("asa(budget=mass(top_p=.9, max_ratio=1))", "asa(budget=mass(0.9))"),
    ],
)
def test_equal_methods_have_one_text(text, canonical):
    assert method_text(method(text)) == canonical


def test_settings_may_be_given_next_to_the_text():
    assert method("radial(sink=true)", decay=0.2) == Radial(sink=True, decay=0.2)
    assert method("radial(sink=true)|sink", density=0.3) == Radial(sink=True, density=0.3) | Sink()
    assert method("asa", budget="mass(0.9)") == method("asa(budget=mass(0.9))")
    assert method("pooled", inner="svg(samples=8)") == method("pooled(svg(samples=8))")
    with pytest.raises(ValueError, match="decay of radial is given twice"):
        method("radial(decay=0.2)", decay=0.2)


def test_numbers_become_the_type_of_the_field():
    assert (
        type(method("radial(decay=1)").decay) is float
        and type(method("radial(dense_distance=2)").dense_distance) is int
    )
    assert type(method("adaspa(search_interval=3)").search_interval) is int


def test_lists_are_split_outside_parentheses_and_quotes():
    text = (
        "radial|sink@0.3, rettention(svg2(init_iterations=4), refresh_interval=5), "
        'profile:"a, b.json", neighborhood(stride=(1,2,2))@own'
    )
    assert split_list(text) == [
        "radial|sink@0.3",
        "rettention(svg2(init_iterations=4), refresh_interval=5)",
        'profile:"a, b.json"',
        "neighborhood(stride=(1,2,2))@own",
    ]
    assert split_list("svg@0.3", "@") == ["svg", "0.3"] and split_list('profile:"a@b"', "@") == ['profile:"a@b"']


@pytest.mark.parametrize(
    "path", ["wan2.1-14b", "a/b c.json", "../x.json", "C:\\x.json", "a, (b).json", 'say "hi"', " x"]
)
def test_profiles_have_a_text(path):
    (node,) = nodes(parse(write(parse(f"profile:{write(path)}"))))
    assert node.name == path and write(parse(f"cached(profile:{write(path)}, replan_interval=3)")).startswith(
        "cached(profile:"
    )


# --- what is refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "expected a method (character 1)"),
        ("radial(decay=)", "expected a value (character 14)"),
        ("radial(decay=1", "expected ',' or ')' (character 15)"),
        ("radial)", "expected the end of the text (character 7)"),
        ("radial sink", "expected the end of the text (character 8)"),
        ("radial(decay=1, decay=2)", "decay is given twice (character 17)"),
        ("radial(sink=true, 3)", "expected NAME=VALUE (character 19)"),
        ("radial(dense_distance=99999999999999999999)", "does not fit into 64 bits"),
        (f"radial(dense_distance={'9' * 5000})", "does not fit into 64 bits"),
        ('per_head(layers="', "unclosed string (character 17)"),
        ("radial\n\0", "unexpected character"),
        ("ünicode", "unexpected character"),
        ("profile:", "expected the name or path of a profile"),
        ("3|radial", "only methods can be joined with |"),
        ("pooled(" * 10_000, "nested more than 32 levels deep"),
        ("radial|" * 10_000, "nested more than 32 levels deep"),
        ("(" * 100_000, "nested more than 32 levels deep"),
        ("radail", "no method 'radail'; did you mean 'radial'?"),
        ("Radial", "no method 'Radial'; did you mean 'radial'?"),
        ("pooled(radail)", "no method 'radail'; did you mean 'radial'?"),
        ("zzz", "no method 'zzz'; there are dense, random_blocks"),
        ("radial(dekay=1)", "radial has no setting 'dekay'; did you mean 'decay'?"),
        ("asa(budget=masss(0.9))", "no budget 'masss'; did you mean 'mass'?"),
        ("asa(budget=mass(0.9, min_ratoi=0.1))", "mass has no setting 'min_ratoi'; did you mean 'min_ratio'?"),
        ("asa(budget=radial)", "no budget 'radial'; there are top, mass, above"),
        ("asa(budget=0.3)", "budget of asa must be a budget such as top(0.2) or none, got 0.3"),
        ("asa(budget=mass)", "mass needs top_p: write mass(top_p=VALUE)"),
        ("cached", "cached needs inner: write cached(METHOD)"),
        ("cached(svg(density=0.2), density=0.3)", "density is given twice: 0.3 for cached and 0.2 inside it"),
        ("radial(0.2)", "settings of radial are written NAME=VALUE, got '0.2' without a name"),
        ("radial(decay='x')", "decay of radial must be a number, got 'x'"),
        ("radial(decay=x)", "decay of radial must be a number, got 'x'"),
        ("radial(decay=true)", "decay of radial must be a number, got true"),
        ("radial(dense_distance=1.5)", "dense_distance of radial must be a whole number, got 1.5"),
        ("radial(sink=1)", "sink of radial must be true or false, got 1"),
        ("neighborhood(stride=(1,2))", "stride of neighborhood must be a tuple of 3 values (each a whole number)"),
        ("adaspa(search_interval=x)", "search_interval of adaspa must be a number, got 'x'"),
        ("adaspa(queries_per_block=2.5)", "queries_per_block of adaspa must be a whole number or none, got 2.5"),
        ("profile:shapes-wan-i2v", "a profile needs the model that it is made for"),
    ],
)
def test_what_cannot_be_a_method_is_one_sentence(text, words):
    with pytest.raises(ValueError) as error:
        method(text)
    assert words in str(error.value) and "\n" not in str(error.value) and len(str(error.value)) < 250


def test_every_setting_is_checked_against_its_field():
    for name, cls in (METHODS | PARTS).items():
        for field in fields(cls):
            with pytest.raises(ValueError, match=f"{field.name} of {name} must be"):
                method(name, **{field.name: object()})
        if all(field.default is not MISSING for field in fields(cls)):
            assert method(name, **{f.name: getattr(cls(), f.name) for f in fields(cls)}) == cls()


def test_values_of_settings():
    assert parse_value("(1, -2.5, true, none, 'x')") == (1, -2.5, True, None, "x")
    assert parse_value("(1,)") == (1,) and parse_value("(1)") == 1 and parse_value("()") == ()
    assert Grid.parse("1x2x3").tokens == 6 and parse_value("-inf") == float("-inf")


def test_presets_stand_for_a_method_at_a_density():
    """Settings are added or replaced; a preset never sets a density twice without a word."""
    assert method("balanced") == method("routed", density=0.15)
    assert method("quality(residual=none, density=0.3)") == method("routed", residual=None, density=0.3)
    assert method_at_density("cached(fast)", None) == method("cached(asa)", density=0.25)
    assert method_text(method("balanced")) == "routed(density=0.15)"
    for name in PRESETS:
        assert name not in METHODS and method(name).density
    with pytest.raises(ValueError, match="density of routed is given twice"):
        method_at_density("quality", 0.5)
    with pytest.raises(ValueError, match="quality is a preset"):
        method("quality(svg2)")
