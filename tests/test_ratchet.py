"""What there is to know about Siftline, counted: numbers only fall, unless a commit says why.

python tests/test_ratchet.py --write     # the numbers as they are now
"""

import ast
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import pytest

FILE = Path(__file__).with_name("ratchet.json")
PACKAGE = Path(__file__).parents[1] / "src" / "siftline"
LONG = 400
"""Lines from which a module is long; none may have more than 600."""


def recipe_fields() -> int:
    """Keys that a recipe may hold, those of stages, scorers and methods included."""
    from siftline.recipe.schema import recipe_schema

    schema = recipe_schema()
    return sum(len(s.get("properties", ())) for s in (schema, *schema["$defs"].values()))


def cli_options() -> int:
    """Options of all verbs; `--help` is not counted."""
    from siftline.cli import cli

    def found(command: click.Command) -> Iterator[click.Parameter]:
        yield from (p for p in command.params if isinstance(p, click.Option))
        if isinstance(command, click.Group):
            context = click.Context(command)
            for name in command.list_commands(context):
                inner = command.get_command(context, name)
                assert inner is not None, name
                yield from found(inner)

    return len(list(found(cli)))


def public_names(tree: ast.Module) -> list[str]:
    """Functions, classes and constants that a module defines, without those that begin with _."""
    names: list[str] = []
    for node in tree.body:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.append(node.name)
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            names += [n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)]
    return [name for name in names if not name.startswith("_")]


def counted() -> dict[str, int]:
    """The numbers as they are now."""
    texts = [path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))]
    return {
        "recipe_fields": recipe_fields(),
        "cli_options": cli_options(),
        "modules": len(texts),
        "modules_above_400_lines": sum(len(text.splitlines()) > LONG for text in texts),
        "public_names": sum(len(public_names(ast.parse(text))) for text in texts),
    }


def differences(recorded: dict[str, Any], now: dict[str, int]) -> list[str]:
    """What to do about each number that moved, one line each."""
    write = "python tests/test_ratchet.py --write"
    lines = [
        f"{name} rose from {recorded.get(name)} to {value}: do with less, or say in the commit why "
        f"not and run {write}"
        if value > recorded.get(name, 0)
        else f"{name} fell from {recorded[name]} to {value}: keep it there, run {write}"
        for name, value in now.items()
        if value != recorded.get(name)
    ]
    return [*lines, *(f"{name} is counted no more" for name in recorded if name not in now)]


def test_numbers_only_fall():
    assert not differences(json.loads(FILE.read_text(encoding="utf-8")), counted())


def test_a_number_that_moved_is_told_with_what_to_do():
    same = {"modules": 3}
    assert differences(same, same) == []
    (rose,) = differences(same, {"modules": 4})
    assert rose.startswith("modules rose from 3 to 4: do with less, or say in the commit why")
    (fell,) = differences(same, {"modules": 2})
    assert fell.startswith("modules fell from 3 to 2: keep it there, run python tests/")
    assert "names rose from None to 1" in differences(same, same | {"names": 1})[0]
    assert differences(same, {}) == ["modules is counted no more"]


@pytest.mark.parametrize(
    ("code", "names"),
    [
        ("A, _B = 1, 2\nC: int = 3\nD.x = 4", ["A", "C", "D"]),
        ("def f():\n  def g(): ...\nclass K:\n  y = 2\nasync def h(): ...", ["f", "K", "h"]),
        ("import os\nfrom a import b\nif True:\n  z = 1\ndef _p(): ...", []),
    ],
)  # fmt: skip
def test_public_names_are_those_a_module_defines(code, names):
    assert public_names(ast.parse(code)) == names


if __name__ == "__main__":
    if sys.argv[1:] == ["--write"]:
        FILE.write_text(json.dumps(counted(), indent=2) + "\n", encoding="utf-8")
    print(FILE.read_text(encoding="utf-8"), end="")
