"""The README and the pages under docs/: what they promise runs, what they list is there."""

import contextlib
import importlib.util
import io
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from siftline.recipe.kinds import BUILT_IN
from siftline.recipe.parse import parse
from siftline.recipe.schema import recipe_schema

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("pages_generate", DOCS / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


# What is generated


def test_pages_hold_what_the_code_says_now(generate):
    found = generate.pages()
    assert {DOCS / "cli.md", *(DOCS / "stages" / f"{kind}.md" for kind in BUILT_IN)} <= set(found)
    stale = [name_of(p) for p in found if generate.rewritten(p) != p.read_text(encoding="utf-8")]
    assert not stale, f"run `make docs`: {stale}"
    shipped = (generate.SHIPPED / generate.FILE).read_text(encoding="utf-8")
    assert generate.schema_text() == shipped, "run `make docs`: the schema of recipes is stale"


def test_every_stage_has_a_page_with_its_own_options(generate):
    pages = {page.stem: page.read_text(encoding="utf-8") for page in (DOCS / "stages").glob("*.md")}
    assert set(pages) == set(BUILT_IN)
    for kind, text in pages.items():
        assert text.startswith(f"# {kind}\n")
        assert [m for m in generate.PART.findall(text) if m[1] == kind], kind
        for heading in ("## What it asks", "## Options"):
            assert heading in text, f"{kind} lacks {heading}"


@dataclass(frozen=True)
class Inner:
    """Inside.

    Attributes:
        depth: How deep.
    """

    depth: int = 3


@dataclass(frozen=True)
class Outer:
    """Outside.

    Attributes:
        word: One of two
            words | or so.
        parts: By name.
        hidden: Not asked for.
    """

    word: str | None
    parts: dict[str, Inner] = field(default_factory=lambda: {"a": Inner(), "b": Inner(4)})
    hidden: bool = False


def test_a_table_has_a_line_for_each_option_and_for_those_inside(generate):
    defaults = generate.plain_defaults(Outer)
    assert defaults == {
        "word": "required", "parts": "`{a: {}, b: {depth: 4}}`", "hidden": "`false`"
    }  # fmt: skip
    del defaults["hidden"]
    lines = generate.options(Outer, defaults).splitlines()
    assert lines[2:4] == [
        r"| `word` | text, or null | required | One of two words \| or so. |",
        "| `parts` | mapping to options, below | `{a: {}, b: {depth: 4}}` | By name. |",
    ]
    assert "Options of each entry of `parts`:" in lines
    assert lines[-1] == "| `depth` | whole number | `3` | How deep. |"


def test_an_option_that_no_docstring_explains_is_refused(generate):
    @dataclass(frozen=True)
    class Silent:
        """Says little.

        Attributes:
            told: This.
        """

        told: int = 1
        untold: int = 2

    with pytest.raises(ValueError, match=r"Silent: no text on untold: add to Attributes"):
        generate.attributes(Silent)


def test_the_page_of_commands_has_every_verb_and_option(generate):
    import click

    from siftline.cli import cli

    text = (DOCS / "cli.md").read_text(encoding="utf-8")
    seen = 0

    def walk(group: click.Group, path: str) -> None:
        nonlocal seen
        for name in group.list_commands(click.Context(group)):
            command = group.get_command(click.Context(group), name)
            assert command is not None
            section = re.search(rf"^#+ {path} {name}$(.*?)(?=^#|\Z)", text, re.M | re.S)
            assert section, f"{path} {name}"
            if isinstance(command, click.Group):
                walk(command, f"{path} {name}")
                continue
            for parameter in command.params:
                if isinstance(parameter, click.Option):
                    assert parameter.opts[0] in section[1], f"{name} {parameter.opts}"
                    seen += 1

    walk(cli, "siftline")
    assert seen > 100


def test_reasons_on_stage_pages_are_those_of_the_code():
    """First cells of the tables under "What it removes": each is a text in the package."""
    package = "\n".join(p.read_text(encoding="utf-8") for p in (ROOT / "src").rglob("*.py"))
    found = 0
    for page in (DOCS / "stages").glob("*.md"):
        text = page.read_text(encoding="utf-8")
        section = re.search(r"^## What it [^\n]*removes\n(.*?)(?=^## )", text, re.M | re.S)
        assert section, page.name
        for reason in re.findall(r"^\| `([a-z0-9_]+)` \|", section[1], re.M):
            pieces = [reason, reason.removesuffix("_low"), reason.removesuffix("_high")]
            pieces += ["overlaps_"] * reason.startswith("overlaps_")
            assert any(f'"{p}"' in package or f'"{p}_"' in package for p in pieces), reason
            found += 1
    assert found >= 20


# README


def test_the_readme_is_short_and_lists_every_stage_with_its_page():
    assert len(README.splitlines()) <= 150
    listed = dict(re.findall(r"^\| \[`(\w+)`\]\((docs/[\w/]+\.md)\) \|", README, re.M))
    assert listed == {kind: f"docs/stages/{kind}.md" for kind in BUILT_IN}


def fences(language: str, text: str = README) -> list[str]:
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.M | re.S)
    return [block for tag, block in found if tag == language]


