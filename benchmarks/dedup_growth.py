"""Deduplication of conversations, small and large: time a row and peak memory of the command line.

    .venv/bin/python benchmarks/dedup_growth.py [--rows 100000 2000000] [--repeats 1]

Each size is a process of its own, `siftline dedup --prompt-column --response-column` from Parquet
to folders, start included; its peak is the kernel's high-water mark of that process. The time of
the processor tells a busy machine from a slow row. Rows are prompts of 20 words and responses of
40, drawn at random with one number in each prompt; a quarter are copies of an earlier row: the
same, with a word more, or with ten words replaced. The first run, on a thousand rows, compiles and
is not counted; sizes take turns. Prints a line a run and, as the last line, one JSON object with
medians.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from bench_dedup import child_peak

COLUMNS = ("--prompt-column", "prompt", "--response-column", "response")


def conversations(n: int) -> pa.Table:
    """n rows of prompt and response; see above."""
    rng = np.random.default_rng(0)
    starts = "ba ce di fo gu ha je ki lo mu na pe".split()  # noqa: SIM905
    vocabulary = np.array([a + b for a in starts for b in ("r", "n", "st", "ly", "mer")])
    words = vocabulary[rng.integers(0, len(vocabulary), (200_000, 10))]
    fragments = pa.array([" ".join(line) for line in words])
    parts = rng.integers(0, len(fragments), (n, 6))
    numbers = rng.integers(2, 1000, n)
    copies = np.flatnonzero(rng.random(n) < 0.25)[1:]
    for row in copies:
        source = rng.integers(row)
        parts[row], numbers[row] = parts[source], numbers[source]
    kind = rng.random(len(copies))
    other = copies[kind < 0.2]
    parts[other, 5] = rng.integers(0, len(fragments), len(other))
    end = np.full(n, ".", dtype="U8")
    end[copies[kind > 0.6]] = " indeed."
    one, two, *rest = (fragments.take(pa.array(column)) for column in parts.T)
    number = pa.array(numbers).cast(pa.string())
    prompt = pc.binary_join_element_wise(one, number, two, " ")
    response = pc.binary_join_element_wise(*rest, " ")
    response = pc.binary_join_element_wise(response, pa.array(end), "")
    return pa.table({"prompt": prompt, "response": response})


def measured(sizes: list[int], repeats: int) -> dict[int, Any]:
    """Runs all sizes in turn: by size the medians, and the last run's phases."""
    runs: dict[int, list[Any]] = {n: [] for n in sizes}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for n in (1000, *sizes):
            pq.write_table(conversations(n), folder / f"{n}.parquet", row_group_size=100_000)
        child_peak(folder / "1000.parquet", folder / "first", *COLUMNS)
        for turn in range(repeats):
            for n in sizes:
                out = folder / f"{n}-{turn}"
                before = resource.getrusage(resource.RUSAGE_CHILDREN)
                wall, peak, said = child_peak(folder / f"{n}.parquet", out, *COLUMNS)
                after = resource.getrusage(resource.RUSAGE_CHILDREN)
                cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
                runs[n].append((wall, cpu, peak, said))
                print(f"{n:,} rows: {wall:.1f} s, CPU {cpu:.1f} s, peak {peak:.0f} MiB, {said}")
    result: dict[int, Any] = {}
    for n, found in runs.items():
        result[n] = {
            "seconds": statistics.median(run[0] for run in found),
            "cpu_seconds": statistics.median(run[1] for run in found),
            "peak_mib": max(run[2] for run in found),
            "kept": found[-1][3]["kept"],
            "phases": found[-1][3]["seconds"],
        }
        for name in ("", "cpu_"):
            result[n][f"{name}us_per_row"] = result[n][f"{name}seconds"] / n * 1e6
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 2_000_000])
    parser.add_argument("--repeats", type=int, default=1)
    asked = parser.parse_args()
    result = measured(asked.rows, asked.repeats)
    small, large = asked.rows[0], asked.rows[-1]
    for name in ("us_per_row", "cpu_us_per_row"):
        ratio = result[large][name] / result[small][name]
        print(f"{name}: {ratio:.2f} times from {small:,} to {large:,} rows")
    conditions = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "polars": version("polars"),
        "niceness": os.nice(0),
        "load": os.getloadavg()[0],
        "repeats": asked.repeats,
    }
    print(json.dumps({**result, "conditions": conditions}))


if __name__ == "__main__":
    main()
