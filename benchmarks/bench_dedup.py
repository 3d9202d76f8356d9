"""Deduplication from an Arrow column to flags: ours beside rensa, gaoya and others, in one run.

    .venv/bin/python benchmarks/bench_dedup.py --texts FILE.jsonl... [--peers PYTHON] [--repeats 5]
    .venv/bin/python benchmarks/bench_dedup.py --texts FILE.jsonl... --peers PYTHON --whole-process
    .venv/bin/python benchmarks/bench_dedup.py --growth [--fresh]

Texts (every string of every line; without --texts, words drawn at random) are joined to documents
of 2 to 14 KB, a quarter of them copies with words replaced. All tools get the same documents, word
5-grams, 128 slots and threshold 0.8, and take turns; the first round is not counted. Ours includes
the verification of every pair, the others do not verify. PYTHON is an interpreter that has the
peers (rensa 0.5, gaoya 0.2, datasketch 2.0, datatrove 0.10 with its processing extra and spacy,
semhash 0.5, pyarrow), so that they stay out of this environment; it is one warm process as
well. --tools names those wanted. datatrove works from disk to disk, 16 buckets of 8, in a
process a core. semhash compares vectors (hashed word counts, made
for it beforehand) at a cosine of 0.95 and is held
against our semantic mode on the same ones, in a table of its own.

Every way of feeding a tool is a line of the table, and the best of each tool by wall and by
processor time stands below it. --whole-process times programs instead, from a Parquet file to one
of the rows that are kept, the start of the interpreter and all imports included: our command line
beside the shortest program around each peer.

Quality is held against exact Jaccard similarities, over each tool's own words: how many pairs at
0.85 or more lost at least one row, and how many marked rows have a partner at 0.8 or more. All rows
are asked unless --sample asks fewer; a partner outside the sample is none.

--growth times 100 thousand and 2 million short rows in memory and from file to files, in a warm
process that holds on to its memory (--fresh: gives it back each time), and the command line as a
process of its own with its peak memory. Prints tables and, as the last line, one JSON object.
"""

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from dedup_peers import (
    COSINE,
    DOCUMENTS,
    IN_MEMORY,
    NAMES,
    PEERS,
    SEMANTIC,
    THRESHOLD,
    VECTORS,
    Peers,
    grams,
    timed,
)

MARGIN = 0.05


# ---- documents -----------------------------------------------------------------------------------


def pieces_of(files):
    if not files:
        rng = np.random.default_rng(0)
        vocabulary = [f"{a}{b}" for a in "abcdefgh" for b in ("r", "n", "st", "ly")]
        return [" ".join(rng.choice(vocabulary, 40)) for _ in range(50_000)]
    lines = (line for file in files for line in Path(file).read_text("utf-8").splitlines())
    rows = (json.loads(line).values() for line in lines)
    return [" ".join(value for value in row if isinstance(value, str)) for row in rows]


def documents(pieces, rows, sizes=(2000, 14_000)):
    draw = random.Random(0)
    words = sorted({word for piece in pieces[:5000] for word in piece.split()})
    out = []
    while len(out) < rows:
        if out and draw.random() < 0.25:
            copy = draw.choice(out).split(" ")
            rate = draw.choice([0, 0.002, 0.005, 0.01, 0.015, 0.02, 0.025, 0.03, 0.05])
            copy = [draw.choice(words) if draw.random() < rate else word for word in copy]
            out.append(" ".join(copy))
            continue
        size, parts = draw.randint(*sizes), []
        while size > 0:
            parts.append(draw.choice(pieces))
            size -= len(parts[-1]) + 1
        out.append("\n".join(parts))
    return out


# ---- quality -------------------------------------------------------------------------------------


