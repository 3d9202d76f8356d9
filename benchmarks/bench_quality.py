"""What the quality rules make of sound instruction data, and how many loops they find.

    SIFTLINE_TEST_DATA=FOLDER .venv/bin/python benchmarks/bench_quality.py [--rows 7473]

Rows are GSM8K's and Natural Instructions', which people wrote and answered: nearly all are sound,
so a removal is nearly always a mistake. Judged are responses, then prompt and response together,
with the defaults and with the thresholds published for web pages, these also on short texts. Loops
are the same responses with their last words over and over, as a canary has them. The last lines say
what the published thresholds saw in ten rows of each, the first by id.
"""

import argparse
import json
import os
import time
from datetime import date
from importlib.metadata import version
from pathlib import Path

import polars as pl

from siftline.kernels.draws import gumbel_top_k, uniforms
from siftline.rows import schema
from siftline.rows.selection import Selection, select
from siftline.stages.canaries import looped
from siftline.stages.quality_rules.decide import QualityRules, Rules
from siftline.stages.quality_rules.run import looker

WEB = {
    "top_n_grams": {"2": 0.2, "3": 0.18, "4": 0.16},
    "dup_n_grams": {"5": 0.15, "6": 0.14, "7": 0.13, "8": 0.12, "9": 0.11, "10": 0.1},
    "line_punct_thr": 0.12,
    "short_line_thr": 0.67,
    "char_duplicates_ratio": 0.01,
    "new_line_ratio": 0.3,
    "min_avg_word_length": 3.0,
    "max_bullet_lines_ratio": 0.9,
    "max_non_alpha_words_ratio": 0.8,
    "min_stop_words": 2,
}
"""Gopher's and FineWeb's, but for the least length."""


def gates(text: str) -> dict[str, QualityRules]:
    """What is compared, by name."""
    web = {n: {"en": Rules(min_words=n, **WEB)} for n in (50, 1)}
    return {
        "defaults, keep en": QualityRules(text=text, keep=("en",)),
        "published": QualityRules(text=text, languages=web[50], identify=False),
        "published, short texts too": QualityRules(text=text, languages=web[1], identify=False),
    }


def read(folder: Path, fields: tuple[str, str], most: int) -> pl.DataFrame:
    """Rows of all files of a folder, `most` of them by hash."""
    files = sorted(path for path in folder.glob("*.jsonl") if path.name != "test.jsonl")
    lines = [line for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    made = []
    for line in lines:
        prompt, response = (json.loads(line)[name] for name in fields)
        turns = [schema.message("user", prompt), schema.message("assistant", response)]
        made.append(schema.make_row(turns, source=folder.name))
    by_id = {row["id"]: row for row in made}
    ids = sorted(by_id)
    chosen = gumbel_top_k(uniforms(0, "bench", ids), ids, min(most, len(ids)))
    return view([by_id[ids[i]] for i in sorted(chosen)])


def view(rows: list[dict]) -> pl.DataFrame:
    """The columns that the gate's looker reads, and the row itself."""
    texts = [[turn["content"] for turn in row["messages"]] for row in rows]
    return pl.DataFrame(
        {
            "id": [row["id"] for row in rows],
            "source": [row["source"] for row in rows],
            "prompt": [prompt for prompt, _ in texts],
            "response": [response for _, response in texts],
        }
    )


def told(name: str, rows: pl.DataFrame, result: Selection, seconds: float) -> None:
    """One line: share removed and the first rules that did it."""
    why = sorted(result.facts["removed"].items(), key=lambda pair: -pair[1])
    rules = ", ".join(f"{rule} {count}" for rule, count in why[:6]) or "-"
    share = result.removed.height / rows.height
    print(f"{name:38} {share:8.2%}  {rows.height / seconds:6.0f} rows/s  {rules}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=7473)
    options = parser.parse_args()
    root = Path(os.environ["SIFTLINE_TEST_DATA"])
    libraries = " ".join(f"{n} {version(n)}" for n in ("datatrove", "spacy", "py3langid"))
    print(f"{date.today()}  {libraries}")
    sets = {
        "gsm8k": ("question", "answer"),
        "natural_instructions": ("input_col", "output_col"),
    }
    shown = []
    for folder, fields in sets.items():
        rows = read(root / folder, fields, options.rows)
        print(f"\n{folder}: {rows.height} rows")
        for text in ("response", "both"):
            for name, gate in gates(text).items():
                look = looker(gate)
                look(rows[:1])  # the tokenizer loads
                started = time.perf_counter()
                result = select(gate, look(rows))
                told(f"{text}, {name}", rows, result, time.perf_counter() - started)
                if (text, name) == ("response", "published"):
                    lost = result.removed.join(rows, on="id").sort("id")
                    shown += lost.head(10).select("reason", "value", "response").rows()
        spoiled = [
            loop["messages"][-1]["content"]
            for row in rows.head(1000).to_dicts()
            if (loop := looped(remade(row), {}))
        ]
        loops = rows.head(len(spoiled)).with_columns(response=pl.Series(spoiled))
        for name, gate in (("defaults", QualityRules()), *list(gates("response").items())[:1]):
            started = time.perf_counter()
            result = select(gate, looker(gate)(loops))
            told(f"loops, {name}", loops, result, time.perf_counter() - started)
    print()
    for reason, value, text in shown:
        print(f"{reason} {value:.2f} {json.dumps(text[:120], ensure_ascii=False)}")


def remade(row: dict) -> dict:
    """A row of the view as a row of a pool."""
    turns = [schema.message("user", row["prompt"]), schema.message("assistant", row["response"])]
    return schema.make_row(turns, source=row["source"])


if __name__ == "__main__":
    main()
