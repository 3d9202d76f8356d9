"""Two worlds of real questions: one in which to choose what to learn, one full of dirt.

Both take Natural Instructions with the instruction of each task in our words (the files lack them),
the first GSM8K too. Test, dev and target rows are of the five tasks in `WANTED`, on which
SmolLM2-135M-Instruct is at 0 % untouched, because it doesn't follow their formats, and learns from
a few hundred rows.

Every question belongs to one part by the order of a hash, and a text that is in test, dev or target
is in no pool, whatever other task it occurs in.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from instructions_inputs import INSTRUCTIONS

from siftline.demo.problems import Dice
from siftline.demo.rows import PoolRow, write_jsonl, write_pool
from siftline.kernels.draws import hash64
from siftline.rows.schema import canonical_text

WANTED = ("task1386", "task1516", "task039", "task738", "task937")
"""Inference in two forms, a shared word, a perspective on a claim, an update of a hypothesis."""
MATHEMATICS = "gsm8k"
REST = ("north", "south")
"""Who answered in the second world; each of them makes every mistake as often as the other."""


@dataclass(frozen=True)
class Example:
    """One question of a task, with the answer of the data set."""

    task: str
    text: str
    answer: str

    @property
    def question(self) -> str:
        """The task's instruction and the text."""
        return f"{INSTRUCTIONS[self.task]}\n{self.text}" if self.task in INSTRUCTIONS else self.text

    def row(self) -> dict[str, str]:
        """A row of an evaluation set; its level is the task."""
        return {
            "question": self.question,
            "response": self.answer,
            "answer": self.answer,
            "source": self.task,
            "level": self.task,
        }


@dataclass(frozen=True)
class Parts:
    """The rows of each evaluation set, and what is left of each task, in the order of a hash."""

    target: list[Example]
    dev: list[Example]
    test: list[Example]
    rest: dict[str, list[Example]]

    def write(self, out: Path) -> None:
        """Writes the evaluation sets as JSONL."""
        for name in ("target", "dev", "test"):
            write_jsonl(out / f"{name}.jsonl", (example.row() for example in getattr(self, name)))


def choosing(
    out: Path,
    truth: Path,
    *,
    seed: int,
    data: str,
    per_task: int = 100,
    test: int = 80,
    dev: int = 20,
    target: int = 8,
) -> None:
    """Writes the first world: a pool of 21 tasks and GSM8K, of which five tasks are wanted.

    Args:
        out: Folder of the input files.
        truth: Not used: nothing is planted here.
        seed: Seed of every draw.
        data: Folder that holds natural_instructions/task*.jsonl and gsm8k/train.jsonl.
        per_task: Most pool rows of a task, and of GSM8K.
        test: Test rows of each wanted task.
        dev: Dev rows of each.
        target: Target rows of each.

    Raises:
        ValueError: if a file is missing.
    """
    parts = _parts(Path(data), INSTRUCTIONS, seed, test, dev, target)
    parts.write(out)
    pool = [example for task in parts.rest.values() for example in task[:per_task]]
    pool += _mathematics(Path(data) / "gsm8k" / "train.jsonl", seed)[:per_task]
    rows = [PoolRow(e.question, e.answer, None, e.task) for e in pool]
    write_pool(out, truth, rows, seed)


def dirt(
    out: Path,
    truth: Path,
    *,
    seed: int,
    data: str,
    per_task: int = 300,
    test: int = 80,
    dev: int = 20,
    target: int = 8,
    referenced: float = 0.4,
    swapped: float = 0.35,
    truncated: float = 0.1,
    off_topic: float = 0.1,
    copies: float = 0.1,
    leaked: float = 0.1,
) -> None:
    """Writes the second world: the five tasks, with a stated share of the rows spoilt.

    What is wrong with a row stands in the truth folder alone. Rows with and without a reference
    answer (of someone who knows) are spoilt alike.

    Args:
        out: Folder of the input files.
        truth: Folder of the truth.
        seed: Seed of every draw.
        data: Folder that holds natural_instructions/task*.jsonl.
        per_task: Questions of each task in the pool.
        test: Test rows of each task.
        dev: Dev rows of each.
        target: Target rows of each.
        referenced: Share of the questions that have a reference answer.
        swapped: Share of the questions whose answer is another one of the same task.
        truncated: Share whose answer is cut in the middle.
        off_topic: Share whose answer is one of another task.
        copies: Near copies of sound rows, as a share of the questions.
        leaked: Share of the test rows that are in the pool too, with the right answer.

    Raises:
        ValueError: if a file is missing, or the shares leave no sound row.
    """
    if swapped + truncated + off_topic >= 1:
        raise ValueError("swapped, truncated and off_topic leave no sound row: lower them")
    parts = _parts(Path(data), WANTED, seed, test, dev, target)
    parts.write(out)
    questions = [e for task in parts.rest.values() for e in task[:per_task]]
    spoilt = (
        ("wrong", swapped),
        ("truncated", truncated),
        ("off_topic", off_topic),
    )
    rows = [_answered(e, questions, spoilt, referenced, seed) for e in questions]
    sound = [row for row in rows if row.defect is None]
    rows += [_copy(row, seed) for row in _drawn(sound, round(copies * len(questions)), seed)]
    by_question = sorted(parts.test, key=lambda e: (hash64(seed, "leak", e.question), e.question))
    rows += [_leak(e, seed) for e in by_question[: round(leaked * len(parts.test))]]
    write_pool(out, truth, rows, seed)