def near_pairs(sets, threshold, block=500):
    """Pairs of sets at `threshold` or more, exact: what each shares with each is counted.

    Shingles go by 64-bit hashes; of two rows that share none nothing is computed.

    Args:
        sets: Lists of strings, none empty; repeats count once.
        threshold: Jaccard similarity above 0.
        block: Rows at once.

    Returns:
        left, right, similarity; left < right, ascending.
    """
    from scipy.sparse import csr_matrix

    rows = [np.unique(np.fromiter(map(hash, one), np.int64)) for one in sets]
    sizes = np.array([len(row) for row in rows])
    _, columns = np.unique(np.concatenate(rows), return_inverse=True)
    ends = np.concatenate([[0], np.cumsum(sizes)])
    counts = csr_matrix((np.ones(ends[-1], np.int32), columns.astype(np.int32), ends))
    across = counts.T.tocsr()
    found = []
    for start in range(0, len(rows), block):
        both = (counts[start : start + block] @ across).tocoo()
        left, right = both.row + start, both.col
        value = both.data / (sizes[left] + sizes[right] - both.data)
        near = (value >= threshold) & (left < right)
        place = np.lexsort((right[near], left[near]))
        found.append([each[near][place] for each in (left, right, value)])
    return tuple(np.concatenate(each) for each in zip(*found, strict=True))


def own_words(text):
    """Our words of a text."""
    from siftline.kernels.text.words import words

    return words(text).split(" ") if text else []


def quality(flags, pairs, sample):
    left, right, value = pairs
    marked = flags[sample]
    close = value >= THRESHOLD + MARGIN
    found = marked[left[close]] | marked[right[close]]
    partner = np.zeros(len(sample), bool)
    partner[left] = partner[right] = True
    return {
        "pairs": int(close.sum()),
        "recall": float(found.mean()),
        # Of the marked rows whose family is in the sample; a partner outside it can't be judged.
        "marked_with_partner": float(partner[marked].mean()),
    }


# ---- growth --------------------------------------------------------------------------------------


def short_rows(n):
    """Rows of six fragments of ten words; a quarter are copies: same, longer, or a part other."""
    import pyarrow.compute as pc

    rng = np.random.default_rng(0)
    vocabulary = np.array(
        [a + b for a in "ba ce di fo gu ha je ki lo mu na pe".split() for b in "r n s t ly".split()]  # noqa: SIM905
    )
    fragments = pa.array([" ".join(r) for r in vocabulary[rng.integers(0, 60, (200_000, 10))]])
    parts = rng.integers(0, len(fragments), (n, 6))
    copies = np.flatnonzero(rng.random(n) < 0.25)[1:]
    for row in copies:
        parts[row] = parts[rng.integers(row)]
    kind = rng.random(len(copies))
    other = copies[kind < 0.2]
    parts[other, 5] = rng.integers(0, len(fragments), len(other))
    end = np.full(n, "", dtype="U8")
    end[copies[kind > 0.4]] = " more"
    text = pc.binary_join_element_wise(*(fragments.take(pa.array(c)) for c in parts.T), " ")
    return pa.table({"text": pc.binary_join_element_wise(text, pa.array(end), "")})


# Its own high-water mark: what getrusage says of a child includes the parent it was forked from.
CHILD = """
from siftline.cli import main
try:
    main()
finally:
    print(next(x for x in open("/proc/self/status") if x.startswith("VmHWM")), end="", flush=True)
"""


def child_peak(path, out, *options):
    """Runs the command line in a process of its own: wall seconds, peak MiB, its JSON."""
    start = time.perf_counter()
    command = [sys.executable, "-c", CHILD, "dedup", str(path), "--out", str(out), "--json"]
    command += options
    env = {name: value for name, value in os.environ.items() if name not in HOLD}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    wall = time.perf_counter() - start
    said, peak = done.stdout.splitlines()
    return wall, int(peak.split()[1]) / 1024, json.loads(said)


def files_to_files(folder, n):
    """What the command line does, without its start."""
    from siftline.deduplication.run import Job, dedup_files
    from siftline.progress import Progress

    out = folder / "once"
    shutil.rmtree(out, ignore_errors=True)
    job = Job((str(folder / f"{n}.parquet"),), out)
    dedup_files(job, lambda label, total, unit: Progress(label, total, lambda line: None, unit))


