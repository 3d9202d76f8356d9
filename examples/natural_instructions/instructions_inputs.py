"""Splits Natural Instructions task files into a pool, evaluation sets and text for a base model.

The files hold input and output of each example but not the task's instruction, which the recipe
gives per source. Every example goes to one split by the hash of its input, so that an input that
occurs in several tasks with different outputs never stands on both sides.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from siftline.kernels.draws import uniforms

STAGE = "instructions split"


def generate(
    out: Path,
    truth: Path,
    *,
    seed: int,
    data: str,
    test_share: float = 0.01,
    dev_share: float = 0.002,
    base_share: float = 0.2,
    limit: int | None = None,
) -> None:
    """Writes pool/<task>.jsonl, test.jsonl, dev.jsonl and corpus.jsonl to `out`.

    Args:
        out: Folder of the input files.
        truth: Not used: nothing is planted here.
        seed: Seed of the split.
        data: Folder with task*.jsonl files of {task, input_col, output_col}.
        test_share: Share of the inputs that go to the test set.
        dev_share: Share that goes to dev.
        base_share: Share that only the base model's corpus gets.
        limit: Most examples of a task; None takes all.

    Raises:
        ValueError: if the folder holds no task file, or the shares leave nothing for the pool.
    """
    if test_share + dev_share + base_share >= 1:
        raise ValueError("test_share, dev_share and base_share leave nothing for the pool")
    files = sorted(Path(data).glob("task*.jsonl"))
    if not files:
        raise ValueError(f"no task*.jsonl in {data}: name the folder of the task files")
    splits: dict[str, list[dict[str, Any]]] = {"test": [], "dev": [], "base": []}
    (out / "pool").mkdir(parents=True, exist_ok=True)
    for file in files:
        rows = list(_rows(file))[:limit]
        pool: list[dict[str, Any]] = []
        for row, u in zip(rows, uniforms(seed, STAGE, [r["input_col"] for r in rows]), strict=True):
            split = _split(float(u), test_share, dev_share, base_share)
            (pool if split == "pool" else splits[split]).append(row)
        _write(out / "pool" / file.name, pool)
    for name in ("test", "dev"):
        _write(out / f"{name}.jsonl", [_question(row) for row in splits[name]])
    texts = [
        {"text": f"Question: {_question(row)['question']}\nAnswer: {row['output_col']}"}
        for row in splits["base"]
    ]
    _write(out / "corpus.jsonl", texts)


def _rows(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            if row["input_col"].strip() and row["output_col"].strip():
                yield row


def _split(u: float, test: float, dev: float, base: float) -> str:
    for name, share in (("test", test), ("dev", dev), ("base", base)):
        if u < share:
            return name
        u -= share
    return "pool"


INSTRUCTIONS: dict[str, str] = {
    "task036": "Name the topic of the given fact in a few words.",
    "task039": "Find the word that both sentences share.",
    "task1195": "Remove the slip from the question and write it fluently.",
    "task121": "Combine the two questions into one that covers both.",
    "task1345": "Write a different question with similar words.",
    "task1385": "Does the premise entail the hypothesis? Entailment, Neutral or Contradiction.",
    "task1386": "Does the premise entail the hypothesis? Entailment, Neutral or Contradiction.",
    "task1516": "Is the hypothesis implied by the premise? positive, negated or neutral.",
    "task1529": "Does the premise support the scientific hypothesis? entails or neutral.",
    "task1562": "Paraphrase the question.",
    "task1612": "Relation of the two sentences: 0 neutral, 1 entailment, 2 contradiction.",
    "task1615": "How does sentence B relate to sentence A? Give the label.",
    "task1622": "Correct the disfluent question.",
    "task190": "Do the sentences agree (E), contradict (C) or neither (N)?",
    "task199": "Do the two sentences speak of the same thing? yes or no.",
    "task200": "Which choice follows from the statement? Give its number.",
    "task281": "Find the words in each sentence that name the same thing.",
    "task329": "Who does the pronoun refer to: A, B or neither?",
    "task346": "Does the POS tag fit the word in the question? True or False.",
    "task738": "Does the perspective support or undermine the claim?",
    "task937": "Is the update a strengthener or a weakener of the hypothesis?",
}
"""Instruction of each task, in our words; the recipe states the same ones."""


def _question(row: dict[str, Any]) -> dict[str, Any]:
    """An evaluation row: the instruction stands in the question, the level is the task."""
    question = f"{INSTRUCTIONS[row['task']]}\n{row['input_col']}"
    output = row["output_col"]
    return {"question": question, "response": output, "answer": output, "level": row["task"]}


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for row in rows:
            file.write(json.dumps(row, ensure_ascii=False, sort_keys=True) + "\n")
