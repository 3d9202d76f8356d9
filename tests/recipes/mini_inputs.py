"""The generator of the mini recipe: the demo's, plus lines the demo does not plant.

It stands beside the recipe and is found through PYTHONPATH, as a user's own generator would be.
"""

import json
import random
from pathlib import Path

from siftline.demo.arithmetic import generate as generate_demo

WORDS = (
    "three little birds sang all morning", "our neighbour planted roses last spring",
    "a ferry crossed the harbour at noon", "the baker burned two trays of bread",
    "snow fell on every northern village", "my cousin repaired an old typewriter",
    "they painted the lighthouse bright red", "a farmer sold seven sacks of barley",
    "the orchestra rehearsed until midnight", "children chased kites along the beach",
)  # fmt: skip
BROKEN = '{"question": "What is left of a line that was cut'
"""A line that is no JSON: it goes to quarantine."""


def easy_rows() -> list[dict[str, str]]:
    """Rows a model of no skill solves now and then: the answer is 1 or 2, whatever is asked."""
    return [
        {
            "question": f"If {words}, which digit comes up?",
            "response": f"That makes {1 + i % 2} for sure.\n#### {1 + i % 2}",
            "answer": str(1 + i % 2),
            "source": "easy",
        }
        for i, words in enumerate(WORDS)
    ]


def generate(out: Path, truth: Path, *, seed: int, **sizes: int) -> None:
    """Writes the demo's files, then adds easy rows, one identical line and one broken line."""
    generate_demo(out, truth, seed=seed, **sizes)
    rows = easy_rows()
    lines = [json.dumps(row) for row in (*rows, rows[0])]
    with (out / "pool.jsonl").open("a", encoding="utf-8", newline="\n") as file:
        file.write("\n".join([*lines, BROKEN]) + "\n")
    drawn = random.Random(seed)
    with (out / "corpus.jsonl").open("a", encoding="utf-8", newline="\n") as file:
        for _ in range(1500):
            words, digit = drawn.choice(WORDS), drawn.randint(1, 2)
            text = (
                f"Question: If {words}, which digit comes up?\nAnswer: It is {digit}.\n#### {digit}"
            )
            file.write(json.dumps({"text": text}) + "\n")


def brevity(rows, least=0):
    """A scorer by import path: short responses score high, those under `least` have no score."""
    lengths = [len(row["messages"][-1]["content"]) for row in rows]
    return [None if n < least else 1 / (1 + n) for n in lengths]