# A virtual machine may give freed memory back to its host, and touching it again then costs more
# than any work on it (0.24 GiB/s measured, 6 GiB/s a moment later). Held by the process, small and
# large runs alike find theirs again.
HOLD = {
    "MALLOC_MMAP_THRESHOLD_": str(1 << 40),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    "ARROW_DEFAULT_MEMORY_POOL": "system",
}


def growth(repeats, hold):
    from siftline.deduplication.engine import deduplicate

    if hold and not HOLD.items() <= os.environ.items():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **HOLD})
    result = {}
    deduplicate(short_rows(1000)["text"])
    with tempfile.TemporaryDirectory() as folder:
        sizes = (100_000, 2_000_000)
        columns = {n: short_rows(n) for n in sizes}
        for n, table in columns.items():
            pq.write_table(table, Path(folder) / f"{n}.parquet", row_group_size=100_000)
        spent = {name: {n: [] for n in sizes} for name in ("", "cpu_", "files_", "files_cpu_")}
        found = deduplicate(columns[sizes[-1]]["text"])
        files_to_files(Path(folder), sizes[-1])
        for _ in range(repeats):
            # As many rows either way, so that a busy minute falls on both: 20 times the small
            # table, one after another, then once the large one.
            for n, table in columns.items():
                calls = {"": lambda t=table: deduplicate(t["text"])}
                calls["files_"] = lambda n=n: files_to_files(Path(folder), n)
                for name, call in calls.items():
                    start, cpu = time.perf_counter(), time.process_time()
                    for _ in range(sizes[-1] // n):
                        call()
                    spent[name][n].append((time.perf_counter() - start) / sizes[-1] * 1e6)
                    spent[f"{name}cpu_"][n].append((time.process_time() - cpu) / sizes[-1] * 1e6)
        for n in sizes:
            wall, peak, said = child_peak(Path(folder) / f"{n}.parquet", Path(folder) / f"o{n}")
            result[n] = {
                **{f"{k}us_per_row": statistics.median(each[n]) for k, each in spent.items()},
                "cli_seconds": wall,
                "cli_peak_mib": peak,
                "kept": said["kept"],
                "phases": said["seconds"],
            }
            print(n, json.dumps(result[n]))
        assert found.kept.sum() == said["kept"], "memory and files must decide alike"
    small, large = (result[n] for n in sizes)
    for key in (f"{name}us_per_row" for name in spent):
        print(f"{key}: {large[key] / small[key]:.2f} times from {sizes[0]:,} to {sizes[1]:,} rows")
    return result


# ---- side by side --------------------------------------------------------------------------------


def word_vectors(texts, width=256):
    """Hashed word counts, float32: no model, the same for both sides."""
    from zlib import crc32

    known = {}
    out = np.zeros((len(texts), width), np.float32)
    for row, text in enumerate(texts):
        for word in text.lower().split():
            place = known.setdefault(word, crc32(word.encode()))
            out[row, place % width] += 1 if place & 1 << 31 else -1
    return out / np.maximum(np.linalg.norm(out, axis=1, keepdims=True), 1e-9)


def by_vectors(asked, peers, vectors):
    """Our semantic mode beside semhash on the same vectors."""
    from siftline.deduplication.semantic import semantic_duplicates

    mine, theirs, flags = [], [], None
    for _ in range(asked.repeats + 1):
        ours, *seconds = timed(semantic_duplicates, vectors, COSINE)
        mine.append(seconds)
        *seconds, flags = peers.run("semhash")
        theirs.append(seconds)
    sample = np.sort(np.random.default_rng(0).permutation(len(vectors))[: asked.sample])
    near = np.triu(vectors[sample] @ vectors[sample].T, 1)
    left, right = np.nonzero(near >= COSINE + 1e-4)
    result = {"rows": len(vectors)}
    for name, found, times in (
        ("siftline", ~ours.kept, mine[1:]),
        (NAMES["semhash"], flags, theirs[1:]),
    ):
        wall, cpu = (statistics.median(column) for column in zip(*times, strict=True))
        hit = found[sample][left] | found[sample][right]
        result[name] = {
            "median": wall,
            "median_cpu": cpu,
            "marked": int(found.sum()),
            "pairs": len(left),
            "recall": float(hit.mean()) if len(left) else None,
        }
        print(f"by vectors: {name:<24} {json.dumps(result[name])}")
    result["differ"] = int((flags != ~ours.kept).sum())
    return result


def best_of_each(wall, cpu):
    """The best way of using each tool, as a line each; names up to a comma are of one tool.

    Args:
        wall: Seconds by name, ours as "siftline".
        cpu: Processor seconds by name.

    Returns:
        By tool: how many times ours the least wall and the least processor time are, and whose.
    """
    found = {}
    for name in wall:
        tool = name.partition(",")[0]
        if tool != "siftline":
            found.setdefault(tool, []).append(name)
    best = {}
    for tool, names in found.items():
        by_wall, by_cpu = min(names, key=wall.get), min(names, key=cpu.get)
        best[tool] = {
            "wall": wall[by_wall] / wall["siftline"],
            "wall_by": by_wall,
            "cpu": cpu[by_cpu] / cpu["siftline"],
            "cpu_by": by_cpu,
        }
        print(
            f"best of {tool}: {best[tool]['wall']:.1f} times ours by wall ({by_wall}), "
            f"{best[tool]['cpu']:.1f} times by processor time ({by_cpu})"
        )
    return best


def one_process(command):
    """Wall and processor seconds of a process and all it starts."""
    env = {name: value for name, value in os.environ.items() if name not in HOLD}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, env=env)
    _, status, used = os.wait4(process.pid, 0)
    wall = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}: see above")
    return wall, used.ru_utime + used.ru_stime


