"""Fixtures several test files share. Heavy imports stay inside, so light tests stay quick."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from filelock import FileLock
from hypothesis import settings

# Machines are shared: how long one example takes says nothing.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")
# One test process a core: a second thread gains nothing, and spins for long beside other work.
for _threads in ("OMP_NUM_THREADS", "POLARS_MAX_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_threads, "1")


def beside(name: str) -> ModuleType:
    """A module of this folder or of one below it."""
    known = f"siftline_tests_{name}"
    if known not in sys.modules:
        (file,) = Path(__file__).parent.rglob(f"{name}.py")
        spec = importlib.util.spec_from_file_location(known, file)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[known] = module
        spec.loader.exec_module(module)
    return sys.modules[known]


@pytest.fixture(scope="session")
def tiny() -> ModuleType:
    """The module tests/tiny.py: `make_model(folder, ...)` and `make_tokenizer(...)`.

    Loaded by file, because --import-mode=importlib keeps tests/ off sys.path.
    """
    return beside("tiny")


@pytest.fixture(scope="module")
def tokenizer(tiny: ModuleType) -> Any:
    """The tiny tokenizer with the question-and-answer template."""
    from siftline.scoring.templates import QUESTION_ANSWER

    made = tiny.make_tokenizer()
    made.chat_template = QUESTION_ANSWER
    return made


@pytest.fixture(scope="session")
def scripted() -> ModuleType:
    """The module tests/scripted.py: models that answer by a script."""
    return beside("scripted")


@pytest.fixture(scope="session")
def make_version() -> Callable[..., Path]:
    """`make_version(root, [table, ...], identity={})` writes `root/<version>` and `root/latest`."""
    import json

    import pyarrow as pa
    import pyarrow.parquet as pq

    from siftline.rows.published import version_of
    from siftline.rows.shards import point_latest
    from siftline.rows.verified import file_hash

    def make(root: Path, tables: list[pa.Table], identity: dict[str, Any] | None = None) -> Path:
        draft = root / ".draft"
        (draft / "data").mkdir(parents=True)
        files = []
        for number, table in enumerate(tables):
            name = f"data/train-{number:05d}-of-{len(tables):05d}.parquet"
            pq.write_table(table, draft / name)
            entry = {"sha256": file_hash(draft / name), "bytes": (draft / name).stat().st_size}
            files.append({"path": name, "rows": table.num_rows, **entry})
        body = {"format": 1, "identity": identity or {}, "files": files}
        version = version_of(body)
        (draft / "manifest.json").write_text(json.dumps({"version": version, **body}))
        draft.rename(root / version)
        point_latest(root, version)
        return root / version

    return make


@pytest.fixture(scope="session")
def tiny_model(tiny: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model directory with a random 50,000-parameter Llama and a byte-level tokenizer.

    Shared by the session: read only. A test that changes files makes its own with `tiny`.
    """
    folder: Path = tiny.make_model(tmp_path_factory.mktemp("tiny") / "model")
    return folder


# ---- the mini recipe: the whole chain through the real command line, once a session ----------

RECIPES = Path(__file__).with_name("recipes")
GUARD = """
import os, sys

def deny(event, args):
    if event == "open" and os.sep + "truth" + os.sep in os.fspath(args[0] or ""):
        with open(os.environ["SIFTLINE_TEST_CAUGHT"], "a") as log:
            log.write(args[0] + "\\n")
        raise PermissionError(f"the truth is off limits: {args[0]}")

def hook(event, args):
    if event == "open" and args and isinstance(args[0], (str, os.PathLike)):
        deny(event, args)

sys.addaudithook(hook)
"""
"""Python runs this at the start of every process that finds it on PYTHONPATH as sitecustomize."""


@dataclass(frozen=True)
class Guarded:
    """An environment in which no process may open a path below a folder named truth."""

    environment: dict[str, str]
    caught: Path


@dataclass(frozen=True)
class Finished:
    """A root that `siftline run mini` filled, with what the command said; read only."""

    root: Path
    said: "subprocess.CompletedProcess[str]"
    truth: Path


