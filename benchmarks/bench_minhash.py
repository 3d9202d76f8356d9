"""MinHash signatures: our numba kernel beside datasketch, in one process, on the same shingles.

    .venv/bin/python benchmarks/bench_minhash.py [--rows 2000] [--repeats 5]

Prints a table and, as the last line, one JSON object. What is timed: signatures of 256 slots from
shingle hashes that are already there; both give the same bits (checked). Medians over the repeats,
the two in turn, after one warm-up; quote the ratio, not the seconds.
"""

import argparse
import json
import platform
import statistics
import time

import numpy as np
from datasketch import MinHash

from siftline.kernels.sets.shingles import char_shingles, signatures

WORDS = ("the a of to and in is it on for with as was at by from or an be this that").split()  # noqa: SIM905


def texts(rows: int) -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(WORDS, 60)) + f" {i}" for i in range(rows)]


def with_datasketch(sets, slots: int) -> np.ndarray:
    first = MinHash(num_perm=slots, scheme="affine32", hashfunc=int)
    out = []
    for i in range(len(sets.offsets) - 1):
        sketch = MinHash(
            num_perm=slots, scheme="affine32", hashfunc=int, permutations=first.permutations
        )
        sketch.update_batch(sets.row(i).tolist())
        out.append(sketch.hashvalues)
    return np.stack(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    sets = char_shingles(texts(asked.rows), 5)
    ours = signatures(sets, 256)
    assert np.array_equal(ours, with_datasketch(sets, 256)), "signatures differ"
    seconds: dict[str, list[float]] = {"siftline": [], "datasketch": []}
    for _ in range(asked.repeats):
        for name, run in (("siftline", signatures), ("datasketch", with_datasketch)):
            start = time.perf_counter()
            run(sets, 256)
            seconds[name].append(time.perf_counter() - start)
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    result = {
        "rows": asked.rows,
        "shingles_per_row": float(np.diff(sets.offsets).mean()),
        "rows_per_second": {name: asked.rows / s for name, s in medians.items()},
        "ratio": medians["datasketch"] / medians["siftline"],
        "repeats": asked.repeats,
        "machine": platform.machine(),
        "python": platform.python_version(),
    }
    for name, rate in result["rows_per_second"].items():
        print(f"{name:<12} {rate:>12,.0f} rows/s")
    print(f"ratio {result['ratio']:.1f}")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
