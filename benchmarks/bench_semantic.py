"""Duplicates by meaning: the exact search and the one by faiss on the same vectors, in one run.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_semantic.py
        [--rows 100000 ...] [--width 384] [--threshold 0.95] [--planted 0.97]
        [--kinds random topics] [--searches exact faiss] [--json FILE]

A quarter of the rows are copies of others, turned so that their cosine to them is --planted, and
all are shuffled. `random` rows point anywhere, which is the hardest for cells: nothing but the copy
is near a row. `topics` are 1,000 directions with noise of the same size around each, as embeddings
of texts are rather. Vectors lie in a .npy file (float32) and are read from it, as by the command.
Every search is a process of its own; reported are its seconds (with the reading), rows removed and
pairs verified, the most memory of its own (anonymous pages, read every 50 ms) and with the pages of
the file. Where both searches ran: the share of the rows that the exact one removed which the other
did too, how many it removed beyond those (a row whose partner stayed because a copy was missed may
go or stay), and the share of the planted pairs of which either lost a row; each similarity is
checked against the vectors again. Prints a line per search and, as the last line, one JSON object.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np

BLOCK = 65536


def written(path: Path, asked: argparse.Namespace, rows: int, kind: str) -> np.ndarray:
    """Writes the vectors; returns the pairs planted, int64 (copies, 2)."""
    draw = np.random.default_rng(0)
    originals = rows - rows // 4
    place = draw.permutation(rows)
    source = draw.integers(0, originals, rows - originals)
    out = np.lib.format.open_memmap(path, "w+", np.float32, (rows, asked.width))
    topics = draw.normal(size=(1000, asked.width))
    for start in range(0, originals, BLOCK):
        x = draw.normal(size=(min(BLOCK, originals - start), asked.width))
        if kind == "topics":
            x += topics[draw.integers(0, len(topics), len(x))]
        out[place[start : start + len(x)]] = x / np.linalg.norm(x, axis=1, keepdims=True)
    for start in range(0, len(source), BLOCK):
        x = out[place[source[start : start + BLOCK]]].astype(np.float64)
        noise = draw.normal(size=x.shape)
        noise -= (noise * x).sum(axis=1, keepdims=True) * x
        noise /= np.linalg.norm(noise, axis=1, keepdims=True)
        turned = asked.planted * x + np.sqrt(1 - asked.planted**2) * noise
        out[place[originals + start : originals + start + len(x)]] = turned
    out.flush()
    return np.stack([place[source], place[originals:]], axis=1)


def memory() -> tuple[int, int]:
    """Bytes of anonymous pages, and of all, at most so far."""
    lines = Path("/proc/self/status").read_text().splitlines()
    facts = {line.split(":")[0]: line.split()[1] for line in lines if line.endswith("kB")}
    return int(facts["RssAnon"]) * 1024, int(facts["VmHWM"]) * 1024


def one(asked: argparse.Namespace) -> None:
    """A search in this process."""
    from siftline.deduplication.semantic import semantic_duplicates

    peak, done = [0], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            peak[0] = max(peak[0], memory()[0])

    x = np.load(asked.vectors, mmap_mode="r")
    watcher = threading.Thread(target=watch)
    watcher.start()
    start, used = time.perf_counter(), time.process_time()
    found = semantic_duplicates(x, asked.threshold, nearest=asked.one)
    wall, cpu = time.perf_counter() - start, time.process_time() - used
    done.set()
    watcher.join()
    np.save(asked.found, np.stack([found.matched, found.similarity]))
    facts = {"seconds": wall, "cpu": cpu, "removed": int((~found.kept).sum())}
    sizes = {"own_gib": peak[0] / 2**30, "with_file_gib": memory()[1] / 2**30}
    print(json.dumps({**facts, "pairs": found.pairs, **sizes}))


def checked(x: np.ndarray, matched: np.ndarray, similarity: np.ndarray, threshold: float) -> None:
    """Asserts that every removed row has a kept one that is as similar as said."""
    gone = np.flatnonzero(matched >= 0)
    assert (matched[matched[gone]] < 0).all()
    for start in range(0, len(gone), BLOCK):
        rows = gone[start : start + BLOCK]
        a, b = x[rows].astype(np.float64), x[matched[rows]].astype(np.float64)
        cosine = (a * b).sum(axis=1) / np.linalg.norm(a, axis=1) / np.linalg.norm(b, axis=1)
        assert np.allclose(cosine, similarity[rows], atol=2e-6)
        assert (cosine >= threshold - 2e-6).all()


def compare(asked: argparse.Namespace, rows: int, kind: str) -> dict[str, Any]:
    result: dict[str, Any] = {"rows": rows, "kind": kind}
    with tempfile.TemporaryDirectory() as folder:
        vectors, found = Path(folder) / "x.npy", Path(folder) / "found.npy"
        pairs = written(vectors, asked, rows, kind)
        x = np.load(vectors, mmap_mode="r")
        gone = {}
        for search in asked.searches:
            command = [sys.executable, __file__, "--one", search, "--vectors", str(vectors)]
            command += ["--found", str(found), "--threshold", str(asked.threshold)]
            said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            matched, similarity = np.load(found)
            matched = matched.astype(np.int64)
            checked(x, matched, similarity, asked.threshold)
            gone[search] = matched >= 0
            planted = float(gone[search][pairs].any(axis=1).mean())
            result[search] = {**json.loads(said.splitlines()[-1]), "planted_found": planted}
            print(f"{rows:>9,} {kind} {search}: {json.dumps(result[search])}", flush=True)
        if len(gone) == 2:
            exact, other = gone["exact"], gone["faiss"]
            result["recall"] = float(other[exact].mean()) if exact.any() else None
            result["beyond"] = int((other & ~exact).sum())
            print(f"{rows:>9,} {kind} recall {result['recall']}, {result['beyond']} beyond")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000])
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--threshold", type=float, default=0.95)
    parser.add_argument("--planted", type=float, default=0.97)
    parser.add_argument("--kinds", nargs="+", default=["random", "topics"])
    parser.add_argument("--searches", nargs="+", default=["exact", "faiss"])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    parser.add_argument("--vectors", help=argparse.SUPPRESS)
    parser.add_argument("--found", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.one:
        one(asked)
        return
    import faiss

    tried = [compare(asked, rows, kind) for rows in asked.rows for kind in asked.kinds]
    names = ("width", "threshold", "planted")
    machine = {"cores": os.cpu_count(), "machine": platform.machine(), "faiss": faiss.__version__}
    line = json.dumps({**{name: getattr(asked, name) for name in names}, **machine, "runs": tried})
    print(line)
    if asked.json:
        asked.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