def mini_environment(*more_python: Path, **changes: str) -> dict[str, str]:
    """Environment in which a child finds the mini recipe and its generator."""
    known = os.environ.get("PYTHONPATH")
    python = os.pathsep.join([*map(str, (*more_python, RECIPES)), *([known] if known else [])])
    return os.environ | {
        "PYTHONPATH": python,
        "SIFTLINE_RECIPES": str(RECIPES),
        "OMP_WAIT_POLICY": "PASSIVE",
        **changes,
    }


def siftline(
    *arguments: object, environment: dict[str, str] | None = None, timeout: float = 500
) -> "subprocess.CompletedProcess[str]":
    """Runs the command line in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "siftline.cli", *map(str, arguments)],
        env=environment or mini_environment(),
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def snapshot(root: Path) -> dict[str, tuple[int, int, int]]:
    """Inode, modification time and size of every file below `root` but Dagster's own."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = path.relative_to(root)
        if path.is_file() and name.parts[0] != ".dagster":
            stat = path.stat()
            found[str(name)] = (stat.st_ino, stat.st_mtime_ns, stat.st_size)
    return found


def tree_bytes(folder: Path) -> dict[str, str]:
    """sha256 of every file below a folder, and where links point."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        elif path.is_file():
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    assert found, f"nothing below {folder}"
    return found


def copy_root(source: Path, target: Path, *parts: str) -> Path:
    """Copies folders of a root (all but Dagster's by default) to a new one."""
    names = parts or [p.name for p in source.iterdir() if p.name != ".dagster"]
    for name in names:
        shutil.copytree(source / name, target / name, symlinks=True)
    return target


def run_chain(root: Path, recipe: Any, until: str | None = None) -> list[tuple[str, Any, bool]]:
    """Does what the assets do, in this process, up to the curated version or the stage `until`.

    Returns:
        (stage, output, computed now) for every stage that was run.
    """
    from siftline.assets.shared import build, generate_inputs, score, train_base
    from siftline.stages.publish import publish_curated
    from siftline.stages.run import run_stage
    from siftline.workspace import Workspace

    def quiet(line: str) -> None: ...

    workspace = Workspace(root)
    if recipe.inputs is not None:
        generate_inputs(workspace, recipe)
    for spec in (recipe.pool, *(spec for _, spec in recipe.sets.items())):
        build(workspace, recipe, spec.name, quiet)
    for name, model in recipe.models.items():
        if model.pretrain is not None:
            train_base(workspace, recipe, name, quiet)
    score(workspace, recipe, quiet)
    done = []
    for stage in recipe.stages:
        output, fresh = run_stage(workspace, recipe, stage.name, quiet)
        done.append((stage.name, output, fresh))
        if stage.name == until:
            return done
    publish_curated(workspace, recipe)
    return done


@pytest.fixture(scope="session")
def mini_tools() -> ModuleType:
    """This module's functions, for tests that can't import conftest."""
    return sys.modules[__name__]


def once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that all test processes read: the first that asks makes it, the others wait."""
    base = factory.getbasetemp()
    shared = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{shared}.lock"):
        if not (shared / "made").exists():
            shared.mkdir()  # fails where another process died over it
            make(shared)
            (shared / "made").touch()
    return shared


@pytest.fixture(scope="session")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Guarded:
    """Forbids the truth to every process that is started with this environment."""

    def make(folder: Path) -> None:
        (folder / "sitecustomize.py").write_text(GUARD, encoding="utf-8")

    folder = once(tmp_path_factory, "guard", make)
    caught = folder / "caught"
    return Guarded(mini_environment(folder, SIFTLINE_TEST_CAUGHT=str(caught)), caught)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, guarded: Guarded) -> Finished:
    """`siftline run mini`, once: the truth is out of the root before the run and off limits."""

    def make(folder: Path) -> None:
        root = folder / "root"
        made = siftline("run", "mini", "--root", root, "--select", "inputs/mini")
        assert made.returncode == 0, made.stderr
        shutil.move(root / "truth", folder / "truth")
        said = siftline("run", "mini", "--root", root, "--json", environment=guarded.environment)
        assert said.returncode == 0, said.stderr[-4000:]
        (folder / "said.json").write_text(json.dumps([said.args, said.stdout, said.stderr]))

    folder = once(tmp_path_factory, "finished", make)
    args, out, err = json.loads((folder / "said.json").read_text())
    said = subprocess.CompletedProcess(args, 0, out, err)
    return Finished(folder / "root", said, folder / "truth")


@pytest.fixture
def mini(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """`mini(*overrides)` is the recipe, in a process that finds it; with its generator."""
    from siftline.recipe.parse import find

    monkeypatch.setenv("SIFTLINE_RECIPES", str(RECIPES))
    monkeypatch.syspath_prepend(str(RECIPES))
    return lambda *overrides: find("mini", overrides)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Counts the rows that the transformers engine is asked for, by method."""
    from siftline.scoring.engines.transformers_engine import TransformersEngine

    counts: dict[str, int] = {}

    def counting(name: str) -> Callable[..., Any]:
        original = getattr(TransformersEngine, name)

        def asked(self: Any, rows: Any, *rest: Any, **named: Any) -> Any:
            counts[name] = counts.get(name, 0) + len(rows)
            return original(self, rows, *rest, **named)

        return asked

    for name in ("score", "inspect", "choices", "generate", "embed"):
        monkeypatch.setattr(TransformersEngine, name, counting(name))
    return counts


@pytest.fixture
def small_disk(tmp_path):
    """A real file system of 1 MiB that a test can fill."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    for _ in range(50):  # Arrow's threads let go of a file a moment after it was read
        if not subprocess.run(["umount", str(folder)], capture_output=True).returncode:
            return
        time.sleep(0.1)
    held = [os.readlink(f) for f in Path("/proc/self/fd").iterdir() if os.path.lexists(f)]
    subprocess.run(["umount", "--lazy", str(folder)], check=True)
    pytest.fail(f"files are still open: {[f for f in held if f.startswith(str(folder))]}")


# ---- several test processes --------------------------------------------------------------------

VLLM = ("test_agreement", "test_two_workers", "test_vllm_engine", "test_vllm_server")
"""Files that start vLLM: two engines at a time take more memory than there is."""
FIRST = ("test_agreement", "test_chain", "test_vllm_engine", "test_faults", "test_vllm_server")
"""Files that begin first, so that no process works alone at the end."""


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the longest files first; xdist hands files out in this order."""
    place = {name: k for k, name in enumerate(FIRST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(FIRST)))  # stable


@pytest.fixture(scope="module", autouse=True)
def one_vllm(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[None]:
    """Holds a file that starts vLLM back while another one runs."""
    if request.path.stem not in VLLM:
        yield
        return
    base = tmp_path_factory.getbasetemp()
    with FileLock((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "vllm.lock"):
        yield


MOST_OF_ALL = 0.25
"""Share of the fast suite's time that one file may take; a longer one keeps a core busy alone.
Make it quicker, split it, or mark what is long `slow`."""
WHOLE = 100
"""Files that a run of the suite has at least; a smaller run has no shares to speak of."""
_spent: dict[str, float] = {}


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Adds up the seconds of each file."""
    name = report.nodeid.partition("::")[0]
    _spent[name] = _spent.get(name, 0.0) + report.duration


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a run of the whole suite in which one file takes too large a share."""
    if len(_spent) >= WHOLE and _too_long() and not hasattr(session.config, "workerinput"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Names that file."""
    if len(_spent) >= WHOLE and _too_long():
        terminalreporter.write_line(f"one file takes too much of the time: {_too_long()}", red=True)


def _too_long() -> str | None:
    longest = max(_spent, key=_spent.__getitem__)
    share = _spent[longest] / max(sum(_spent.values()), 1.0)
    return f"{longest}, {100 * share:.0f} %" if share > MOST_OF_ALL else None