def whole_process(asked):
    """Programs from file to file, start included; they take turns."""
    if not asked.peers:
        raise SystemExit("--whole-process needs --peers PYTHON")
    texts = documents(pieces_of(asked.texts), asked.rows)
    names = [name for name in asked.tools if name in IN_MEMORY]
    spent = {}
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / DOCUMENTS
        pq.write_table(pa.table({"text": pa.array(texts, pa.large_string())}), source)
        for turn in range(asked.repeats + 1):
            out = Path(folder) / f"out{turn}"
            cli = [sys.executable, "-c", "from siftline.cli import main; main()", "dedup"]
            calls = {"siftline": [*cli, str(source), "--out", str(out)]}
            for name in names:
                program = [asked.peers, str(Path(__file__).with_name("dedup_peers.py")), "--whole"]
                calls[NAMES.get(name, name)] = [
                    *program,
                    name,
                    str(source),
                    f"{out}-{name}.parquet",
                ]
            for name, command in calls.items():
                spent.setdefault(name, []).append(one_process(command))
    # The first round may compile and fills the page cache.
    wall = {name: statistics.median(w for w, _ in times[1:]) for name, times in spent.items()}
    cpu = {name: statistics.median(c for _, c in times[1:]) for name, times in spent.items()}
    print(f"{'file to file, start included':<28} {'wall':>8} {'':>7}  {'CPU':>8}")
    for name in wall:
        print(
            f"{name:<28} {wall[name]:8.2f} {wall[name] / wall['siftline']:6.1f}x  "
            f"{cpu[name]:8.2f} {cpu[name] / cpu['siftline']:6.1f}x"
        )
    return {
        "documents": len(texts),
        "megabytes": round(sum(len(text.encode()) for text in texts) / 1e6, 1),
        "wall": wall,
        "cpu": cpu,
        "best": best_of_each(wall, cpu),
    }


