"""The JSON Schema of recipes: it takes what `parse` takes, and refuses a typo in any place."""

import contextlib
import copy
import json
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml
from click.testing import CliRunner

from siftline.cli import cli
from siftline.recipe import parse as library
from siftline.recipe.kinds import BUILT_IN, kind_of
from siftline.recipe.parse import REQUIRED, Recipe, parse
from siftline.recipe.schema import FILE, recipe_schema
from siftline.selectors.registry import METHODS

SCHEMA = recipe_schema()
CHECK = jsonschema.Draft202012Validator(SCHEMA)
SHIPPED = sorted(library.SHIPPED.glob("*.yaml"))
FILES = [*SHIPPED, *sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))]

EVERYTHING: dict[str, Any] = {
    "name": "everything",
    "seed": 3,
    "pool": {
        "name": "p",
        "buckets": 2,
        "inputs": [{"path": "a.jsonl", "columns": {"question": "q"}, "set_aside": ["x"]}],
    },
    "sets": {"dev": [{"name": "d", "inputs": [{"path": "d.jsonl"}]}], "test": []},
    "models": {
        "base": {"pretrain": {"steps": 5}, "corpus": "c.jsonl", "max_length": 64},
        "judge": {"path": "j", "engine": "server", "server": {"url": "http://127.0.0.1/v1"}},
    },
    "roles": {"target": "base", "judge": "judge"},
    "stages": [
        "duplicates",
        {"decontamination": None},
        {
            "quality_rules": {
                "keep": ["en", "no"],
                "languages": {"en": {"min_words": 3}},
                "scores": {"stars": {"min": "1e-4"}},
            }
        },
        {"likelihood": {"name": "unlikely"}},
        {"select": {"method": "dsir", "options": {"buckets": 100}, "gradients": None}},
        {"select": {"name": "again", "options": {"seed": 4}}},
        {"confidence": {"reflection": False, "weights": {"agreement": 1}, "questions": 2}},
        {"correct": {"training": {"phases": []}}},
        "allocate",
    ],
    "budget": {"size": 10, "unit": "rows"},
    "scorers": {"stars": {"kind": "column", "column": "stars"}},
    "bounds": None,
    "card": {"language": ["en", 5]},
    "training": {"options": {"learning_rate": "1e-4"}, "arms": ["curated"], "seeds": [1, 2]},
    "evaluation": {},
    "canaries": {"per_kind": 5},
}  # fmt: skip


def refused(data):
    return not CHECK.is_valid(data)


def places(node, path=()):
    """Paths of all mappings in a recipe whose keys are fixed."""
    free = path and path[-1] in ("models", "scorers", "columns", "weights", "languages")
    if isinstance(node, dict):
        if not (free or path[-2:] == ("quality_rules", "scores")):
            yield path
        for key, value in node.items():
            yield from places(value, (*path, key))
    elif isinstance(node, list):
        for i, value in enumerate(node):
            yield from places(value, (*path, i))


def at(data, path):
    for step in path:
        data = data[step]
    return data


def test_it_is_a_schema_of_its_draft():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    assert SCHEMA["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert list(SCHEMA["properties"]) == [f.name for f in fields(Recipe)]
    assert set(SCHEMA["required"]) == set(REQUIRED)


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_recipes_are_valid_and_a_typo_is_not(path):
    data = yaml.safe_load(path.read_text(encoding="utf-8"))
    CHECK.validate(data)
    assert refused({("bugdet" if k == "budget" else k): v for k, v in data.items()})
    wrong = copy.deepcopy(data)
    wrong["stages"][0] = "duplicate"
    assert refused(wrong)
    wrong["stages"][0] = {"duplicates": {"treshold": 0.7}}
    assert refused(wrong)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_shipped_recipes_name_the_schema_beside_them(path):
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == f"# yaml-language-server: $schema={FILE}"
    assert json.loads((path.parent / FILE).read_text(encoding="utf-8")) == SCHEMA


def test_everything_a_recipe_may_hold():
    CHECK.validate(EVERYTHING)
    assert parse(EVERYTHING).stage("confidence").options.reflection == "off"


@pytest.mark.parametrize(
    "path", list(places(EVERYTHING)), ids=lambda p: ".".join(map(str, p)) or "-"
)
def test_an_unknown_key_is_refused_in_every_place(path):
    wrong = copy.deepcopy(EVERYTHING)
    at(wrong, path)["sizze"] = 1
    assert refused(wrong)
    with pytest.raises(ValueError, match="sizze") as caught:
        parse(wrong)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"stages": []},
        {"stages": ["duplicate"]},
        {"stages": [{"verify": {}, "allocate": {}}]},
        {"stages": [{"allocate": {"size": 5}}]},
        {"stages": [{"allocate": 3}]},
        {"stages": [{"select": {"method": "rds"}}]},
        {"stages": [{"select": {"method": "rds_plus", "options": {"turn": "last"}}}]},
        {"stages": [{"confidence": {"questions": 3}}]},
        {"stages": [{"duplicates": {"threshold": "high"}}]},
        {"stages": [{"duplicates": {"threshold": True}}]},
        {"stages": [{"duplicates": {"num_perm": "256"}}]},
        {"models": {}, "name": "Big"},
        {"models": {"a": {}}},
        {"models": {"a": {"path": "x", "pretrain": {"steps": 1}, "corpus": "c"}}},
        {"models": {"a": {"path": "x", "corpus": "c"}}},
        {"models": {"a": {"pretrain": {"steps": 1}}}},
        {"models": {"a/b": {"path": "x"}}},
        {"roles": {"tarjet": "a"}},
        {"scorers": {"x": {"kind": "column"}}},
        {"scorers": {"x": {"kind": "colum", "column": "c"}}},
        {"scorers": {"uniform": {"kind": "column", "column": "c"}}},
        {"budget": {"unit": "rows"}},
    ],
    ids=str,
)  # fmt: skip
def test_what_parse_refuses_in_one_place_the_schema_refuses(changes):
    wrong = copy.deepcopy(EVERYTHING) | changes
    assert refused(wrong)
    with pytest.raises(ValueError, match=": "):
        parse(wrong)


