"""The tools that `bench_dedup.py` is held against, run by the interpreter that has them.

rensa, gaoya and datasketch get the documents in memory and answer in flags, like ours. rensa is fed
in three ways: with lists of shingles from a Python loop, as its examples do (`rensa`); with flat
hashes of shingles that pyarrow and numpy make (`rensa_flat`), the fastest way into it; and with
those into its Rho sketch (`rensa_rho`). gaoya cuts words in Rust, in as many threads as there are
cores. datatrove works from disk to disk, in as many processes as there are cores, and is timed so.
semhash compares vectors and is held against our semantic mode, on the same. Only numpy and pyarrow
are imported at the top.

    PYTHON dedup_peers.py --whole NAME IN.parquet OUT.parquet

is a whole program around one of them: it reads the column `text`, finds the duplicates and writes
the other rows.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

NGRAM, SLOTS, BANDS, THRESHOLD, COSINE = 5, 128, 16, 0.8, 0.95
DOCUMENTS, VECTORS = "documents.parquet", "vectors.npy"


def shingles(text):
    return grams(text.lower().split())


def grams(words):
    if len(words) < NGRAM:
        return [" ".join(words)]
    return list(map(" ".join, zip(*(words[k:] for k in range(NGRAM)), strict=False)))


def timed(work, *given):
    """The result, wall seconds, and processor seconds of all threads and ended children."""
    start, cpu = time.perf_counter(), processor_seconds()
    found = work(*given)
    return found, time.perf_counter() - start, processor_seconds() - cpu


def processor_seconds():
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def with_rensa(folder):
    from rensa import RMinHash, RMinHashLSH

    sets = [shingles(text) for text in folder.column.to_pylist()]
    matrix = RMinHash.digest_matrix_from_token_sets(sets, SLOTS, 1)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=SLOTS, num_bands=BANDS)
    return index.query_duplicate_flags_matrix_one_shot(matrix)


def flat_hashes(column):
    """Hashes of the shingles of all documents, uint64, and where those of each start.

    The same shingles as `shingles` makes, by vector steps: words by Arrow, one number for each
    distinct word, and sums of these times powers.
    """
    import pyarrow.compute as pc

    lists = pc.utf8_split_whitespace(pc.utf8_trim_whitespace(pc.utf8_lower(column)))
    ends = lists.offsets.to_numpy().astype(np.int64)
    codes = lists.flatten().dictionary_encode()
    numbers = np.random.default_rng(0).integers(1, 2**64, len(codes.dictionary), np.uint64)
    words = numbers[codes.indices.to_numpy()]
    sizes = np.diff(ends)
    counts = np.maximum(sizes - NGRAM + 1, 1)
    offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])
    at = np.arange(offsets[-1]) + np.repeat(ends[:-1] - offsets[:-1], counts)
    padded = np.concatenate([words, np.zeros(NGRAM, np.uint64)])
    hashes = np.zeros(len(padded) - NGRAM, np.uint64)
    for k in range(NGRAM):
        hashes = hashes * np.uint64(0xD6E8FEB86659FD93) + padded[k : k + len(hashes)]
    hashes = hashes[at]
    for row in np.flatnonzero(sizes < NGRAM):  # what follows is of another document
        hashes[offsets[row]] = hash(words[ends[row] : ends[row + 1]].tobytes()) & (2**64 - 1)
    return hashes ^ (hashes >> np.uint64(32)), offsets.astype(np.uint64)


def with_rensa_flat(folder, digest="digest_matrix_from_flat_token_hashes"):
    from rensa import RMinHash, RMinHashLSH

    matrix = getattr(RMinHash, digest)(*flat_hashes(folder.column), SLOTS, 1)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=SLOTS, num_bands=BANDS)
    return index.query_duplicate_flags_matrix_one_shot(matrix)


def with_rensa_rho(folder):
    return with_rensa_flat(folder, "digest_matrix_from_flat_token_hashes_rho")


def with_gaoya(folder):
    from gaoya.minhash import MinHashStringIndex

    per_band, shape = SLOTS // BANDS, (NGRAM, NGRAM)
    index = MinHashStringIndex(
        32, THRESHOLD, BANDS, per_band, None, "word", True, shape, id_container="smallvec"
    )
    texts = folder.column.to_pylist()
    index.par_bulk_insert_docs(list(range(len(texts))), texts)
    return [min(found, default=row) < row for row, found in enumerate(index.par_bulk_query(texts))]


def with_datasketch(folder):
    from datasketch import MinHash, MinHashLSH

    index = MinHashLSH(threshold=THRESHOLD, num_perm=SLOTS)
    first = MinHash(num_perm=SLOTS)
    flags = []
    for row, text in enumerate(folder.column.to_pylist()):
        sketch = MinHash(num_perm=SLOTS, permutations=first.permutations, scheme=first.scheme)
        sketch.update_batch([shingle.encode() for shingle in shingles(text)])
        flags.append(bool(index.query(sketch)))
        if not flags[-1]:
            index.insert(str(row), sketch)
    return flags


@contextmanager
def quiet():
    """What is printed in here, and in processes started in here, goes nowhere."""
    nowhere, shown = os.open(os.devnull, os.O_WRONLY), os.dup(2)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(shown, 2)
        os.close(nowhere)
        os.close(shown)


def with_datatrove(folder):
    """FineWeb's pipeline of four steps, its own words (spaCy), from Parquet to Parquet."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.dedup import minhash
    from datatrove.pipeline.readers import ParquetReader
    from datatrove.pipeline.writers import ParquetWriter

    config = minhash.MinhashConfig(
        n_grams=NGRAM, num_buckets=BANDS, hashes_per_bucket=SLOTS // BANDS
    )
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as out:
        reader = ParquetReader(str(folder.parts), doc_progress=False)
        sketch = minhash.MinhashDedupSignature(f"{out}/signatures", config)
        buckets = minhash.MinhashDedupBuckets(f"{out}/signatures", f"{out}/buckets", config=config)
        cluster = minhash.MinhashDedupCluster(f"{out}/buckets", f"{out}/remove", config)
        drop = minhash.MinhashDedupFilter(f"{out}/remove")
        writer = ParquetWriter(f"{out}/kept")
        steps = [
            ([reader, sketch], folder.n_parts),
            ([buckets], BANDS),
            ([cluster], 1),
            ([reader, drop, writer], folder.n_parts),
        ]
        for k, (pipeline, tasks) in enumerate(steps):
            with quiet():
                LocalPipelineExecutor(
                    pipeline,
                    tasks=tasks,
                    workers=min(cores, tasks),
                    logging_dir=f"{out}/log{k}",
                    start_method="fork",  # so that their processor time is counted as ours
                ).run()
        kept = set(pq.read_table(f"{out}/kept", columns=["id"]).column("id").to_pylist())
    return [str(row) not in kept for row in range(len(folder.column))]


