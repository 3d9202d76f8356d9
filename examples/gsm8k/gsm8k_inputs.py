"""Four rows for each question of GSM8K, where the data set has one.

Each pool question keeps its original solution and gets three more: reformatted (the same steps in
another form), one step wrong (a calculation is changed and everything computed from it follows, up
to the final answer), and truncated. The four kinds are dealt to four sources at random, question by
question, and wrong and truncated solutions come in any of the forms, so neither source nor form
tells them apart. Every row carries the independent answer of the data set.

The train questions are cut in three by a hash of the question: `base_share` of them train the small
base model (corpus.jsonl) and are in no other file, `dev` are the dev set, the rest are the pool.
test.jsonl of the data set becomes the test set and is read for nothing else.

Levels are the number of calculations in the original solution, at most 6.
"""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from gsm8k_sums import decimal_text, evaluate

from siftline.demo.defects import ALPHABET, TEXT
from siftline.demo.problems import Dice
from siftline.demo.rows import PoolRow, write_jsonl, write_pool
from siftline.kernels.draws import hash64
from siftline.rows.schema import canonical_text
from siftline.scoring.answers.find import extract_answer
from siftline.scoring.measures.consistency import REFLECTION

SOURCES = ("north", "east", "south", "west")
FORMS = ("original", "steps", "list", "paragraph")
HARDEST = 6
_MARK = re.compile(r"<<([^<>=]*)=([^<>]*)>>")
_NUMBER = re.compile(r"(?<![\d.,])\d+(?:,\d{3})*(?:\.\d+)?")
_SHIFTS = (1, -1, 2, -2, 5, 10, -10, 3)


@dataclass(frozen=True)
class Solved:
    """A question with its solution.

    Attributes:
        question: The text.
        body: The steps with calculator marks, one a line, without the final line.
        answer: The final answer as written.
    """

    question: str
    body: str
    answer: str

    @property
    def level(self) -> int:
        """Number of calculations, 1 to `HARDEST`."""
        return min(max(len(_MARK.findall(self.body)), 1), HARDEST)


