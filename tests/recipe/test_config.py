"""Mappings into dataclasses: every error says where, what is wrong, and what would be right."""

import copy
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from siftline.config import build, check_names, convert, nearest, override


@dataclass(frozen=True)
class Inner:
    size: int
    ratio: float = 0.5


@dataclass(frozen=True)
class Outer:
    name: str
    inner: Inner
    flag: bool = False
    kind: Literal["a", "b"] = "a"
    limit: int | None = None
    tags: tuple[str, ...] = ()
    many: tuple[Inner, ...] = ()
    columns: dict[str, str] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    derived: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        if self.limit is not None and self.limit < 0:
            raise ValueError(f"limit is {self.limit}: it can't be negative")


GOOD = {"name": "n", "inner": {"size": 3}}


def test_everything_given_and_everything_left_out():
    assert build(Outer, GOOD, "x") == Outer("n", Inner(3))
    full = {
        "name": 5,  # a YAML scalar that reads as text
        "inner": {"size": 1, "ratio": "1e-4"},  # YAML reads 1e-4 as a string
        "flag": True,
        "kind": "b",
        "limit": None,
        "tags": ["t", 1],
        "many": [{"size": 1}, {"size": 2, "ratio": 2}],
        "columns": {1: "a"},
        "extra": {"x": [1, {"y": 2}]},
    }
    built = build(Outer, full, "x")
    assert built == Outer(
        "5",
        Inner(1, 1e-4),
        True,
        "b",
        None,
        ("t", "1"),
        (Inner(1), Inner(2, 2.0)),
        {"1": "a"},
        {"x": [1, {"y": 2}]},
    )
    assert isinstance(built.many[1].ratio, float)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"nmae": 1}, "x: unknown key 'nmae': did you mean 'name'?"),
        ({"zzzzzz": 1}, "x: unknown key 'zzzzzz': known: columns, extra, flag, inner, "),
        ({"derived": 1}, "x: unknown key 'derived': "),
        ({7: 1}, "x: unknown key 7: known: "),
        ({"inner": {"size": 1, "sizes": 2}}, "x.inner: unknown key 'sizes': did you mean 'size'?"),
        ({"inner": {}}, "x.inner: 'size' is missing"),
        ({"inner": None}, "x.inner: 'size' is missing"),
        ({"inner": 3}, "x.inner: expected a mapping, found 3"),
        ({"inner": {"size": "3"}}, "x.inner.size: expected int, found '3'"),
        ({"inner": {"size": 3.0}}, "x.inner.size: expected int, found 3.0"),
        ({"inner": {"size": True}}, "x.inner.size: expected int, found True"),
        ({"inner": {"size": 1, "ratio": "much"}}, "x.inner.ratio: expected float, found 'much'"),
        ({"inner": {"size": 1, "ratio": False}}, "x.inner.ratio: expected float, found False"),
        ({"inner": {"size": 1, "ratio": "nan"}}, "x.inner.ratio: expected float, found 'nan'"),
        ({"inner": {"size": 1, "ratio": "1_0"}}, "x.inner.ratio: expected float, found '1_0'"),
        ({"inner": {"size": 1, "ratio": None}}, "x.inner.ratio: expected float, found None"),
        ({"flag": 1}, "x.flag: expected bool, found 1"),
        ({"flag": "true"}, "x.flag: expected bool, found 'true'"),
        ({"name": [1]}, "x.name: expected str, found [1]"),
        ({"name": True}, "x.name: expected str, found True"),
        ({"name": None}, "x.name: expected str, found None"),
        ({"kind": "c"}, "x.kind: 'c' is not one of 'a', 'b'"),
        ({"kind": ["a"]}, "x.kind: ['a'] is not one of 'a', 'b'"),
        ({"limit": "1"}, "x.limit: expected int, found '1'"),
        ({"limit": -1}, "x: limit is -1: it can't be negative"),
        ({"tags": "t"}, "x.tags: expected a list, found 't'"),
        ({"tags": ["a", []]}, "x.tags[1]: expected str, found []"),
        ({"many": [{"size": 1}, {"size": None}]}, "x.many[1].size: expected int, found None"),
        ({"columns": ["a"]}, "x.columns: expected a mapping, found ['a']"),
        ({"columns": {"a": None}}, "x.columns.a: expected str, found None"),
    ],
)
def test_an_error_says_where_and_what(change, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
        build(Outer, GOOD | change, "x")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_missing_is_named():
    with pytest.raises(ValueError, match="x: 'inner' is missing"):
        build(Outer, {"name": "n"}, "x")
    with pytest.raises(ValueError, match="expected a mapping, found 'text'"):
        build(Outer, "text", "x")


@given(
    st.builds(
        Outer,
        name=st.text(),
        inner=st.builds(Inner, st.integers(), st.floats(allow_nan=False)),
        flag=st.booleans(),
        kind=st.sampled_from(["a", "b"]),
        limit=st.none() | st.integers(0),
        tags=st.lists(st.text()).map(tuple),
        many=st.lists(st.builds(Inner, st.integers())).map(tuple),
        columns=st.dictionaries(st.text(), st.text()),
    )
)
def test_a_dataclass_survives_the_round_trip(outer):
    data = {k: v for k, v in asdict(outer).items() if k != "derived"}
    assert build(Outer, data, "x") == outer


def test_unions_try_every_member():
    assert convert(int | str | None, 3, "x") == 3
    assert convert(int | str | None, "a", "x") == "a"
    with pytest.raises(ValueError, match=r"x: expected int, found \[\]; or x: expected float"):
        convert(int | float, [], "x")


def test_a_choice_is_of_its_own_type():
    assert convert(Literal[1, 2], 2, "x") == 2
    for value in (True, 1.0, "1"):
        with pytest.raises(ValueError, match=f"x: {value!r} is not one of 1, 2"):
            convert(Literal[1, 2], value, "x")


def test_of_several_faults_the_first_is_told_and_unknown_keys_come_first():
    wrong = {"name": True, "inner": {"size": "3"}, "flagg": 1}
    with pytest.raises(ValueError, match=r"^x: unknown key 'flagg': did you mean 'flag'\?$"):
        build(Outer, wrong, "x")
    del wrong["flagg"]
    with pytest.raises(ValueError, match=r"^x\.name: expected str, found True$"):
        build(Outer, wrong, "x")


@dataclass(frozen=True)
class Invariant:
    size: int = 1

    def __post_init__(self) -> None:
        assert self.size, "an invariant of the code"


def test_an_invariant_that_breaks_is_no_fault_of_the_input():
    with pytest.raises(AssertionError, match="an invariant of the code"):
        build(Invariant, {"size": 0}, "x")


@dataclass(frozen=True)
class Shapes:
    pair: tuple[int, str] = (1, "b")
    listed: list[float] = field(default_factory=list)
    inner: Inner | None = None
    path: Path = Path()
    matrix: dict[str, tuple[float, ...]] = field(default_factory=dict)


def test_what_pydantic_knows_besides_is_checked_too():
    given = {"pair": [3, "d"], "listed": [1, "1e2"], "path": "a/b", "matrix": {"r": [1]}}
    assert build(Shapes, given, "x") == Shapes(
        (3, "d"), [1.0, 100.0], None, Path("a/b"), {"r": (1,)}
    )
    for wrong, says in (
        ({"pair": [1]}, "x.pair: 1 is missing"),
        ({"pair": [1, "b", 3]}, "x.pair: tuple should have at most 2 items"),
        ({"listed": [1, True]}, "x.listed[1]: expected float, found True"),
        ({"inner": {"sise": 1}}, "x.inner: unknown key 'sise': did you mean 'size'?"),
        ({"path": 3}, "x.path: input is not a valid path"),
        ({"matrix": {"r": [1, "x"]}}, "x.matrix.r[1]: expected float, found 'x'"),
    ):
        with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
            build(Shapes, wrong, "x")
        assert str(caught.value).startswith(says)


def test_nearest_names_one_or_all():
    assert nearest("treshold", ["threshold", "seed"]) == "did you mean 'threshold'?"
    assert nearest("q", ["threshold", "seed"]) == "known: seed, threshold"


def test_names_are_folder_names_and_distinct():
    check_names(["a", "B-2", "c_d.e", "0"], "pools")
    for bad in ("", "a/b", "..", ".a", "a b", "é", "-x"):
        with pytest.raises(ValueError, match=r"pools: name .*: use letters, digits"):
            check_names(["a", bad], "pools")
    with pytest.raises(ValueError, match="pools: 'a' occurs twice: give one of them another name"):
        check_names(["a", "b", "a"], "pools")


# --set

DATA = {
    "budget": {"size": 1},
    "seed": 0,
    "empty": None,
    "numbers": [1, 2],
    "stages": [
        {"duplicates": None},
        {"diversity": {"size": 5}},
        {"duplicates": {"name": "again", "threshold": 0.9}},
        {"broken": 3},
    ],
    "sets": {"dev": [{"name": "d1", "buckets": 1, "inputs": [{"path": "p"}]}]},
}


def changed(*assignments):
    data = copy.deepcopy(DATA)
    for assignment in assignments:
        override(data, assignment)
    return data


@pytest.mark.parametrize(
    ("assignment", "place", "value"),
    [
        ("seed=3", ("seed",), 3),
        ("seed=", ("seed",), None),
        ("budget.size=1000", ("budget", "size"), 1000),
        ("budget.note=a=b", ("budget", "note"), "a=b"),
        ("empty.deep.key=[1, two]", ("empty", "deep", "key"), [1, "two"]),
        ("new.key=true", ("new", "key"), True),
        ("stages.duplicates.threshold=0.7", ("stages", 0, "duplicates", "threshold"), 0.7),
        ("stages.diversity.size=null", ("stages", 1, "diversity", "size"), None),
        ("stages.again.threshold=0.5", ("stages", 2, "duplicates", "threshold"), 0.5),
        ("sets.dev.d1.buckets=4", ("sets", "dev", 0, "buckets"), 4),
        ("sets.dev=[]", ("sets", "dev"), []),
    ],
)
def test_set_changes_one_place_and_no_other(assignment, place, value):
    want = copy.deepcopy(DATA)
    at: Any = want
    for step in place[:-1]:
        if isinstance(at, dict):
            at[step] = at.get(step) or {}
        at = at[step]
    at[place[-1]] = value
    data = changed(assignment)
    for side in (data, want):  # a stage without options is one with none
        side["stages"][0]["duplicates"] = side["stages"][0]["duplicates"] or {}
    assert data == want


@pytest.mark.parametrize(
    ("assignment", "says"),
    [
        ("seed", "--set 'seed': expected key=value, e.g. budget.size=1000"),
        ("=3", "--set '=3': expected key=value"),
        ("stages.diversty.size=1", "no entry 'diversty': did you mean 'diversity'?"),
        ("stages.agin.size=1", "no entry 'agin': did you mean 'again'?"),
        ("stages.broken.size=1", "no entry 'broken': "),
        ("stages.diversity=1", "--set stages.diversity: 'diversity' is an entry of a list"),
        ("seed.x=1", "--set seed.x: 'seed' holds 0, not a mapping"),
        ("numbers.0.x=1", "--set numbers.0.x: no entry '0'"),
        ("sets.dev.d2.buckets=1", "no entry 'd2': did you mean 'd1'?"),
        ("budget.size=[1", "--set budget.size: '[1' is not YAML: "),
    ],
)
def test_set_that_leads_nowhere_is_one_line(assignment, says):
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
        changed(assignment)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_yaml_words_for_true_and_false_are_words_where_they_are_meant():
    assert convert(Literal["auto", "on", "off"], False, "x") == "off"
    assert convert(Literal["auto", "on", "off"], True, "x") == "on"
    with pytest.raises(ValueError, match="False is not one of 'a'"):
        convert(Literal["a"], False, "x")
