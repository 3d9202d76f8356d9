"""Bad input through the command line: one clear line, an exit status, nothing committed is lost."""

import json
import subprocess
import sys

import polars as pl
import pytest

SHELL = """
import contextlib, io, json, sys
from siftline.cli import main

for line in sys.stdin:
    out, err, code = io.StringIO(), io.StringIO(), 0
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main(json.loads(line))
        except SystemExit as ended:
            code = ended.code
    print(json.dumps([code, out.getvalue(), err.getvalue()]), flush=True)
"""
"""Runs one command line after another in one process, to import once instead of fifteen times.
Every step is a process of its own all the same."""

GOOD = {"question": "What is one plus two?", "response": "#### 3", "answer": "3"}
COLUMNS = {"question": "question", "response": "response", "answer": "answer"}
DEFAULT = {"layout": "question_answer", "columns": COLUMNS}


def lines(*rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def half_a_parquet(folder):
    pl.DataFrame([GOOD] * 1000).write_parquet(folder / "whole.parquet")
    raw = (folder / "whole.parquet").read_bytes()
    return raw[: len(raw) // 2]


def numbers_in_parquet(folder):
    frame = pl.DataFrame({"question": [1.5, 2.5], "response": [[1], [2]], "answer": ["1", "2"]})
    frame.write_parquet(folder / "numbers.parquet")
    return (folder / "numbers.parquet").read_bytes()


POOLS = {
    "empty_file": ("rows.jsonl", lambda at: b"", ["rows.jsonl", "empty"]),
    "no_readable_row": ("rows.jsonl", lambda at: b"{\nnot json\n]\n", ["no readable row"]),
    "missing_column": (
        "rows.jsonl",
        lambda at: lines({"question": "Why?", "reply": "So."}),
        ["rows.jsonl", "response", "reply"],
    ),
    "wrong_type": ("rows.parquet", numbers_in_parquet, ["no readable row", "rows.parquet"]),
    "invalid_utf8": (
        "rows.jsonl",
        lambda at: lines(GOOD) + b'{"question": "\xff\xfe", "response": "x"}\n',
        ["1 of 2 input rows can't be read", "rows.jsonl line 2", "utf8"],
    ),
    "half_a_parquet": ("rows.parquet", half_a_parquet, ["rows.parquet"]),
    "no_such_file": (None, None, ["rows.jsonl"]),
}
"""Per case: name of the file, its bytes, and what the error must name."""


def recipe(name, path, **changes):
    return {
        "name": name,
        "pool": {"name": name, "buckets": 1, "inputs": [{"path": str(path), **DEFAULT}]},
        "models": {f"model_{name}": {"path": str(path.parent / "no-model")}},
        "stages": ["duplicates"],
        "budget": {"unit": "rows", "size": 1},
        **changes,
    }


def write_recipes(folder):
    """Files and recipes of every case."""
    recipes = []
    for name, (file, content, _) in POOLS.items():
        at = folder / name
        at.mkdir()
        if file:
            (at / file).write_bytes(content(at))
        recipes.append(recipe(name, at / (file or "rows.jsonl")))
    good = folder / "good"
    good.mkdir()
    (good / "rows.jsonl").write_bytes(lines(GOOD))
    recipes.append(recipe("no_model", good / "rows.jsonl"))
    leaked = recipe("all_leaked", good / "rows.jsonl", bounds={"max_removed": 1.0})
    leaked["sets"] = {"test": [{**leaked["pool"], "name": "all_leaked_test"}]}
    leaked["stages"] = ["decontamination", "duplicates"]
    recipes.append(leaked)
    home = folder / "recipes"
    home.mkdir()
    for made in recipes:
        (home / f"{made['name']}.yaml").write_text(json.dumps(made))
    return home


@pytest.fixture(scope="module")
def root(finished, mini_tools, tmp_path_factory):
    return mini_tools.copy_root(finished.root, tmp_path_factory.mktemp("bad") / "root")


@pytest.fixture(scope="module")
def call(root, mini_tools, tmp_path_factory):
    """`call(*arguments)` on a root with committed data: exit status, stdout, stderr."""
    home = write_recipes(tmp_path_factory.mktemp("cases"))
    folders = f"{mini_tools.RECIPES}:{home}"
    shell = subprocess.Popen(
        [sys.executable, "-c", SHELL],
        env=mini_tools.mini_environment(SIFTLINE_RECIPES=folders),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def run(*arguments):
        shell.stdin.write(json.dumps([*arguments, "--root", str(root)]) + "\n")
        shell.stdin.flush()
        return json.loads(shell.stdout.readline())

    yield run
    shell.stdin.close()
    assert shell.wait(60) == 0


@pytest.fixture
def error(call, root, mini_tools):
    """`error(*arguments)` is the one line of a refusal that left what was committed alone."""

    def run(*arguments):
        before = mini_tools.snapshot(root)
        code, out, err = call(*arguments)
        after = mini_tools.snapshot(root)
        # A stamp says when a namespace was last looked into; nothing is committed in it.
        committed = {name for name in before if not name.endswith("/used")}
        assert {n: after.get(n) for n in committed} == {n: before[n] for n in committed}
        assert code == 1, (out, err)
        assert out == ""
        assert "Traceback" not in err
        last = err.splitlines()[-1]
        assert last.startswith("error: ")
        return last

    return run


@pytest.mark.parametrize("case", POOLS)
def test_unreadable_pools(case, error, root):
    said = error("run", case, "--select", f"pool/{case}")
    for part in POOLS[case][2]:
        assert part in said, said
    assert not (root / "pool" / case / "manifest.json").exists()


def test_a_model_that_is_not_there(error):
    said = error("run", "no_model", "--select", "+scores/no_model/model_no_model/likelihood")
    assert "no-model" in said


def test_an_empty_selection(error):
    said = error("run", "all_leaked", "--select", '+key:"all_leaked/duplicates"')
    assert "all_leaked/duplicates: no rows are left to judge: loosen a gate" in said


def test_an_unknown_recipe_key(error):
    assert "unknown key 'buget': did you mean 'budget'?" in error("run", "mini", "--set", "buget=1")


def test_a_budget_above_the_pool(error, call):
    # The shortlist goes by the budget too, if it has no size: everything from there on runs again.
    few = ["--set", "stages.diversity.size=10"]
    select = [*few, "--set", "budget.size=9000000", "--select", '7+key:"mini/allocate"']
    said = error("run", "mini", "--set", "budget.on_shortfall=error", *select)
    assert "9000000" in said.replace(",", "")
    code, _, err = call("run", "mini", "--set", "budget.on_shortfall=smaller", *select)
    assert code == 0, err


def test_a_check_that_fails_says_which(error):
    changes = ["--set", "bounds.max_removed=0.01", "--select", "mini/duplicates"]
    said = error("run", "mini", *changes)
    assert "check mini/duplicates removed_rows failed" in said


def test_rows_that_fail_turn_the_run_red(error):
    changes = ["--set", "models.tiny.max_length=150"]
    said = error("run", "mini", *changes, "--select", "mini/likelihood")
    assert "check mini/likelihood failed_rows failed" in said
    assert "too_long" in said
