"""What a process loads before it works: the table of verbs, heavy modules, kernels found again."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from siftline.cli import VERBS, cli
from siftline.kernels import machine

TESTS = Path(__file__).parent
SOURCES = TESTS.parent / "src"

MODELS = {"torch", "transformers", "trl", "peft", "sentence_transformers", "vllm"}
HEAVY = {
    *MODELS,
    *("dagster", "datasets", "faiss", "httpx", "jinja2", "matplotlib", "numba", "numpy"),
    *("pandas", "polars", "pyarrow", "pydantic", "rich", "scipy", "sklearn", "spacy", "yaml"),
}
TABLES = {"numpy", "polars", "pyarrow"}
# pyarrow looks for pandas wherever a list becomes a column, and takes it where it is installed.
ROWS = {*TABLES, "pandas", "yaml"}
# What transformers loads for any model.
MODEL = {*ROWS, "accelerate", "jinja2", "rich", "scipy", "sklearn", "torch", "transformers"}
SHORT = ("--max-new-tokens", "4")
DAGSTER = {*TABLES, "dagster", "pydantic", "rich", "yaml"}
# A recipe is read, and options of --set: pydantic checks them (0.15 s).
RECIPE = {*TABLES, "pydantic", "yaml"}

# What each call may load. A verb that is not here has a line of its own below: it works on a root
# with rows in it, and is called where such a root is at hand.
CALLS: dict[str, tuple[list[str], set[str]]] = {
    "list of verbs": (["--help"], set()),
    **{f"{verb} --help": ([verb, "--help"], set()) for verb in VERBS},
    "cache ls --help": (["cache", "ls", "--help"], set()),
    "score --help": (["score", "--help"], set()),
    "dedup": (["dedup", "ten.parquet", "--out", "texts"], {"numpy", "pyarrow"}),
    "status": (["status", "--root", "."], RECIPE),
    "cache ls": (["cache", "ls", "--root", "."], TABLES),
    "explain": (["explain", "0123456789", "--root", "."], RECIPE),
    "report": (["report", "s3ft", "--root", "."], RECIPE),
    "audit": (["audit", "s3ft", "--stage", "duplicates", "--root", "."], RECIPE),
    "select": (["select", "random", "ten.parquet", "--budget", "3", "--out", "three"], ROWS),
    "score": (["score", "qa.jsonl", "--model", "model", "--out", "scores"], MODEL),
    "train": (
        ["train", "qa.jsonl", "--model", "model", "--out", "tuned", "--set", "epochs=1"],
        {*MODEL, "datasets", "matplotlib", "peft", "pydantic", "trl"},
    ),
    "eval": (
        ["eval", "model", "qa.jsonl", "--field", "answer=answer", "--out", "graded", *SHORT],
        {*MODEL, "matplotlib"},
    ),
    "run": (
        ["run", "light.yaml", "--root", "light"],
        {*ROWS, *DAGSTER, "jinja2", "matplotlib", "numba", "scipy"},
    ),
    "run again": (["run", "light.yaml", "--root", "light"], DAGSTER),
}

# One process takes all calls, each in a child forked before anything heavy was there.
ASK = """
import json, os, sys
from siftline.cli import main
heavy = set(json.loads(sys.argv[1]))
for name, arguments in json.load(sys.stdin).items():
    reader, writer = os.pipe()
    if (child := os.fork()) == 0:
        out = os.open(os.devnull, os.O_WRONLY)
        os.dup2(out, 1)
        os.dup2(out, 2)
        try:
            main(arguments)
        except SystemExit:
            pass
        loaded = {module.partition(".")[0] for module in sys.modules} & heavy
        os.write(writer, json.dumps(sorted(loaded)).encode())
        os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as answer:
        print(json.dumps([name, json.loads(answer.read())]), flush=True)
    os.waitpid(child, 0)
