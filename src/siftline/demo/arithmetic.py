"""The demo's input: a pool of answered word problems with planted defects, and its truth.

    siftline.demo.arithmetic.generate(out, truth, seed=0)

writes `pool.jsonl`, `test.jsonl`, `dev.jsonl`, `target.jsonl` and `corpus.jsonl` (text for the base
model) under `out`, and `rows.jsonl` under `truth`. The same arguments give the same bytes.

Why a curated pool should beat a random draw here, without any tuning: about a quarter of the pool's
rows teach something wrong (other answers, answers without an end, other topics) or nothing new
(copies), and a draw spends its budget on them in proportion. The base model has read problems of
the same kind, mostly easy ones and with `noise` of the same errors, so it is right often on level 1
and hardly ever on level 4, and there is room above it. No problem is in two sets, and no clean
question shares a run of eight words with the test, dev or target set.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from siftline.demo.defects import (
    ALPHABET,
    drill,
    off_topic,
    reword,
    truncate,
    verdict_exercise,
    worked_example,
    wrong_steps,
)
from siftline.demo.problems import LEVELS, SOURCES, Dice, Problem, make_problem, render, style_of
from siftline.demo.rows import PoolRow, write_jsonl, write_pool
from siftline.kernels.draws import hash64
from siftline.kernels.text.words import words
from siftline.stages.canaries import similarity

OVERLAP = 8
"""Words in a run that no clean question shares with a test, dev or target question."""
NEAR = 0.88
"""Similarity that a planted near duplicate keeps, in prompt and in response."""
_POOL_LEVELS = (0.25, 0.25, 0.25, 0.25)
DRILLS = 0.25
"""Drills per text of the corpus: a small model learns to add from them sooner than from stories."""
_CORPUS_LEVELS = (0.45, 0.30, 0.17, 0.08)


@dataclass(frozen=True)
class Rates:
    """How often each defect is planted, as a share of the rows before planting.

    Attributes:
        exact_duplicate: The same prompt and response under another source (rows added).
        near_duplicate: A clean row reworded a little, same numbers (rows added).
        wrong_vs_reference: A calculation is wrong; the reference is right.
        wrong_with_reference: All of a prompt's rows and its reference agree on a wrong answer.
        truncated: The response ends before its final answer.
        off_topic: Another subject altogether, no reference (rows added).
        leaked_test: A test row, half of them verbatim, half reworded (rows added).
        conflict: A prompt of clean rows gets one with another answer and reference (rows added).
        unreferenced: Not a defect: clean prompts whose rows have no reference, so that a missing
            reference does not point at the off-topic rows.
    """

    exact_duplicate: float = 0.05
    near_duplicate: float = 0.05
    wrong_vs_reference: float = 0.06
    wrong_with_reference: float = 0.05
    truncated: float = 0.05
    off_topic: float = 0.05
    leaked_test: float = 0.03
    conflict: float = 0.03
    unreferenced: float = 0.10

    def __post_init__(self) -> None:
        for field in fields(self):
            rate = getattr(self, field.name)
            if not 0 <= rate <= 0.2:
                raise ValueError(f"{field.name} is {rate}: give a share from 0 to 0.2")


def generate(
    out: Path,
    truth: Path,
    *,
    seed: int,
    prompts: int = 1000,
    test: int = 400,
    dev: int = 100,
    target: int = 100,
    corpus: int = 20000,
    noise: float = 0.10,
    verdicts: float = 0.10,
    **rates: float,
) -> None:
    """Writes the demo's files.

    Args:
        out: Folder of the input files.
        truth: Folder of the truth; must not lie inside `out` nor be it.
        seed: Seed of every draw.
        prompts: Distinct questions of the pool before planting; each has two or three answers.
        test: Rows of the test set, the four levels in turn.
        dev: Rows of the dev set.
        target: Rows of the target set.
        corpus: Texts of the base model's corpus.
        noise: Share of the corpus's worked examples that are wrong or truncated.
        verdicts: Share of the corpus's texts that are verdict exercises, which are twice as long as
            worked examples.
        rates: See `Rates`.

    Raises:
        ValueError: if a number is out of range, a rate unknown, or the folders overlap.
    """
    planted = _check(out, truth, rates, prompts, test, dev, target, corpus, noise, verdicts)
    sets = make_sets(
        seed, {"test": test, "dev": dev, "target": target, "pool": prompts, "corpus": corpus}
    )
    for name in ("test", "dev", "target"):
        write_jsonl(out / f"{name}.jsonl", (_evaluation_row(seed, p) for p in sets[name]))
    rows = plant(seed, sets["pool"], sets["test"], planted)
    write_pool(out, truth, rows, seed)
    texts = _corpus(seed, sets["corpus"], noise, verdicts)
    write_jsonl(out / "corpus.jsonl", ({"text": text} for text in texts))


def _check(out: Path, truth: Path, rates: dict[str, float], *sizes: float) -> Rates:
    known = {field.name for field in fields(Rates)}
    for name in rates:
        if name not in known:
            raise ValueError(f"unknown argument {name!r}: rates are {', '.join(sorted(known))}")
    planted = Rates(**rates)
    prompts, test, dev, target, corpus, *shares = sizes
    if min(prompts, test, dev, target, corpus) < 1 or not all(0 <= s < 1 for s in shares):
        raise ValueError(
            f"prompts {prompts}, test {test}, dev {dev}, target {target} and corpus {corpus} must "
            f"be at least 1, noise {shares[0]} and verdicts {shares[1]} in [0, 1)"
        )
    if 3 * planted.leaked_test * prompts > test:
        raise ValueError(f"test is {test}: too few for leaked_test {planted.leaked_test}, raise it")
    if out.resolve() in (truth.resolve(), *truth.resolve().parents):
        raise ValueError(f"truth folder {truth} lies in the input folder {out}: choose another")
    return planted


def make_sets(seed: int, sizes: dict[str, int]) -> dict[str, list[Problem]]:
    """Makes sets of problems, none in two sets.

    Args:
        seed: Seed of every draw.
        sizes: Problems per set. Sets named pool and corpus draw their levels, the others take the
            four in turn and guard their runs of `OVERLAP` words against all that comes after.
    """
    seen: set[str] = set()
    guarded: set[tuple[str, ...]] = set()
    sets: dict[str, list[Problem]] = {}
    weights = {"pool": _POOL_LEVELS, "corpus": _CORPUS_LEVELS}
    for name, size in sizes.items():
        sets[name] = []
        for index in range(size):
            if name in weights:
                level = _level(Dice(seed, f"{name} level", str(index)), weights[name])
            else:
                level = LEVELS[index % len(LEVELS)]
            problem = _fresh(seed, name, index, level, seen, guarded)
            sets[name].append(problem)
            seen.add(problem.question)
            if name not in weights:
                guarded |= word_runs(problem.question)
    return sets


def _fresh(
    seed: int, name: str, index: int, level: int, seen: set[str], guarded: set[tuple[str, ...]]
) -> Problem:
    for attempt in range(1000):
        problem = make_problem(Dice(seed, f"{name} problem", f"{index}.{attempt}"), level)
        if problem.question not in seen and guarded.isdisjoint(word_runs(problem.question)):
            return problem
    raise ValueError(f"{name} asks for more problems of level {level} than there are: make it less")


def _level(dice: Dice, weights: Sequence[float]) -> int:
    u = dice.unit("level")
    for level, weight in zip(LEVELS, weights, strict=True):
        u -= weight
        if u < 0:
            return level
    return LEVELS[-1]


def word_runs(text: str) -> set[tuple[str, ...]]:
    """The runs of `OVERLAP` words of a text; a shorter text is one run."""
    parts = words(text).split()
    return {tuple(parts[i : i + OVERLAP]) for i in range(max(1, len(parts) - OVERLAP + 1))}


def plant(
    seed: int, pool: Sequence[Problem], test: Sequence[Problem], rates: Rates
) -> list[PoolRow]:
    """Answers the pool's problems and plants the defects.

    Args:
        seed: Seed of every draw.
        pool: The pool's problems.
        test: The test set's, some of which leak.
        rates: Shares of defects.

    Returns:
        All rows with their truth, in no meaningful order.
    """
    planter = _Planter(seed, rates, *_answer_all(seed, pool, rates))
    planter.spoil()
    rows = [*planter.rows, *planter.copies(), *planter.conflicts()]
    rows += _leaked(seed, test, planter.count(rates.leaked_test))
    return rows + _chatter(seed, planter.count(rates.off_topic))


def _answer_all(
    seed: int, pool: Sequence[Problem], rates: Rates
) -> tuple[list[PoolRow], dict[str, Problem]]:
    """The rows before planting: each problem answered by two or three sources."""
    questions = sorted(pool, key=lambda p: hash64(seed, "prompt order", p.question))
    wrong = round(rates.wrong_with_reference * len(pool))
    silent = wrong + round(rates.unreferenced * len(pool))
    rows: list[PoolRow] = []
    for rank, problem in enumerate(questions):
        dice = Dice(seed, "answers", problem.question)
        mislabelled = rank < wrong
        steps = wrong_steps(problem.steps, dice) if mislabelled else problem.steps
        for source in dice.shuffled(range(len(SOURCES)), "sources")[: dice.integer(2, 3, "count")]:
            style, words_of = style_of(source, dice), Dice(seed, "wording", problem.question)
            rows.append(
                PoolRow(
                    question=problem.question,
                    response=render(style, steps, words_of),
                    answer=None if wrong <= rank < silent else str(steps[-1].value),
                    source=SOURCES[source],
                    defect="wrong_with_reference" if mislabelled else None,
                    clean_response=render(style, problem.steps, words_of),
                    true_answer=str(problem.answer),
                    level=problem.level,
                )
            )
    return rows, {problem.question: problem for problem in pool}


class _Planter:
    """Plants defects in answered rows; `rows` are the rows so far."""

    def __init__(
        self, seed: int, rates: Rates, rows: list[PoolRow], problems: dict[str, Problem]
    ) -> None:
        self.seed, self.rates, self.rows, self.problems = seed, rates, rows, problems
        self.base = len(rows)

    def count(self, rate: float) -> int:
        """How many rows a rate means."""
        return round(rate * self.base)

    def _chosen(self, defect: str, rows: Sequence[PoolRow], count: int) -> list[PoolRow]:
        ordered = sorted(rows, key=lambda row: (hash64(self.seed, defect, row.id), row.id))
        return ordered[:count]

    def spoil(self) -> None:
        """Replaces clean rows that have a reference by wrong and by truncated ones."""
        clean = [row for row in self.rows if row.defect is None and row.answer is not None]
        wrong = self.count(self.rates.wrong_vs_reference)
        chosen = self._chosen("spoil", clean, wrong + self.count(self.rates.truncated))
        spoiled = {}
        for rank, row in enumerate(chosen):
            dice = Dice(self.seed, "spoil", row.id)
            if rank < wrong:
                response, defect = self._wrong(row, dice)[0], "wrong_vs_reference"
            else:
                response, defect = truncate(row.response, dice), "truncated"
            spoiled[row.id] = replace(row, response=response, defect=defect)
        self.rows = [spoiled.get(row.id, row) for row in self.rows]

    def _wrong(self, row: PoolRow, dice: Dice) -> tuple[str, str]:
        """A wrong response in a drawn style, and its final answer."""
        steps = wrong_steps(self.problems[row.question].steps, dice)
        wording = Dice(self.seed, "wording", row.question)
        style = style_of(SOURCES.index(row.source), Dice(self.seed, "answers", row.question))
        return render(style, steps, wording), str(steps[-1].value)

    def copies(self) -> Iterator[PoolRow]:
        """Yields exact and near duplicates of clean rows, each of another row."""
        clean = [row for row in self.rows if row.defect is None]
        exact = self.count(self.rates.exact_duplicate)
        near = self.count(self.rates.near_duplicate)
        for rank, row in enumerate(self._chosen("copy", clean, exact + near)):
            dice = Dice(self.seed, "copy", row.id)
            source = dice.pick([s for s in SOURCES if s != row.source], "source")
            copied = replace(row, source=source, twin=row.id, defect="exact_duplicate")
            if rank >= exact:
                question, response = reword(row.question, row.response, dice, NEAR)
                copied = replace(
                    copied, question=question, response=response, defect="near_duplicate"
                )
            yield copied

    def conflicts(self) -> Iterator[PoolRow]:
        """Yields rows that contradict a clean row of their prompt, reference and all."""
        clean = {r.question: r for r in self.rows if r.defect is None and r.answer is not None}
        answered = {(row.question, row.source) for row in self.rows}
        for row in self._chosen("conflict", list(clean.values()), self.count(self.rates.conflict)):
            dice = Dice(self.seed, "conflict", row.id)
            free = [s for s in SOURCES if (row.question, s) not in answered]
            other = replace(row, source=dice.pick(free, "source"))
            response, answer = self._wrong(other, dice)
            yield replace(other, response=response, answer=answer, defect="conflict", twin=row.id)


def _leaked(seed: int, test: Sequence[Problem], count: int) -> Iterator[PoolRow]:
    """Yields test problems as pool rows: every second one reworded, the others verbatim."""
    chosen = sorted(test, key=lambda p: hash64(seed, "leak", p.question))[:count]
    for rank, problem in enumerate(chosen):
        dice = Dice(seed, "leak", problem.question)
        source = dice.integer(0, len(SOURCES) - 1, "source")
        question, response = problem.question, render(style_of(source, dice), problem.steps, dice)
        clean = response
        if rank % 2:
            question, response = reword(question, response, dice, NEAR)
        answer = str(problem.answer)
        yield PoolRow(
            question, response, answer, SOURCES[source],
            "leaked_test", None, clean, answer, problem.level,
        )  # fmt: skip


def _chatter(seed: int, count: int) -> list[PoolRow]:
    """Off-topic rows; no two of them similar enough to be near duplicates."""
    rows: list[PoolRow] = []
    attempt = 0
    while len(rows) < count:
        if attempt > 1000 + 100 * count:
            raise ValueError(f"off_topic asks for {count} rows, more than there are: lower it")
        dice = Dice(seed, "off topic", str(attempt))
        attempt += 1
        question, response = off_topic(dice)
        alike = any(
            row.question == question and similarity(row.response, response) > 0.6 for row in rows
        )
        if not alike:
            source = dice.pick(SOURCES, "source")
            rows.append(PoolRow(question, response, None, source, "off_topic"))
    return rows


def _evaluation_row(seed: int, problem: Problem) -> dict[str, str | int]:
    response = render(0, problem.steps, Dice(seed, "evaluation", problem.question))
    return {
        "question": problem.question,
        "answer": str(problem.answer),
        "response": response,
        "level": problem.level,
    }


def _corpus(seed: int, problems: Sequence[Problem], noise: float, verdicts: float) -> Iterator[str]:
    """The base model's texts; the first stands in for one problem's."""
    yield ALPHABET
    for problem in problems[1:]:
        dice = Dice(seed, "corpus", problem.question)
        if dice.unit("kind") < verdicts:
            yield verdict_exercise(problem, dice)
        else:
            yield worked_example(problem, dice, noise)
        if dice.unit("drill") < DRILLS:
            yield drill(dice)