def with_semhash(folder):
    from semhash import SemHash

    records = [{"text": text} for text in folder.column.to_pylist()]
    index = SemHash.from_embeddings(folder.vectors, records, model=None, columns=["text"])
    kept = {id(line) for line in index.self_deduplicate(COSINE).selected}
    return [id(record) not in kept for record in records]


PEERS = {
    "rensa": with_rensa,
    "rensa_flat": with_rensa_flat,
    "rensa_rho": with_rensa_rho,
    "gaoya": with_gaoya,
    "datasketch": with_datasketch,
    "datatrove": with_datatrove,
    "semhash": with_semhash,
}
SEMANTIC = ("semhash",)
IN_MEMORY = ("rensa", "rensa_flat", "rensa_rho", "gaoya", "datasketch")
NAMES = {
    "rensa": "rensa, lists of shingles",
    "rensa_flat": "rensa, flat hashes",
    "rensa_rho": "rensa, flat hashes, Rho",
    "datatrove": "datatrove, disk to disk",
    "semhash": "semhash, by vectors",
}


class Folder:
    """The documents: in memory, and as Parquet files of about equal size, one for each core."""

    def __init__(self, path):
        self.column = pq.read_table(path / DOCUMENTS)["text"].combine_chunks()
        self.vectors = np.load(path / VECTORS) if (path / VECTORS).exists() else None
        self.parts = path / "parts"
        self.parts.mkdir()
        self.n_parts = len(os.sched_getaffinity(0))
        ids = pa.array([str(row) for row in range(len(self.column))])
        table = pa.table({"id": ids, "text": self.column})
        step = -(-table.num_rows // self.n_parts)
        for k in range(self.n_parts):
            pq.write_table(table.slice(k * step, step), self.parts / f"{k}.parquet")


def serve(path):
    """Answers each peer's name on stdin with the seconds it took (wall, CPU) and its flags."""
    folder = Folder(Path(path))
    said = os.dup(1)
    os.dup2(2, 1)  # what a peer prints is no answer
    for line in sys.stdin:
        flags, *seconds = timed(PEERS[line.strip()], folder)
        answer = json.dumps([*seconds, [int(flag) for flag in flags]])
        os.write(said, f"{answer}\n".encode())


class Peers:
    """The process that has them; one for all rounds."""

    def __init__(self, python, path, names):
        self.names = names
        command = [python, __file__, str(path)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def run(self, name):
        self.process.stdin.write(name + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{name} ended: see its words above")
        wall, cpu, flags = json.loads(answer)
        return wall, cpu, np.array(flags, bool)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


class Column:
    """A folder as far as the tools that work in memory need it."""

    def __init__(self, column):
        self.column = column


def whole(name, source, target):
    """From file to file: what a program around one of the tools does."""
    table = pq.read_table(source)
    flags = PEERS[name](Column(table["text"].combine_chunks()))
    pq.write_table(table.filter(pa.array([not flag for flag in flags])), target)


if __name__ == "__main__":
    if sys.argv[1] == "--whole":
        whole(*sys.argv[2:])
    else:
        serve(sys.argv[1])