def generate(
    out: Path,
    truth: Path,
    *,
    seed: int,
    data: str,
    limit: int | None = None,
    base_share: float = 0.3,
    dev: int = 200,
) -> None:
    """Writes pool, dev, test and corpus files under `out` and the pool's truth under `truth`.

    Args:
        out: Folder of the input files.
        truth: Folder of the truth; must not lie inside `out` nor be it.
        seed: Seed of every draw.
        data: Folder with GSM8K's train.jsonl and test.jsonl.
        limit: Most train and most test questions to use, drawn by a hash; None for all.
        base_share: Share of the train questions held back for the base model.
        dev: Train questions held back as the dev set; at most a tenth of them is taken.

    Raises:
        ValueError: if a file is missing or has a line that is not GSM8K's, or a number is out of
            range.
    """
    if not 0 < base_share < 0.9 or dev < 1:
        raise ValueError(f"base_share {base_share} must be in (0, 0.9), dev {dev} at least 1")
    if out.resolve() in (truth.resolve(), *truth.resolve().parents):
        raise ValueError(f"truth folder {truth} lies in the input folder {out}: choose another")
    train = _read(Path(data) / "train.jsonl", seed, limit)
    test = _read(Path(data) / "test.jsonl", seed, limit)
    if len(train) < 10:
        raise ValueError(f"{len(train)} train questions are too few: raise limit to 10 or more")
    held_back, dev_size = max(1, round(base_share * len(train))), min(dev, len(train) // 10)
    base, rest = train[:held_back], train[held_back:]
    rows = [row for solved in rest[dev_size:] for row in variants(solved, seed)]
    write_pool(out, truth, rows, seed)
    for name, questions in (("dev", rest[:dev_size]), ("test", test)):
        write_jsonl(out / f"{name}.jsonl", (_evaluation_row(solved) for solved in questions))
    write_jsonl(out / "corpus.jsonl", ({"text": text} for text in _corpus(base, seed)))


def _read(path: Path, seed: int, limit: int | None) -> list[Solved]:
    """The distinct questions of a file in the order of a hash, so that any cut is a draw."""
    if not path.is_file():
        raise ValueError(
            f"{path} is missing: data must be a folder with train.jsonl and test.jsonl"
        )
    found: dict[str, Solved] = {}
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            try:
                fields = json.loads(line)
                question, solution = str(fields["question"]), str(fields["answer"])
                body, answer = solution.rsplit("####", 1)
            except (ValueError, KeyError, TypeError) as error:
                raise ValueError(
                    f"{path} line {number} is not a GSM8K row (question, answer with ####): {error}"
                ) from error
            question = canonical_text(question)
            found.setdefault(question, Solved(question, canonical_text(body), answer.strip()))
    ordered = sorted(found.values(), key=lambda s: (hash64(seed, "gsm8k", s.question), s.question))
    return ordered[:limit]


def variants(solved: Solved, seed: int) -> Iterator[PoolRow]:
    """Yields the four rows of one question: original, reformatted, one step wrong, truncated."""
    dice = Dice(seed, "variants", solved.question)
    sources = dice.shuffled(SOURCES, "sources")
    # Without calculator marks the other forms would differ from the original in white space alone.
    other = dice.pick(FORMS[1:], "form") if _MARK.search(solved.body) else "steps"
    forms = ["original", other, *dice.shuffled(FORMS, "forms")[:2]]
    wrong_body, wrong_answer = wrong_step(solved, dice)
    clean = [write(solved.body, solved.answer, form) for form in forms]
    responses = [
        clean[0],
        clean[1],
        write(wrong_body, wrong_answer, forms[2]),
        truncate(clean[3], dice),
    ]
    defects = (None, None, "wrong_vs_reference", "truncated")
    for response, defect, source, wanted in zip(responses, defects, sources, clean, strict=True):
        yield PoolRow(
            question=solved.question,
            response=response,
            answer=solved.answer,
            source=source,
            defect=defect,
            clean_response=wanted,
            true_answer=solved.answer,
            level=solved.level,
        )


def write(body: str, answer: str, form: str) -> str:
    """Writes a solution in one of the `FORMS`; only the original keeps its calculator marks."""
    if form == "original":
        return f"{body}\n#### {answer}"
    lines = [line.strip() for line in _MARK.sub("", body).split("\n") if line.strip()]
    if form == "steps":
        steps = [f"Step {i}: {line}" for i, line in enumerate(lines, 1)]
        return "\n".join([*steps, f"#### {answer}"])
    if form == "list":
        return "\n".join([*(f"- {line}" for line in lines), f"The answer is {answer}."])
    assert form == "paragraph", form
    sentences = [line if line[-1] in ".!?" else f"{line}." for line in lines]
    return " ".join([*sentences, f"\\boxed{{{answer}}}"])


def truncate(response: str, dice: Dice) -> str:
    """Cuts a response in its second half, before its final answer or anything that reads as one."""
    end = max(response.rfind(mark) for mark in ("####", "The answer is", "\\boxed"))
    length = dice.integer(min(len(response) // 2, end), end, "cut")
    while length > 1 and extract_answer(response[:length]) is not None:
        length -= 1
    return response[:length].rstrip(" #\n")


def wrong_step(solved: Solved, dice: Dice) -> tuple[str, str]:
    """Changes one calculation and carries the change to the final answer.

    Where a solution marks no calculation that reaches its answer (about one in fifteen), the last
    step itself states another answer.

    Returns:
        The spoiled body and the wrong final answer.
    """
    marks = range(len(_MARK.findall(solved.body)))
    tries = [(m, s) for m in dice.shuffled(marks, "where") for s in dice.shuffled(_SHIFTS, m)]
    for step, shift in tries:
        spoiled = _carry(solved, step, shift)
        if spoiled is not None:
            return spoiled
    value = Fraction(solved.answer.replace(",", ""))
    wrong = decimal_text(value + dice.integer(1, 9, "fallback"))
    assert wrong is not None
    changed = {solved.answer.replace(",", ""): wrong}
    *before, last = solved.body.split("\n")
    return "\n".join([*before, _swap(last, changed)]), wrong


def _carry(solved: Solved, step: int, shift: int) -> tuple[str, str] | None:
    """Adds `shift` to the result of one calculation and recomputes what follows from it."""
    changed: dict[str, str] = {}
    pieces, position = [], 0
    for index, mark in enumerate(_MARK.finditer(solved.body)):
        pieces.append(_swap(solved.body[position : mark.start()], changed))
        formula, old = _swap(mark[1], changed), mark[2].replace(",", "").strip()
        value = evaluate(formula if formula != mark[1] or index == step else old)
        if value is None:
            return None
        new = decimal_text(value + (shift if index == step else 0))
        if new is None or new.startswith("-") or new == "0":
            return None
        changed.pop(old, None)
        if new != old:
            changed[old] = new
        position = mark.end()
        shown = _NUMBER.match(solved.body[position:])
        if shown and shown[0].replace(",", "") == old:
            position += len(shown[0])
            pieces.append(f"<<{formula}={new}>>{new}")
        else:
            pieces.append(f"<<{formula}={new}>>")
    pieces.append(_swap(solved.body[position:], changed))
    answer = _swap(solved.answer, changed)
    return None if answer == solved.answer else ("".join(pieces), answer)


def _swap(text: str, changed: dict[str, str]) -> str:
    """Replaces the numbers of a text that have changed."""
    return _NUMBER.sub(lambda m: changed.get(m[0].replace(",", ""), m[0]), text)


def _evaluation_row(solved: Solved) -> dict[str, str | int]:
    return {
        "question": solved.question,
        "answer": solved.answer,
        "response": write(solved.body, solved.answer, "original"),
        "level": solved.level,
    }


def _corpus(base: Sequence[Solved], seed: int) -> Iterator[str]:
    """Per held-back question: its solution in two forms, and a right or wrong verdict exercise."""
    yield ALPHABET
    for solved in base:
        dice = Dice(seed, "corpus", solved.question)
        for form in ("original", dice.pick(FORMS[1:], "form")):
            response = write(solved.body, solved.answer, form)
            yield TEXT.format(question=solved.question, response=response)
        right = dice.unit("right") < 0.5
        body, answer = (solved.body, solved.answer) if right else wrong_step(solved, dice)
        proposed = write(body, answer, dice.pick(FORMS, "proposed"))
        asked = REFLECTION.format(prompt=solved.question, response=proposed)
        yield TEXT.format(question=asked, response="A" if right else "B")
