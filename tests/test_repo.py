"""The house rules that no single module can hold: imports, sizes, names, what is said in public."""

import ast
import json
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import click
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "src" / "siftline"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = ("torch", "vllm", "faiss", "transformers", "trl", "peft", "sentence_transformers", "numba")

# What each part of the package may import of the others. The five folders and training go one way:
# kernels <- selectors, scoring, training <- stages <- assets <- pipelines <- definitions.
LEAVES = {"config", "disk", "entry_points", "locks", "progress", "workspace"}
DATA = {*LEAVES, "ingest", "rows", "store"}
METHODS = {"kernels", "selectors", "scoring", "training"}
BELOW_STAGES = {*DATA, *METHODS, "recipe", "report"}
ALLOWED: dict[str, set[str]] = {
    "__init__": {"api", "rows"},
    "config": set(),
    "disk": set(),
    "entry_points": set(),
    "locks": set(),
    "progress": set(),
    "workspace": set(),
    "kernels": set(),
    "rows": {*LEAVES, "kernels"},
    "store": {"locks", "rows"},
    "ingest": {"disk", "locks", "rows"},
    "deduplication": {
        "disk",
        "ingest",
        "kernels",
        "locks",
        "progress",
        "rows",
    },  # one reader for all verbs
    "selectors": {"config", "entry_points", "kernels", "rows"},
    "scoring": {"kernels", "rows", "selectors", "store"},
    "training": {"disk", "ingest", "kernels", "rows", "scoring", "selectors", "store"},
    "recipe": {"config", "entry_points", "ingest", "rows", "scoring", "training"},
    "export": {"rows"},
    "report": {*DATA, "kernels", "recipe"},
    "stages": BELOW_STAGES,
    "demo": {*BELOW_STAGES, "stages"},
    "assets": {*BELOW_STAGES, "stages"},
    "pipelines": {*BELOW_STAGES, "stages", "assets"},
    "definitions": {*BELOW_STAGES, "stages", "assets", "pipelines"},
    "api": {*BELOW_STAGES, "stages", "deduplication"},
    # Outside the line: only a verb may start anything.
    "cli": {*BELOW_STAGES, "stages", "api", "deduplication", "demo", "export", "pipelines"},
}
DAGSTER = {"assets", "pipelines", "definitions"}
LATE = {("pipelines", "definitions")}
"""A run's processes rebuild a job from the definitions, inside a function."""


def part_of(path: Path) -> str:
    """The package's part a file belongs to: its first folder, else its own name."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


@cache
def imports_of(path: Path) -> list[tuple[str, bool]]:
    """Absolute names a module imports, and whether that happens when it is loaded."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    late = {
        id(node)
        for body in ast.walk(tree)
        if isinstance(body, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for node in ast.walk(body)
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        found += [(name, id(node) not in late) for name in names]
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_go_one_way(path):
    mine = part_of(path)
    assert mine in ALLOWED, f"{mine} is new: say here what it may import"
    for name, at_load in imports_of(path):
        top, *rest = name.split(".")
        if top == "dagster":
            assert mine in DAGSTER, f"{mine} imports dagster"
        if top == "siftline" and rest and not rest[0].startswith("__"):
            allowed = {mine, *ALLOWED[mine]}
            late = (mine, rest[0]) in LATE and not at_load
            assert rest[0] in allowed or late, f"{mine} may not import {rest[0]}"


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("stages/*/decide.py")), ids=str)
def test_decisions_are_pure(path):
    """What a stage decides needs no file, no model and no run: it imports what selectors may."""
    pure = {*ALLOWED["selectors"], "selectors", "recipe", "stages"}
    for name, at_load in imports_of(path):
        top, *rest = name.split(".")
        assert not at_load or top != "siftline" or rest[0] in pure, name
        if top == "siftline" and rest[0] == "stages":
            assert len(rest) > 2, f"{name} is no decision"


def test_every_part_has_its_rule():
    assert {part_of(path) for path in MODULES} == set(ALLOWED)


