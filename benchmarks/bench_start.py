"""What it takes to start: imports, help, verbs on ten rows, a run in which nothing is to be done.

    .venv/bin/python benchmarks/bench_start.py [--repeats 5] [--runs 3] [--only WORD...] [--json]
    .venv/bin/python benchmarks/bench_start.py --rensa PYTHON --texts FILE.jsonl...

Processor seconds (user and system) of the whole process tree, and wall seconds: medians of rounds
in which all take turns, after one that is not counted. Processes that a child leaves behind are
adopted and counted when they end (Linux). Byte code is written (PYTHONDONTWRITEBYTECODE is taken
away). The last column is the processor time in imports of `dagster, polars, pyarrow`.

"first run" and "nothing to do" are `siftline run` on 4,000 rows with a recipe of five light assets
that asks no model: pool, duplicates, a random draw of rows, the curated version, the report.

--ui: both again, launched by GraphQL through `siftline ui` (web server, daemon, code server), as
its Launchpad does: what all its processes spend from the launch until the run has succeeded.

--rensa: file to files on 71,140 documents (108 MB) joined of the texts as in `bench_dedup.py`,
`siftline dedup` beside `rensa_files.py` run by PYTHON, which has rensa 0.5, pyarrow and numpy.
"""

import argparse
import ctypes
import json
import os
import platform
import random
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path

IMPORTS = {
    name: ["-c", name]
    for name in (
        "import dagster",
        "import dagster, polars, pyarrow",
        "import polars, pyarrow, numba",
        "import siftline",
        "import siftline.definitions",
    )
}
MEASURE = "import dagster, polars, pyarrow"
DOCUMENTS, SIZES = 71_140, (200, 2520)
RECIPE = """
name: light
pool:
  name: light
  inputs:
    - {path: POOL, layout: question_answer, columns: {question: question, response: response}}
models:
  target: {path: no-model-is-asked}
stages:
  - duplicates
  - select: {method: random}
budget: {unit: rows, size: 500, on_shortfall: smaller}
"""
PR_SET_CHILD_SUBREAPER = 36


def adopt():
    """Orphans below this process become its children, so that their time can be asked."""
    failed = ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    assert not failed, "prctl"


def spent(command, folder, env):
    """Processor and wall seconds of a command with all that it starts."""
    start = time.perf_counter()
    said = folder / "said.txt"
    with said.open("wb") as out:
        process = subprocess.Popen(command, cwd=folder, env=env, stdout=out, stderr=out)
        cpu, status, wall = 0.0, None, 0.0
        while True:
            try:
                pid, code, usage = os.wait4(-1, 0)
            except ChildProcessError:
                break
            cpu += usage.ru_utime + usage.ru_stime
            if pid == process.pid:
                status, wall = code, time.perf_counter() - start
                process.returncode = code
    if status:
        raise SystemExit(f"{' '.join(command)}: {said.read_text()[-2000:]}")
    return cpu, wall


def prepare(folder):
    """Ten rows, and a recipe with 4,000."""
    draw = random.Random(0)
    words = [a + b for a in "ba ce di fo gu ha je ki lo mu na pe".split() for b in "rnstly"]  # noqa: SIM905

    def rows(n):
        for _ in range(n):
            row = {"question": " ".join(draw.choices(words, k=20))}
            row["response"] = " ".join(draw.choices(words, k=40))
            yield row | {"text": " ".join(row.values())}

    for name, n in (("ten", 10), ("pool", 4000)):
        lines = (json.dumps(row) + "\n" for row in rows(n))
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "light.yaml").write_text(RECIPE.replace("POOL", str(folder / "pool.jsonl")), "utf-8")
    import polars as pl

    pl.read_ndjson(folder / "ten.jsonl").write_parquet(folder / "ten.parquet")
    (folder / "store").mkdir()


