"""Near duplicates from Parquet to Parquet by rensa, fed as fast as pyarrow and numpy can.

    PYTHON benchmarks/rensa_files.py IN.parquet OUT

What `bench_start.py --rensa PYTHON` holds `siftline dedup` against: word 5-grams as 64-bit hashes
in one flat array, no Python object a word, 128 slots in 16 bands, threshold 0.8, no verification.
"""

import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from rensa import RMinHash, RMinHashLSH

NGRAM, SLOTS, BANDS, THRESHOLD = 5, 128, 16, 0.8


def flat_hashes(text):
    """Hashes of all word 5-grams of all rows, and where each row's start; uint64."""
    words = pc.utf8_split_whitespace(pc.utf8_lower(text)).combine_chunks()
    known = words.flatten().dictionary_encode()
    table = np.random.default_rng(0).integers(0, 2**64, len(known.dictionary), dtype=np.uint64)
    units = table[known.indices.to_numpy()]
    sizes = pc.list_value_length(words).to_numpy().astype(np.int64)
    grams = np.maximum(sizes - NGRAM + 1, 0)
    last = max(len(units) - NGRAM + 1, 0)
    rolled = np.zeros(last, np.uint64)
    for k in range(NGRAM):
        rolled = rolled * np.uint64(0xD6E8FEB86659FD93) + units[k : last + k]
    starts = np.cumsum(sizes) - sizes
    edge = np.zeros(len(units) + 1, np.int32)
    np.add.at(edge, starts[grams > 0], 1)
    np.add.at(edge, (starts + grams)[grams > 0], -1)
    inside = np.cumsum(edge)[:last] > 0  # no window over the end of a row
    return rolled[inside], np.concatenate([[0], np.cumsum(grams)]).astype(np.uint64)


def main(source, out):
    table = pq.read_table(source)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(*flat_hashes(table["text"]), SLOTS, 1)
    index = RMinHashLSH(threshold=THRESHOLD, num_perm=SLOTS, num_bands=BANDS)
    gone = pa.array(np.array(index.query_duplicate_flags_matrix_one_shot(matrix), bool))
    folder = Path(out)
    folder.mkdir()
    pq.write_table(table.filter(pc.invert(gone)), folder / "kept.parquet", compression="zstd")
    pq.write_table(table.filter(gone), folder / "removed.parquet", compression="zstd")


if __name__ == "__main__":
    main(*sys.argv[1:])