VALUES = [
    *(None, True, False, 0, 1, 3, 300, -1, 0.5, 2.0, float("inf")),
    *("", "a", "3", "1e-4", "nan", "math", "both", "off", "a.b:c"),
    *([], ["a"], [1, 2], {}, {"a": 1}, {"a": None}, {"method": "lora"}),
]  # fmt: skip
OPTIONS = [
    (kind, f.name)
    for kind in BUILT_IN
    for f in fields(kind_of(kind).options)
    if f.name not in kind_of(kind).from_budget
]


@pytest.mark.parametrize("kind", BUILT_IN)
def test_the_schema_is_never_stricter_than_parse(kind):
    """What an editor marks as wrong is wrong."""
    data = {
        "name": "small",
        "pool": {"name": "p", "inputs": [{"path": "a"}]},
        "models": {"base": {"path": "x"}},
        "budget": {"size": 1},
        "scorers": {"a": {"kind": "column", "column": "c"}},
    }
    taken = 0
    for name in (name for of, name in OPTIONS if of == kind):
        for value in VALUES:
            before = ["confidence"] if kind == "correct" else []
            whole = data | {"stages": [*before, {kind: {name: value}}]}
            with contextlib.suppress(ValueError):
                parse(whole)
                taken += 1
                assert CHECK.is_valid(whole), (name, value)
    assert taken


def test_every_option_of_every_stage_is_described():
    for kind in BUILT_IN:
        said = SCHEMA["$defs"][f"{kind}_options"]
        assert said["description"]
        names = {f.name for f in fields(kind_of(kind).options)} - {*kind_of(kind).from_budget}
        assert set(said["properties"]) == names | {"name"}
        assert all(option["description"] for option in said["properties"].values()), kind


def test_a_stage_is_one_of_the_kinds():
    alone, *others = SCHEMA["properties"]["stages"]["items"]["oneOf"]
    assert alone["enum"] == list(BUILT_IN)
    assert [other["$ref"] for other in others] == [f"#/$defs/{kind}" for kind in BUILT_IN]
    assert SCHEMA["$defs"]["verify"]["required"] == ["verify"]


def test_every_method_has_its_options():
    options = SCHEMA["$defs"]["select_options"]
    known = options["properties"]["method"]["anyOf"][0]["enum"]
    assert known == [entry.name for entry in METHODS]
    for entry, said in zip(METHODS, options["allOf"], strict=True):
        assert said["if"]["properties"]["method"]["const"] == entry.name
        given = json.dumps(said["then"]["properties"]["options"])
        own = SCHEMA["$defs"][given.split("#/$defs/")[1].split('"')[0]]
        assert set(own["properties"]) == {f.name for f in fields(entry.method) if f.init}
        select = {"method": entry.name, "options": {"sizze": 1}}
        assert refused(EVERYTHING | {"stages": [{"select": select}]})
    mine = {"method": "package.module:Class", "options": {"sizze": 1}}
    CHECK.validate(EVERYTHING | {"stages": [{"select": mine}]})


def test_a_stage_of_a_package_is_in_it(tmp_path, monkeypatch):
    code = (
        "from dataclasses import dataclass\n"
        "from siftline.recipe.kinds import StageKind\n"
        "@dataclass(frozen=True)\n"
        "class Recipe:\n"  # the name of one of ours
        '    """Keeps long rows.\n\n    Attributes:\n        words: Words at least.\n    """\n\n'
        "    words: int\n"
        "KIND = StageKind(name='least', role='gate', options=Recipe, run='leasty:run')\n"
    )
    (tmp_path / "leasty.py").write_text(code, encoding="utf-8")
    info = tmp_path / "leasty-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: leasty\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[siftline.stages]\nleast = leasty:KIND\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    kind_of.cache_clear()
    said = json.loads(CliRunner().invoke(cli, ["recipe", "schema"]).output)
    kind_of.cache_clear()
    sys.modules.pop("leasty")
    own = said["$defs"]["least_options"]
    assert own["properties"]["words"] == {"description": "Words at least.", "type": "integer"}
    assert own["required"] == ["words"]
    check = jsonschema.Draft202012Validator(said)
    small = {k: v for k, v in EVERYTHING.items() if k != "stages"}
    check.validate(small | {"stages": [{"least": {"words": 3}}, "allocate"]})
    assert not check.is_valid(small | {"stages": ["least"]}), "it has an option without default"
    assert not check.is_valid(small | {"stages": [{"least": {"word": 3}}]})


def test_the_nearest_key_is_named_everywhere():
    wrong = copy.deepcopy(EVERYTHING)
    wrong["stages"][2]["quality_rules"]["languages"]["en"]["min_word"] = 3
    with pytest.raises(ValueError) as caught:  # noqa: PT011  the whole text is held below
        parse(wrong)
    said = "stages.quality_rules.languages.en: unknown key 'min_word': did you mean 'min_words'?"
    assert str(caught.value) == said