# ---- reading ------------------------------------------------------------------------------------


def _parts(
    data: Path, tasks: Sequence[str] | dict[str, str], seed: int, test: int, dev: int, target: int
) -> Parts:
    found = {task: _examples(data, task, seed) for task in sorted(tasks)}
    taken: dict[str, list[Example]] = {"test": [], "dev": [], "target": []}
    held: set[str] = set()
    for task in WANTED:
        start = 0
        for name, size in (("test", test), ("dev", dev), ("target", target)):
            part = found[task][start : start + size]
            if len(part) < size:
                raise ValueError(f"{task} has only {len(found[task])} questions: ask for fewer")
            taken[name] += part
            held |= {example.text for example in part}
            start += size
    rest = {task: [e for e in examples if e.text not in held] for task, examples in found.items()}
    return Parts(rest=rest, **taken)


def _examples(data: Path, task: str, seed: int) -> list[Example]:
    """The distinct questions of a task in the order of a hash, so that any cut is a draw."""
    found: dict[str, Example] = {}
    for line in _lines(data / "natural_instructions" / f"{task}.jsonl"):
        text, answer = canonical_text(line["input_col"]), canonical_text(line["output_col"])
        if text.strip() and answer.strip():
            found.setdefault(text, Example(task, text, answer))
    return sorted(found.values(), key=lambda e: (hash64(seed, "world", e.text), e.text))


def _mathematics(file: Path, seed: int) -> list[Example]:
    found = {}
    for line in _lines(file):
        text, answer = canonical_text(line["question"]), canonical_text(line["answer"])
        found.setdefault(text, Example(MATHEMATICS, text, answer))
    return sorted(found.values(), key=lambda e: (hash64(seed, "world", e.text), e.text))


def _lines(file: Path) -> list[dict[str, str]]:
    if not file.is_file():
        raise ValueError(
            f"{file} is missing: data must be a folder with natural_instructions/ and gsm8k/"
        )
    with file.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


# ---- dirt ---------------------------------------------------------------------------------------


def _answered(
    example: Example,
    others: Sequence[Example],
    spoilt: Sequence[tuple[str, float]],
    referenced: float,
    seed: int,
) -> PoolRow:
    """A question as somebody answered it, rightly or not."""
    dice = Dice(seed, "dirt", example.question)
    u, kind = dice.unit("kind"), None
    for name, share in spoilt:
        if u < share:
            kind = name
            break
        u -= share
    known = dice.unit("reference") < referenced
    response = example.answer
    if kind == "wrong":
        response = _another(example, others, dice)
        kind = "wrong_vs_reference" if known else "wrong_without_reference"
    elif kind == "off_topic":
        response = dice.pick([e.answer for e in others if e.task != example.task], "other task")
    elif kind == "truncated":
        response = example.answer[: max(1, len(example.answer) // 2)].rstrip()
        # Half of a word of one letter is that word.
        kind = kind if response != example.answer else None
    return PoolRow(
        question=example.question,
        response=response,
        answer=example.answer if known else None,
        source=dice.pick(REST, "who"),
        defect=kind,
        clean_response=example.answer,
        true_answer=example.answer,
    )


def _another(example: Example, others: Sequence[Example], dice: Dice) -> str:
    """Another answer of the task: another label, or another word of the question's own text."""
    answers = sorted({e.answer for e in others if e.task == example.task})
    if len(answers) > 10:
        answers = sorted({w for w in example.text.replace(".", " ").split() if w.isalpha()})
        answers = [word for word in answers if word.islower() and len(word) > 3] or ["nothing"]
    wrong = [a for a in answers if a.lower() != example.answer.lower()] or ["nothing"]
    return dice.pick(wrong, "wrong")


def _drawn(rows: Sequence[PoolRow], size: int, seed: int) -> list[PoolRow]:
    return sorted(rows, key=lambda row: (hash64(seed, "copy", row.id), row.id))[:size]


def _copy(row: PoolRow, seed: int) -> PoolRow:
    """The same question with other punctuation, and the same answer."""
    mark = Dice(seed, "copy", row.id).pick(("?", "."), "mark")
    return PoolRow(
        question=f"{row.question} {mark}",
        response=row.response,
        answer=row.answer,
        source=row.source,
        defect="near_duplicate",
        twin=row.id,
        clean_response=row.clean_response,
        true_answer=row.true_answer,
    )


def _leak(example: Example, seed: int) -> PoolRow:
    who = Dice(seed, "leak", example.question).pick(REST, "who")
    return PoolRow(
        question=example.question,
        response=example.answer,
        answer=None,
        source=who,
        defect="leaked_test",
        clean_response=example.answer,
        true_answer=example.answer,
    )