def verbs():
    """Calls of the command line, and whether they take as long as a run."""
    from siftline.cli import VERBS

    known = {"siftline --help": ["--help"]}
    known |= {f"siftline {verb} --help": [verb, "--help"] for verb in VERBS}
    known |= {
        "dedup, ten texts (Parquet)": [
            "dedup",
            "ten.parquet",
            "--text-column",
            "text",
            "--out",
            "OUT",
        ],
        "dedup, ten texts (JSONL)": ["dedup", "ten.jsonl", "--text-column", "text", "--out", "OUT"],
        "dedup, ten conversations": ["dedup", "ten.parquet", "--out", "OUT"],
        "select random, ten rows": ["select", "random", "ten.jsonl", "--budget", "3", "--out"],
        "cache ls, empty": ["cache", "ls", "--root", "."],
        "status, empty": ["status", "--root", "."],
    }
    known["select random, ten rows"].append("OUT")
    return {name: ["-m", "siftline.cli", *arguments] for name, arguments in known.items()}


def on_a_root():
    """First run, run again, and the verbs on the root that they leave."""
    rooted = {
        "first run, 4,000 rows": ["run", "light.yaml"],
        "nothing to do, five light assets": ["run", "light.yaml"],
        "status, one recipe": ["status"],
        "report": ["report", "light.yaml"],
        "explain": ["explain", "pool.jsonl:1", "--recipe", "light.yaml"],
    }
    return {
        name: ["-m", "siftline.cli", *arguments, "--root", "ROOT"]
        for name, arguments in rooted.items()
    }


def from_the_ui(repeats, folder, env):
    """Lists of (CPU, wall) of a first run and of one with nothing to do, launched by GraphQL."""
    found = {"first run, from the UI": [], "nothing to do, from the UI": []}
    for k in range(repeats + 1):
        root = folder / "ROOT"
        shutil.rmtree(root, ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = [sys.executable, "-m", "siftline.cli", "ui", "--root", str(root)]
        with (folder / "ui.txt").open("wb") as out:
            server = subprocess.Popen(
                [*command, "--port", str(port)], cwd=folder, stdout=out, stderr=out,
                env=env | {"SIFTLINE_RECIPES": str(folder)}, start_new_session=True,
            )  # fmt: skip
        try:
            address = f"http://127.0.0.1:{port}/graphql"
            wait_until(lambda a=address: graphql(a, "{version}"), 120)
            time.sleep(10)  # the daemon and the code servers have come up
            for name in found:
                before, start = tree_seconds(server.pid), time.perf_counter()
                run = graphql(address, LAUNCH)["launchPipelineExecution"]["run"]["runId"]
                status = f'{{pipelineRunOrError(runId: "{run}") {{... on Run {{status}}}}}}'
                wait_until(lambda a=address, q=status: ended(graphql(a, q)), 120)
                took = tree_seconds(server.pid) - before, time.perf_counter() - start
                if k:
                    found[name].append(took)
        finally:
            os.killpg(server.pid, signal.SIGTERM)
            server.wait(60)
    return found


LAUNCH = """mutation {launchPipelineExecution(executionParams: {
    selector: {repositoryLocationName: "siftline.definitions", repositoryName: "__repository__",
               pipelineName: "light"}, mode: "default", runConfigData: {}}) {
    __typename ... on LaunchRunSuccess {run {runId}} ... on PythonError {message}}}"""


def graphql(address, query):
    """The data of a GraphQL answer."""
    body = json.dumps({"query": query}).encode()
    request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=10) as answer:
        return json.load(answer)["data"]


def ended(answer):
    status = answer["pipelineRunOrError"]["status"]
    assert status not in ("FAILURE", "CANCELED"), status
    return status == "SUCCESS"


def wait_until(true, seconds):
    deadline = time.monotonic() + seconds
    while True:
        try:
            if true():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline
        time.sleep(0.25)


def tree_seconds(session):
    """Processor seconds of all processes of a session, those that ended included."""
    ticks = 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[3]) == session:
            ticks += sum(map(int, fields[11:15]))
    return ticks / os.sysconf("SC_CLK_TCK")