"""


def python(*arguments: str, cwd: Path, env: dict[str, str] | None = None, **given):
    """Another Python on this source."""
    known = {**os.environ, "PYTHONPATH": str(SOURCES), **(env or {})}
    command = [sys.executable, *arguments]
    return subprocess.run(
        command, cwd=cwd, env=known, capture_output=True, text=True, check=True, **given
    )


LIGHT = """
name: light
pool: {name: rows, inputs: [{path: qa.jsonl}]}
models: {base: {path: model}}
stages: [duplicates, verify]
budget: {unit: rows, size: 4}
"""


@pytest.fixture(scope="module")
def ten(tmp_path_factory, tiny_model):
    """A folder with ten texts, two of which are copies, questions, a model and an empty store."""
    folder = tmp_path_factory.mktemp("ten")
    (folder / "model").symlink_to(tiny_model)
    (folder / "light.yaml").write_text(LIGHT)
    rows = [
        {"prompt": f"{k} + {k}?", "response": f"It is {2 * k}.", "answer": 2 * k} for k in range(8)
    ]
    (folder / "qa.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = [f"text {k} says what no other of them says: {k * k} and {k**3}" for k in range(8)]
    texts += [texts[3], texts[4] + "!"]
    pq.write_table(pa.table({"text": texts}), folder / "ten.parquet")
    (folder / "store").mkdir()
    return folder


def test_each_call_loads_what_it_may(ten):
    asked = json.dumps({name: arguments for name, (arguments, _) in CALLS.items()})
    # A first call compiles, where nobody did before: what that loads is not what a verb needs.
    python("-m", "siftline.cli", "dedup", "ten.parquet", "--out", "first", cwd=ten)
    done = python("-c", ASK, json.dumps(sorted(HEAVY)), cwd=ten, input=asked)
    loaded = dict(json.loads(line) for line in done.stdout.splitlines())
    assert set(loaded) == set(CALLS)
    made = ("texts/data", "three/data", "scores/scores.parquet", "tuned/config.json")
    made = (*made, "graded/accuracy.csv", "light/curated/light/latest")
    assert not [name for name in made if not (ten / name).exists()], "the calls must have worked"
    more = {name: sorted({*loaded[name]} - allowed) for name, (_, allowed) in CALLS.items()}
    assert not {name: modules for name, modules in more.items() if modules}


def test_the_package_itself_loads_nothing(tmp_path):
    code = "import sys, siftline, siftline.cli; print(*{m.partition('.')[0] for m in sys.modules})"
    done = python("-c", code, cwd=tmp_path)
    assert not HEAVY & set(done.stdout.split())


def test_the_table_of_verbs_says_what_they_say():
    context = click.Context(cli)
    assert cli.list_commands(context) == sorted(VERBS)
    for name, verb in VERBS.items():
        command = cli.get_command(context, name)
        assert command is not None
        assert command.name == name
        # The whole first sentence, however long.
        assert verb.help.removesuffix(".") == command.get_short_help_str(10_000).removesuffix(".")
    assert cli.get_command(context, "no-such-verb") is None


def test_every_verb_of_the_folder_is_in_the_table():
    """A module's command that belongs to no group of it is a verb."""
    from importlib import import_module

    found = set()
    for file in (SOURCES / "siftline" / "cli").glob("[!_]*.py"):
        module = import_module(f"siftline.cli.{file.stem}")
        groups = [c for c in vars(module).values() if isinstance(c, click.Group)]
        below = {c for group in groups for c in group.commands.values()}
        found |= {
            (file.stem, name)
            for name, c in vars(module).items()
            if isinstance(c, click.Command) and c not in below
        }
    assert found == {(verb.module, verb.name) for verb in VERBS.values()}


# ---- kernels that are found again ----------------------------------------------------------------

SHARED = """
import sys
import numpy as np
from siftline.kernels.sets.groups import shared
rows, groups, found = shared(np.array([5, 0, 7, 5, 0, 7, 9], np.uint64))
print(rows.tolist(), groups.tolist(), found, "numba" in sys.modules)
"""
ANSWER = "[0, 2, 3, 5] [0, 1, 0, 1] 2"


def test_a_kernel_is_made_once_and_found_by_the_next_process(tmp_path):
    env = {"NUMBA_CACHE_DIR": str(tmp_path)}
    said = [python("-c", SHARED, cwd=tmp_path, env=env).stdout.strip() for _ in range(2)]
    assert said == [f"{ANSWER} True", f"{ANSWER} False"]
    (code,) = tmp_path.glob("shared-*.o")
    whole = code.read_bytes()
    code.write_bytes(whole[: len(whole) // 2])  # a disk that ran full
    assert python("-c", SHARED, cwd=tmp_path, env=env).stdout.strip() == f"{ANSWER} True"
    assert code.read_bytes() == whole


def test_a_folder_that_can_not_be_written_is_passed_over(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(blocked / "below"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    machine.write("some.bin", b"content")
    assert machine.read("some.bin") == b"content"
    assert [p.name for p in (tmp_path / "user" / "siftline").iterdir()] == ["some.bin"]
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    machine.write("other.bin", b"content")  # nowhere: nothing is kept, nothing breaks
    assert machine.read("other.bin") is None


def test_what_is_kept_is_what_was_computed(tmp_path, monkeypatch):
    monkeypatch.setenv("NUMBA_CACHE_DIR", str(tmp_path))
    calls = []

    def squares() -> tuple[np.ndarray, ...]:
        calls.append(1)
        return np.arange(5) ** 2, np.array([True, False])

    first, again = machine.kept()(squares)(), machine.kept()(squares)()
    assert len(calls) == 1
    for one, other in zip(first, again, strict=True):
        assert one.dtype == other.dtype
        assert one.tolist() == other.tolist()


def test_kernels_take_no_array_with_gaps():
    with pytest.raises(AssertionError, match="C-contiguous"):
        machine.Kernel("siftline.kernels.sets.group_loops", "among")(np.zeros(4, np.uint64)[::2])


def test_what_a_kernel_was_made_for_is_in_its_name(monkeypatch):
    name = machine._hash("module", ("<u8", 1), machine._processor())
    assert name == machine._hash("module", ("<u8", 1), machine._processor())
    assert name != machine._hash("module", ("<u4", 1), machine._processor())
    assert name != machine._hash("module", ("<u8", 1), ("another", "+none"))
