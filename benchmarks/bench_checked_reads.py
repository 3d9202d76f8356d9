"""What comparing files with their hashes costs in a run, in processor time.

    python benchmarks/bench_checked_reads.py --rows 100000 --root build/checked

Runs a chain without models over generated rows: pool, evaluation set, a score column, duplicates,
decontamination, a random selection, the published version. Every step is a process of its own, as
in `siftline run`, so each hashes what it reads anew. Says for each step the processor time of all
of it, that of hashing, and how many bytes and files were hashed; then the same for a second run,
which finds everything. Prints JSON at the end.
"""

import argparse
import hashlib
import json
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

RECIPE: dict[str, Any] = {
    "name": "checked",
    "pool": {"name": "p", "inputs": [{"path": "${CHECKED}/in/pool.jsonl"}]},
    "sets": {"test": [{"name": "t", "inputs": [{"path": "${CHECKED}/in/test.jsonl"}]}]},
    "models": {"none": {"path": "${CHECKED}/model"}},
    "scorers": {"length": {"kind": "column", "column": "length"}},
    "stages": ["duplicates", "decontamination", {"select": {"method": "random"}}],
}  # fmt: skip
STEPS = ("pool", "set", "scores", "duplicates", "decontamination", "select", "curated", "read")


def write_inputs(folder: Path, rows: int) -> None:
    """Rows of about 500 bytes that no gate takes for copies of one another."""
    folder.mkdir(parents=True)
    draw = random.Random(0)
    words = [f"{a}{b}{c}" for a in "bdfgklmnprst" for b in "aeiou" for c in "bdgklmnprst"]
    with (folder / "pool.jsonl").open("w", encoding="utf-8") as file:
        for i in range(rows):
            prompt = " ".join(draw.choices(words, k=30))
            reply = " ".join(draw.choices(words, k=60))
            line = {"prompt": f"{prompt}?", "completion": f"{reply} {i}.", "length": i}
            file.write(json.dumps(line) + "\n")
    line = {"prompt": "What has two wheels and a bell?", "completion": "A bicycle."}
    (folder / "test.jsonl").write_text(json.dumps(line) + "\n")


def do(step: str, root: Path, rows: int) -> None:
    """One step of the chain, as its asset does it."""
    from siftline.assets.shared import build
    from siftline.recipe.parse import parse
    from siftline.stages.arms import curated_version
    from siftline.stages.models import engines
    from siftline.stages.publish import publish_curated
    from siftline.stages.run import run_stage
    from siftline.stages.scorers import score_quality
    from siftline.workspace import Workspace

    workspace = Workspace(root)
    recipe = parse({**RECIPE, "budget": {"unit": "rows", "size": rows // 2}})

    def quiet(line: str) -> None: ...

    if step in ("pool", "set"):
        build(workspace, recipe, {"pool": "p", "set": "t"}[step], quiet)
    elif step == "scores":
        with engines() as opened:
            score_quality(workspace, recipe, "length", opened, quiet)
    elif step == "curated":
        publish_curated(workspace, recipe)
    elif step == "read":
        curated_version(workspace, recipe)
    else:
        output, _ = run_stage(workspace, recipe, step, quiet)
        output.all_decisions()


def measured(step: str, root: Path, rows: int) -> dict[str, Any]:
    """Does a step and says what its hashing cost: seconds of processor time, bytes, files."""
    from siftline import verified

    original, hashed = hashlib.file_digest, []

    def counting(handle: Any, name: str) -> Any:
        begun = time.thread_time()
        found = original(handle, name)
        hashed.append((time.thread_time() - begun, os.fstat(handle.fileno()).st_size))
        return found

    verified.hashlib.file_digest = counting  # type: ignore[assignment]
    do(step, root, rows)
    return {
        "step": step,
        "seconds": round(time.process_time(), 2),
        "hashing": round(sum(spent for spent, _ in hashed), 3),
        "bytes": sum(size for _, size in hashed),
        "files": len(hashed),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--root", type=Path, default=Path("build/checked"))
    parser.add_argument("--step")
    asked = parser.parse_args()
    home = asked.root.absolute()
    if asked.step:
        print(json.dumps(measured(asked.step, home / "root", asked.rows)))
        return
    shutil.rmtree(home, ignore_errors=True)
    write_inputs(home / "in", asked.rows)
    said: dict[str, Any] = {"rows": asked.rows}
    for run in ("first", "again"):
        lines = []
        for step in STEPS:
            command = [sys.executable, __file__, "--step", step, "--root", str(home)]
            command += ["--rows", str(asked.rows)]
            environment = os.environ | {"CHECKED": str(home)}
            out = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE)
            lines.append(json.loads(out.stdout.splitlines()[-1]))
            print(run, lines[-1], flush=True)
        total = {name: sum(line[name] for line in lines) for name in lines[0] if name != "step"}
        total["share"] = round(total["hashing"] / total["seconds"], 5)
        total["bytes_a_second"] = round(total["bytes"] / max(total["hashing"], 1e-9))
        said[run] = {"steps": lines, "total": total}
        print(run, total, flush=True)
    print(json.dumps(said))


if __name__ == "__main__":
    main()
