"""Recall of near copies over many seeds: ours beside rensa, each by both tools' words.

    .venv/bin/python benchmarks/dedup_recall.py --texts FILE.jsonl... --peers PYTHON [--seeds 10]

One seed says little: of a thousand pairs 0.05 above the threshold, 16 bands of 8 miss a few by
chance, and which they are is drawn anew with the permutations. Documents and settings are those of
`bench_dedup.py`. A pair counts as found if at least one of its two documents is marked. Words are
ours (punctuation dropped) and theirs (split at white space), so each tool is also measured by the
pairs of the other. Nothing is timed.
"""

import argparse
import json
import os
import subprocess
import tempfile
from datetime import date
from pathlib import Path

import dedup_peers
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

THEIRS = """
import json, sys
import numpy as np, pyarrow.parquet as pq
sys.path.insert(0, sys.argv[1])
import dedup_peers as peers
from rensa import RMinHash, RMinHashLSH
sets = [peers.shingles(text) for text in pq.read_table(sys.argv[2])["text"].to_pylist()]
for seed in range(1, int(sys.argv[3]) + 1):
    matrix = RMinHash.digest_matrix_from_token_sets(sets, peers.SLOTS, seed)
    index = RMinHashLSH(threshold=peers.THRESHOLD, num_perm=peers.SLOTS, num_bands=peers.BANDS)
    flags = index.query_duplicate_flags_matrix_one_shot(matrix)
    np.save(f"{sys.argv[4]}/{seed}.npy", np.array(flags, bool))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--peers", required=True, help="interpreter that has rensa")
    parser.add_argument("--rows", type=int, default=8000)
    parser.add_argument("--seeds", type=int, default=10)
    asked = parser.parse_args()
    from bench_dedup import documents, near_pairs, own_words, pieces_of

    from siftline.deduplication.engine import Settings, deduplicate

    texts = documents(pieces_of(asked.texts), asked.rows)
    column = pa.array(texts)
    flags: dict[str, list[np.ndarray]] = {"siftline": [], "rensa": []}
    for seed in range(1, asked.seeds + 1):
        settings = Settings(threshold=dedup_peers.THRESHOLD, ngram=dedup_peers.NGRAM, seed=seed)
        flags["siftline"].append(~deduplicate(column, settings).kept)
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "documents.parquet"
        pq.write_table(pa.table({"text": column}), path)
        here = str(Path(__file__).parent)
        command = [asked.peers, "-c", THEIRS, here, str(path), str(asked.seeds), place]
        subprocess.run(command, check=True)
        for seed in range(1, asked.seeds + 1):
            flags["rensa"].append(np.load(f"{place}/{seed}.npy"))
    words = {
        "our words": [dedup_peers.grams(own_words(text)) for text in texts],
        "theirs": [dedup_peers.shingles(text) for text in texts],
    }
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=True
    ).stdout.strip()
    print(f"dedup_recall.py, {asked.rows} documents, {asked.seeds} seeds, {date.today()}, {commit}")
    print(f"{os.cpu_count()} CPUs; pairs 0.05 above {dedup_peers.THRESHOLD}; missed of all seeds")
    for name, sets in words.items():
        left, right, value = near_pairs(sets, dedup_peers.THRESHOLD)
        close = value >= dedup_peers.THRESHOLD + 0.05
        left, right = left[close], right[close]
        for tool, marked in flags.items():
            recalls = [float((one[left] | one[right]).mean()) for one in marked]
            said = {
                "words": name,
                "tool": tool,
                "pairs": len(left),
                "missed": int(sum(round((1 - recall) * len(left)) for recall in recalls)),
                "mean": float(np.mean(recalls)),
                "least": min(recalls),
                "marked": float(np.mean([one.mean() for one in marked])),
            }
            print(json.dumps(said), flush=True)


if __name__ == "__main__":
    main()