def commands() -> Iterator[tuple[list[str], str]]:
    """Commands of the section "Your data" with what stands below each."""
    section = README[README.index("## Your data") : README.index("## Promises")]
    for block in fences("", section):
        for said in re.split(r"^\$ ", block, flags=re.M)[1:]:
            command, _, output = said.partition("\n")
            yield shlex.split(command), output


def test_the_readme_runs_as_printed(tmp_path, monkeypatch):
    """On a copy of what a clone has: the recipe, each command, and the lines of Python."""
    (recipe,) = fences("yaml")
    assert len(recipe.splitlines()) == 12
    name = re.search(r"Save this as `([\w.]+)`", README)
    assert name
    (tmp_path / name[1]).write_text(recipe, encoding="utf-8")
    shutil.copytree(ROOT / "examples", tmp_path / "examples")
    asked = list(commands())
    assert [command[1] for command, _ in asked] == ["run", "explain"]
    for (program, *arguments), expected in asked:
        assert program == "siftline"
        done = subprocess.run(
            [sys.executable, "-m", "siftline.cli", *arguments],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert expected in ("", done.stdout)
    stages = [line.split()[0] for line in yaml.safe_load(recipe)["stages"]]
    assert stages == ["duplicates", "decontamination", "verify"]
    (code,) = fences("python")
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    rows, _, message = printed.getvalue().partition(" ")
    assert int(rows) == 148
    assert message.startswith("[{'role': 'user', 'content': ")


# Recipes

SCHEMA = jsonschema.Draft202012Validator(recipe_schema())
RECIPE_PAGES = [page for page in PAGES if re.search(r"^    stages:$", page.read_text(), re.M)]


def recipes(page: Path) -> Iterator[dict[str, Any]]:
    """Indented blocks of a page that list stages."""
    blocks = re.findall(r"(?:^(?: {4}.*)?\n)+", page.read_text(encoding="utf-8"), re.M)
    found = [textwrap.dedent(block).strip("\n") for block in blocks]
    yield from (yaml.safe_load(b) for b in found if re.search(r"^stages:$", b, re.M))


@pytest.mark.parametrize("page", RECIPE_PAGES, ids=name_of)
def test_recipes_on_pages_are_valid(page):
    shown = list(recipes(page))
    assert shown
    for data in shown:
        named = {s[k] for s in data.get("scorers", {}).values() for k in s if k == "model"}
        base = {
            "name": "page",
            "pool": {"name": "pool", "inputs": [{"path": "pool.jsonl"}]},
            "models": {name: {"path": name} for name in ("target", *named)},
            "roles": {"target": "target"},
            "budget": {"size": 1000},
        }
        kinds = [entry if isinstance(entry, str) else next(iter(entry)) for entry in data["stages"]]
        SCHEMA.validate(base | data)
        parsed = [stage.kind for stage in parse(base | data).stages if stage.scope == "all"]
        assert parsed == kinds


def test_every_stage_page_shows_its_stage_in_a_recipe():
    assert {DOCS / "stages" / f"{kind}.md" for kind in BUILT_IN} <= set(RECIPE_PAGES)


# Links and trees


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.M)
    return {re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in headings}


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_links_lead_to_files_and_headings(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        path, _, anchor = target.partition("#")
        found = (page.parent / path) if path else page
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("page", [*PAGES, *(ROOT / "src").rglob("*.py")], ids=name_of)
def test_pages_and_modules_name_no_page_that_is_not_there(page):
    for name in re.findall(r"\bdocs/[\w/]+\.md\b", page.read_text(encoding="utf-8")):
        assert (ROOT / name).exists() or page.name == "log.md", name


def test_every_page_can_be_reached_from_the_readme():
    reached, left = set(), [ROOT / "README.md"]
    while left:
        page = left.pop()
        if page in reached:
            continue
        reached.add(page)
        targets = re.findall(r"\]\((?!https?:)([^)#\s]+\.md)", page.read_text(encoding="utf-8"))
        left += [(page.parent / target).resolve() for target in targets]
    missing = [name_of(p) for p in DOCS.rglob("*.md") if p not in reached]
    assert not missing
