"""Writes what follows from the code: parts of these pages, and the JSON Schema of recipes.

    make docs

A page marks such a part by two comments, `<!-- generated NAME -->` and `<!-- end -->`; what stands
between them is replaced. NAME is `commands`, a stage's kind (its options as a recipe without any
gives them), or one of `SECTIONS`. The schema beside the shipped recipes is written whole. A test
holds all of them to what this writes.
"""

import re
import types
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import click

from siftline.cli import cli
from siftline.config import field_texts
from siftline.ingest.pool import PoolSpec
from siftline.recipe.kinds import kind_of as stage_kind
from siftline.recipe.parse import SHIPPED, parse
from siftline.recipe.schema import FILE, schema_text
from siftline.recipe.sections import Bounds, Budget, Canaries, Card, Inputs, Training
from siftline.scoring.engines.base import ModelSpec
from siftline.selectors.less import Gradients
from siftline.training.evaluate import Evaluation
from siftline.training.sft import FineTune

DOCS = Path(__file__).parent
PART = re.compile(r"(<!-- generated (\S+) -->\n).*?(<!-- end -->)", re.S)
SECTIONS = {
    "bounds": Bounds,
    "budget": Budget,
    "canaries": Canaries,
    "card": Card,
    "evaluation": Evaluation,
    "gradients": Gradients,
    "inputs": Inputs,
    "model": ModelSpec,
    "pool": PoolSpec,
    "training": Training,
    "training-options": FineTune,
}
ELSEWHERE = {FineTune: "[training options](DOCS/training.md#options)"}
"""Dataclasses whose options have a table of their own, and where it is."""
_NAMES = {int: "whole number", float: "number", bool: "true or false", str: "text", Any: "anything"}


def attributes(cls: type) -> dict[str, str]:
    """Text by field of a dataclass.

    Raises:
        ValueError: if the class has no text on one of its fields.
    """
    found = field_texts(cls)
    missing = [field.name for field in fields(cls) if not found.get(field.name)]
    if missing:
        raise ValueError(f"{cls.__qualname__}: no text on {', '.join(missing)}: add to Attributes")
    return found


def kind_of(hint: Any) -> str:
    """A type as a reader of YAML calls it."""
    origin, args = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        return ", or ".join("null" if a is type(None) else kind_of(a) for a in args)
    if origin is Literal:
        return ", ".join(f"`{value}`" for value in args)
    if origin is tuple:
        return f"list of {kind_of(args[0])}"
    if origin is dict:
        return f"mapping to {kind_of(args[1])}"
    if is_dataclass(hint):
        return ELSEWHERE.get(hint, "options, below")
    return _NAMES[hint]


def shown(value: Any) -> str:
    """A default as it would stand in a recipe."""
    if is_dataclass(value):
        said = {
            f.name: getattr(value, f.name)
            for f in fields(value)
            if getattr(value, f.name) != default_of(f)
        }
        return shown(said)
    if isinstance(value, dict):
        inside = ", ".join(f"{k}: {shown(v)}" for k, v in value.items())
        return f"{{{inside}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(shown, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value) if value != "" else '""'


def default_of(field: Any) -> Any:
    """A field's default, or MISSING."""
    return field.default_factory() if field.default_factory is not MISSING else field.default


def nested(hint: Any) -> Iterator[type]:
    """Dataclasses in a type that have no table elsewhere."""
    if is_dataclass(hint) and hint not in ELSEWHERE:
        yield hint
    for argument in get_args(hint):
        yield from nested(argument)


def table(head: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    rows = [head, tuple("---" for _ in head), *lines]
    escaped = [[cell.replace("|", r"\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in escaped)


def options(cls: type, defaults: dict[str, str]) -> str:
    """The table of a dataclass, then those of dataclasses that its fields hold.

    Args:
        cls: The dataclass.
        defaults: What is shown as default, by field; fields without one have no line.
    """
    texts, hints = attributes(cls), get_type_hints(cls)
    names = [field.name for field in fields(cls) if field.name in defaults]
    lines = [(f"`{n}`", kind_of(hints[n]), defaults[n], texts[n]) for n in names]
    parts = [table(("option", "takes", "default", "what it says"), lines)]
    for name in names:
        for inner in nested(hints[name]):
            several = get_origin(hints[name]) in (dict, tuple)
            parts.append(f"Options of {'each entry of ' if several else ''}`{name}`:")
            parts.append(options(inner, plain_defaults(inner)))
    return "\n\n".join(parts)


def plain_defaults(cls: type) -> dict[str, str]:
    """Defaults of a dataclass as they stand in the code."""
    values = {field.name: default_of(field) for field in fields(cls) if field.init}
    return {k: "required" if v is MISSING else f"`{shown(v)}`" for k, v in values.items()}


def stage_options(kind: str) -> str:
    """The table of a stage's options, with the defaults that a recipe gives them."""

    def built(seed: int) -> Any:
        data = {
            "name": "page",
            "seed": seed,
            "pool": {"name": "page", "inputs": [{"path": "page.jsonl"}]},
            "models": {"target": {"path": "page"}},
            "stages": [*(["confidence"] if kind == "correct" else []), kind],
            "budget": {"size": 1},
        }
        return parse(data).stage(kind).options

    one, other = built(1_000_003), built(1_000_033)
    defaults = {}
    for field in fields(one):
        value = getattr(one, field.name)
        from_recipe = value != getattr(other, field.name)
        defaults[field.name] = "the recipe's" if from_recipe else f"`{shown(value)}`"
    for name in stage_kind(kind).from_budget:  # a recipe states the budget once
        del defaults[name]
    return options(type(one), defaults)


def commands(group: click.Group, path: str = "siftline", level: str = "##") -> Iterator[str]:
    """A section on each verb, those of groups included."""
    context = click.Context(group, info_name=path)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        full = f"{path} {name}"
        yield f"{level} {full}"
        if isinstance(command, click.Group):
            yield prose(command)
            yield from commands(command, full, level + "#")
            continue
        inner = click.Context(command, info_name=full)
        yield f"    {' '.join([full, *command.collect_usage_pieces(inner)])}"
        yield prose(command)
        records = [p.get_help_record(inner) for p in command.params if isinstance(p, click.Option)]
        if records:
            yield table(("option", "what it says"), [(f"`{r[0]}`", r[1]) for r in records if r])


def prose(command: click.Command) -> str:
    """A command's help, one line a paragraph."""
    paragraphs = cleandoc(command.help or "").split("\n\n")
    return "\n\n".join(" ".join(p.split()) for p in paragraphs)


def generated(name: str, page: Path) -> str:
    """What stands between the comments of that name, on a page below `DOCS`."""
    if name == "commands":
        return "\n\n".join(commands(cli))
    if name in SECTIONS:
        text = options(SECTIONS[name], plain_defaults(SECTIONS[name]))
    else:
        text = stage_options(name)
    up = "/".join([".."] * (len(page.relative_to(DOCS).parts) - 1)) or "."
    return text.replace("DOCS/", f"{up}/")


def rewritten(page: Path) -> str:
    """A page with its generated parts as the code has them now."""
    text = page.read_text(encoding="utf-8")
    return PART.sub(lambda m: f"{m[1]}\n{generated(m[2], page)}\n\n{m[3]}", text)


def pages() -> list[Path]:
    """All pages that have such a part."""
    return [p for p in sorted(DOCS.rglob("*.md")) if PART.search(p.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    for page in pages():
        page.write_text(rewritten(page), encoding="utf-8")
    (SHIPPED / FILE).write_text(schema_text(), encoding="utf-8")