def test_the_allowed_imports_have_no_cycle():
    """The table itself can't permit a ring, or it would hold nothing."""
    done: set[str] = set()
    left = dict(ALLOWED)
    while left:
        ready = [name for name, needs in left.items() if needs <= done]
        assert ready, f"a ring among {sorted(left)}"
        done |= set(ready)
        left = {name: needs for name, needs in left.items() if name not in ready}


LOADED = """
import json, sys
import siftline.definitions
import selectors, asyncio, subprocess
print(json.dumps({
    "modules": sorted(m for m in sys.modules),
    "selectors": selectors.__file__,
    "jobs": sorted(j.name for j in siftline.definitions.defs.jobs),
}))
"""


def test_definitions_load_without_models_or_environment(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", LOADED],
        env={"HOME": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=True,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    loaded = {name.partition(".")[0] for name in said["modules"]}
    assert not loaded & set(HEAVY)
    assert "siftline" in loaded
    assert {"demo", "s3ft"} <= set(said["jobs"])
    assert "siftline" not in Path(said["selectors"]).parts, "the standard library's is shadowed"
    assert not list(tmp_path.iterdir()), "loading definitions wrote files"


def test_nothing_at_the_top_shadows_another_package():
    """From the repository root, where people run pytest and dagster, `selectors` is Python's."""
    code = "import selectors, sys; print(selectors.__file__); import kernels"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert Path(done.stdout.strip()).parent.name.startswith("python3")
    folders = {"assets", "selectors", "scoring", "kernels", "pipelines", "training", "stages"}
    for place in (ROOT, ROOT / "src", ROOT / "tests"):
        names = {
            p.stem for p in place.iterdir() if p.suffix == ".py" or (p / "__init__.py").exists()
        }
        assert not names & folders, place
        assert not names & set(sys.stdlib_module_names), place


def test_no_lazy_annotations_where_dagster_reads_them():
    """Dagster resolves the types of assets and Config when they are defined."""
    for path in MODULES:
        if part_of(path) in DAGSTER:
            assert not any(name == "__future__.annotations" for name, _ in imports_of(path)), path


@pytest.mark.parametrize("path", MODULES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_modules_stay_readable(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 600
    assert path.stem not in ("utils", "helpers", "common", "misc")
    assert ast.get_docstring(ast.parse(text)), "a module says what it is for"
    unfinished = "|".join(("TO" + "DO", "FIX" + "ME", "X" + "XX", "NotImplemented" + "Error"))
    assert not re.search(rf"\b({unfinished})\b", text)


def tracked() -> list[Path]:
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    files = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in files if path.is_file() and not path.is_symlink()]


def test_no_path_of_a_machine_and_no_package_index_in_any_file():
    """Patterns are spelled in pieces, so that this file does not match itself."""
    places = ("work", "home", "Users", "root", "mnt", "workspace")
    machine = rf"(?<![\w.}}:/-])/({'|'.join(places)})/\w"
    hosts = rf"(?i)({'index'}[-_]url|{'arti'}factory|{'dev'}pi|\w\.{'internal'}\b|{'trusted'}-host)"
    address = rf"https?://(?!127\.0\.0\.1|0\.0\.0\.0)\d+\.\d+\.\d+\.\d+{''}"
    secret = rf"(hf_{'[A-Za-z0-9]'}{{20,}}|BEGIN [A-Z ]*PRIVATE {'KEY'}|://[^/\s:@]+:[^/\s@]+@)"
    found = []
    files = tracked()
    assert len(files) > 100
    for path in files:
        if path.suffix in (".png", ".parquet", ".arrow", ".gz"):
            continue
        for number, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if any(re.search(p, text) for p in (machine, hosts, address, secret)):
                found.append(f"{path.relative_to(ROOT)}:{number}: {text.strip()[:100]}")
    assert not found, "\n".join(found)


SANDBOXED = "scoring/verifiers/sandboxed.py"
"""Runs inside the sandbox, and only there: executing a response is what it is for."""


def test_no_pickle_eval_or_shell_in_the_package():
    for path in MODULES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for name, _ in imports_of(path):
            assert name.partition(".")[0] not in ("pickle", "marshal", "shelve"), path
        sandboxed = path.relative_to(PACKAGE).as_posix() == SANDBOXED
        for node in ast.walk(tree):
            if isinstance(node, ast.Name) and not sandboxed:
                assert node.id not in ("eval", "exec"), f"{path}:{node.lineno}"
            if not isinstance(node, ast.Call):
                continue
            for word in node.keywords:
                shell = word.arg == "shell" and getattr(word.value, "value", True) is not False
                assert not shell, f"{path}:{node.lineno}"


# README


def readme() -> str:
    return (ROOT / "README.md").read_text(encoding="utf-8")


def contributing() -> str:
    return (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_readme_says_what_this_is():
    text = readme()
    assert len(text) > 2000
    assert "siftline demo" in text
    assert "dagster" in text.lower()


def tree_paths(text: str) -> list[str]:
    """Paths that a file tree drawn with box characters names, below the folder above it."""
    paths: list[str] = []
    above: list[str] = []
    base, start = "", None
    for line in text.splitlines():
        at = max(line.find("├──"), line.find("└──"))
        if at < 0:
            if "│" not in line:
                base, start = line.strip(), None
            continue
        start = at if start is None else start
        depth = (at - start) // 4
        names = re.split(r"\s{2,}|\s#", line[at + 3 :].strip())[0].split()
        above = [*above[:depth], names[0].rstrip("/")]
        root = base if re.fullmatch(r"[\w./-]+/", base) else ""
        paths += [root + "/".join([*above[:depth], name.rstrip("/")]) for name in names]
    return paths


def test_file_trees_name_existing_files_and_all_of_the_package():
    drawn = "  src/\n  ├── a/  what\n  │   ├── b.py\n  │   └── c/\n  │       └── d\n  └── e  f"
    assert tree_paths(drawn) == ["src/a", "src/a/b.py", "src/a/c", "src/a/c/d", "src/e"]
    assert tree_paths("Files:\n\n├── a b\n└── c") == ["a", "b", "c"]
    drawn_paths = tree_paths(contributing())
    missing = [path for path in (*tree_paths(readme()), *drawn_paths) if not (ROOT / path).exists()]
    assert not missing
    there = {f"src/siftline/{p.name}" for p in PACKAGE.iterdir() if p.name != "__pycache__"}
    assert there <= set(drawn_paths), "the tree of CONTRIBUTING.md lacks some"


def test_links_of_the_readme_lead_to_files():
    targets = re.findall(r"\]\((?!https?:|#)([^)#\s]+)", readme())
    missing = [target for target in targets if not (ROOT / target).exists()]
    assert not missing
    assert len(targets) > 20


def verbs(group: click.Group, prefix: str = "") -> list[tuple[str, click.Command]]:
    """Every command with its full name, those of groups included."""
    found = []
    context = click.Context(group)
    for name in group.list_commands(context):
        command = group.get_command(context, name)
        assert command is not None, name
        found.append((prefix + name, command))
        if isinstance(command, click.Group):
            found += verbs(command, f"{prefix}{name} ")
    return found


def test_every_verb_has_help_and_stands_in_the_readme():
    from siftline.cli import cli

    assert cli.help
    listed = verbs(cli)
    assert {"run", "demo", "status", "explain", "report", "ui"} <= {name for name, _ in listed}
    text = readme()
    for name, command in listed:
        assert command.help, name
        assert command.help.strip().endswith("."), f"{name}: {command.help!r}"
        for parameter in command.params:
            documented = isinstance(parameter, click.Argument) or parameter.help
            assert documented or parameter.name in ("port", "host"), f"{name} --{parameter.name}"
        assert re.search(rf"siftline {re.escape(name)}\b", text), f"README lacks siftline {name}"


def test_the_readme_names_no_verb_that_is_not_there():
    from siftline.cli import cli

    known = {name.split()[0] for name, _ in verbs(cli)}
    code = re.findall(r"```[a-z]*\n(.*?)```", readme(), flags=re.S)
    named = {m for block in code for m in re.findall(r"^\$?\s*siftline ([a-z]+)", block, re.M)}
    assert {"run", "explain"} <= named <= known