def timed(calls, repeats, folder, env):
    """Lists of (CPU, wall) a call; all take turns, in order, the first round only warms up."""
    found = {name: [] for name in calls}
    for k in range(repeats + 1):
        for name in ("OUT", "ROOT"):
            shutil.rmtree(folder / name, ignore_errors=True)
        for name, (python, *arguments) in calls.items():
            given = [str(folder / each) if each in ("OUT", "ROOT") else each for each in arguments]
            took = spent([python, *given], folder, env)
            shutil.rmtree(folder / "OUT", ignore_errors=True)
            if k:
                found[name].append(took)
    return found


def beside_rensa(asked, folder):
    """Calls on the large corpus, which is made here."""
    import pyarrow as pa
    import pyarrow.parquet as pq
    from bench_dedup import documents, pieces_of

    texts = documents(pieces_of(asked.texts), DOCUMENTS, SIZES)
    column = pa.array(texts, pa.large_string())
    pq.write_table(pa.table({"text": column}), folder / "large.parquet", row_group_size=10_000)
    print(f"{len(texts):,} documents, {sum(map(len, texts)) / 1e6:.0f} MB", file=sys.stderr)
    script = str(Path(__file__).with_name("rensa_files.py"))
    ours = ["-m", "siftline.cli", "dedup", "large.parquet", "--out", "OUT"]
    return {
        "dedup, file to files": [sys.executable, *ours],
        "rensa, file to files": [asked.rensa, script, "large.parquet", "OUT"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--runs", type=int, default=3, help="rounds of what takes a Dagster run")
    parser.add_argument("--only", nargs="*", default=[], help="rows whose name has one of these")
    parser.add_argument(
        "--ui", action="store_true", help="runs launched through the web server, too"
    )
    parser.add_argument("--rensa", help="interpreter that has rensa, pyarrow and numpy")
    parser.add_argument("--texts", nargs="*", default=[], help="JSONL files for --rensa")
    parser.add_argument("--json", action="store_true", help="print one JSON object alone")
    asked = parser.parse_args()
    adopt()
    dropped = ("PYTHONDONTWRITEBYTECODE", "DAGSTER_HOME", "SIFTLINE_ROOT", "SIFTLINE_RECIPES")
    env = {name: value for name, value in os.environ.items() if name not in dropped}
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        prepare(folder)
        light = {name: [sys.executable, *call] for name, call in {**IMPORTS, **verbs()}.items()}
        runs = {name: [sys.executable, *call] for name, call in on_a_root().items()}
        large = beside_rensa(asked, folder) if asked.rensa else {}
        rounds = [(light, asked.repeats), (runs, asked.runs), (large, asked.repeats)]
        if asked.only:
            wanted = [*asked.only, MEASURE]
            keep = lambda calls: {n: c for n, c in calls.items() if any(w in n for w in wanted)}  # noqa: E731
            rounds = [(keep(calls), repeats) for calls, repeats in rounds]
        took = {}
        for calls, repeats in rounds:
            took |= timed(calls, repeats, folder, env) if calls else {}
        if asked.ui:
            took |= from_the_ui(asked.runs, folder, env)
    cpu = {name: statistics.median(c for c, _ in each) for name, each in took.items()}
    wall = {name: statistics.median(w for _, w in each) for name, each in took.items()}
    lines = {
        name: {"cpu": cpu[name], "wall": wall[name], "imports": cpu[name] / cpu[MEASURE]}
        for name in took
    }
    conditions = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "load": os.getloadavg()[0],
        "repeats": asked.repeats,
        "runs": asked.runs,
    }
    if asked.json:
        print(json.dumps({"rows": lines, "conditions": conditions}))
        return
    print(f"{'':<36} {'CPU s':>8} {'wall s':>8} {'imports':>8}")
    for name, line in lines.items():
        print(f"{name:<36} {line['cpu']:8.2f} {line['wall']:8.2f} {line['imports']:8.2f}")
    print(json.dumps(conditions))


if __name__ == "__main__":
    main()