def compare(asked):
    from siftline.deduplication.engine import deduplicate

    texts = documents(pieces_of(asked.texts), asked.rows)
    column = pa.array(texts, pa.large_string())
    seconds, processor, flags = {"siftline": []}, {"siftline": []}, {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / DOCUMENTS
        pq.write_table(pa.table({"text": column}), path, row_group_size=1000)
        vectors = word_vectors(texts) if set(asked.tools) & set(SEMANTIC) else None
        if vectors is not None:
            np.save(Path(folder) / VECTORS, vectors)
        shown = [name for name in asked.tools if name not in SEMANTIC]
        peers = Peers(asked.peers, folder, shown) if asked.peers else None
        for _ in range(asked.repeats + 1):
            # Ours is short: five in a row are as good a sample of a busy machine as one of theirs.
            for _ in range(5):
                ours, wall, cpu = timed(deduplicate, column)
                seconds["siftline"].append(wall)
                processor["siftline"].append(cpu)
            for name in peers.names if peers else ():
                label = NAMES.get(name, name)
                wall, cpu, flags[label] = peers.run(name)
                seconds.setdefault(label, []).append(wall)
                processor.setdefault(label, []).append(cpu)
        semantic = by_vectors(asked, peers, vectors) if peers and vectors is not None else None
        if peers:
            peers.close()
        # The first process may compile; the second finds the compiled kernels.
        child_peak(path, Path(folder) / "o1")
        wall, peak, said = child_peak(path, Path(folder) / "o2")
    flags["siftline"] = ~ours.kept
    assert said["kept"] == ours.kept.sum(), "memory and files must decide alike"
    warm = {name: len(times) // (asked.repeats + 1) for name, times in seconds.items()}
    seconds = {name: times[warm[name] :] for name, times in seconds.items()}
    processor = {name: times[warm[name] :] for name, times in processor.items()}
    median = {name: statistics.median(times) for name, times in seconds.items()}
    cpu = {name: statistics.median(times) for name, times in processor.items()}
    sample = np.sort(np.random.default_rng(0).permutation(len(texts))[: asked.sample])
    held = [texts[k] for k in sample]
    theirs = near_pairs((grams(text.lower().split()) for text in held), THRESHOLD)
    mine = near_pairs((grams(own_words(text)) for text in held), THRESHOLD)
    result = {
        "documents": len(texts),
        "megabytes": round(column.nbytes / 1e6, 1),
        "seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
        "median": median,
        "median_cpu": cpu,
        "ratio": {name: median[name] / median["siftline"] for name in median},
        "ratio_of_fastest": {
            name: min(seconds[name]) / min(seconds["siftline"]) for name in median
        },
        "ratio_cpu": {name: cpu[name] / cpu["siftline"] for name in cpu},
        "phases": ours.seconds,
        "pairs_verified": ours.pairs,
        "marked": {name: int(flag.sum()) for name, flag in flags.items()},
        "quality": {
            name: quality(flag, mine if name == "siftline" else theirs, sample)
            for name, flag in flags.items()
        },
        "cli": {"seconds": wall, "peak_mib": peak, "phases": said["seconds"]},
        "by_vectors": semantic,
    }
    print(f"{'':<24} {'median':>8} {'':>7}  {'fastest':>8} {'':>7}  {'CPU':>8}")
    for name, value in median.items():
        q, least = result["quality"][name], min(seconds[name])
        print(
            f"{name:<24} {value:8.3f} {result['ratio'][name]:6.1f}x  "
            f"{least:8.3f} {result['ratio_of_fastest'][name]:6.1f}x  "
            f"{cpu[name]:8.3f} {result['ratio_cpu'][name]:6.1f}x  "
            f"recall {q['recall']:.4f} of {q['pairs']} pairs, marked {result['marked'][name]}"
        )
    result["best"] = best_of_each(median, cpu)
    print(f"command line {wall:8.3f} s, start and files included; peak {peak:.0f} MiB")
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", nargs="*", default=[], help="JSONL files")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--sample", type=int, default=8000, help="rows whose pairs are counted")
    parser.add_argument("--peers", help="interpreter that has the peers")
    parser.add_argument("--tools", nargs="*", default=list(IN_MEMORY), choices=PEERS)
    parser.add_argument("--whole-process", action="store_true", help="programs, start included")
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--fresh", action="store_true", help="leave freed memory to the system")
    asked = parser.parse_args()
    if asked.growth:
        result = growth(asked.repeats, not asked.fresh)
    else:
        result = whole_process(asked) if asked.whole_process else compare(asked)
    import numba

    conditions = {
        "machine": platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "numba": numba.__version__,
        "repeats": asked.repeats,
    }
    print(json.dumps({**result, "conditions": conditions}))


if __name__ == "__main__":
    main()
