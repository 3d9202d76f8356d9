"""Graded arithmetic word problems.

A problem is a start number and one to four steps; its level is the number of steps, and levels
differ in digits and operations too, so that a small model's pass rate falls from level to level:

    1  one addition or subtraction, numbers to 9
    2  two of them, numbers to 9
    3  three, numbers to 20
    4  four, numbers to 50, one of them a doubling, tripling or halving

Texts are short (a question at most 110 characters) and use few characters, because a model of 1.8
million parameters reads and writes them character by character on two CPU cores.

How simulated sources write down a solution.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from siftline.kernels.draws import hash64

LEVELS = (1, 2, 3, 4)
LONGEST_QUESTION = 110
Item = TypeVar("Item")


@dataclass(frozen=True)
class Dice:
    """Draws for one thing: u = hash(seed, stage, identity, what).

    Attributes:
        seed: The generator's seed.
        stage: What is being made, e.g. `pool`.
        identity: The thing the draws are for.
    """

    seed: int
    stage: str
    identity: str

    def unit(self, what: object) -> float:
        """A uniform draw in [0, 1)."""
        return hash64(self.seed, self.stage, self.identity, what) / 2.0**63

    def integer(self, low: int, high: int, what: object) -> int:
        """A uniform draw from low to high, both included."""
        return low + int(self.unit(what) * (high - low + 1))

    def pick(self, items: Sequence[Item], what: object) -> Item:
        """A uniform draw of one item."""
        return items[self.integer(0, len(items) - 1, what)]

    def shuffled(self, items: Sequence[Item], what: object) -> list[Item]:
        """All items in an order drawn uniformly."""
        keys = [
            (hash64(self.seed, self.stage, self.identity, what, i), i) for i in range(len(items))
        ]
        return [items[i] for _, i in sorted(keys)]


@dataclass(frozen=True)
class Step:
    """One operation on the running value: `value = left op right`."""

    left: int
    op: str
    right: int
    value: int


@dataclass(frozen=True)
class Problem:
    """A word problem and its solution.

    Attributes:
        question: The text.
        steps: The operations in order; each step's `left` is the value before it.
        level: 1 to 4, the number of steps.
        topic: The objects counted.
    """

    question: str
    steps: tuple[Step, ...]
    level: int
    topic: str

    @property
    def answer(self) -> int:
        """The final value."""
        return self.steps[-1].value


_NAMES = (
    ("Tom", "He"), ("Ann", "She"), ("Ben", "He"), ("Eva", "She"), ("Sam", "He"), ("Mia", "She"),
    ("Leo", "He"), ("Zoe", "She"), ("Max", "He"), ("Ida", "She"), ("Jon", "He"), ("Amy", "She"),
    ("Raj", "He"), ("Lin", "She"), ("Omar", "He"), ("Rosa", "She"), ("Karl", "He"), ("Nina", "She"),
    ("Ivan", "He"), ("Dora", "She"),
)  # fmt: skip
_TOPICS = (
    "apples", "pens", "coins", "cards", "shells", "books", "eggs", "stamps", "beads", "nuts",
    "plums", "toys", "kites", "cups", "hats", "seeds", "fish", "nails", "maps", "rings",
)  # fmt: skip
_MORE = ("buys {}", "finds {}", "gets {} more", "wins {}")
_LESS = ("loses {}", "sells {}", "gives away {}", "drops {}")
_TIMES = {2: ("doubles them", "makes them double"), 3: ("triples them", "trebles them")}
_HALF = ("halves them", "keeps only half")
# Numbers interrupt every run of words that two questions could share, so clean questions overlap
# in no long word n-gram unless their numbers agree too.
_OPENINGS = (
    "{name} has {n} {topic}. {he} {acts}. How many now?",
    "{name} starts with {n} {topic}, then {acts}. How many {topic}?",
    "With {n} {topic} at first, {name} {acts}. The total?",
)


def make_problem(dice: Dice, level: int) -> Problem:
    """Makes one problem of a level; all its choices come from `dice`.

    Args:
        dice: Draws of this problem.
        level: 1 to 4.
    """
    assert level in LEVELS, level
    for attempt in range(1000):
        start, steps = _steps(dice, level, attempt)
        if all(0 < step.value < 200 for step in steps):
            problem = _tell(dice, level, start, steps)
            if len(problem.question) <= LONGEST_QUESTION:
                return problem
    raise AssertionError(f"no valid problem for {dice}")


def _tell(dice: Dice, level: int, start: int, steps: tuple[Step, ...]) -> Problem:
    name, he = dice.pick(_NAMES, "name")
    topic = dice.pick(_TOPICS, "topic")
    acts = _join([_act(dice, i, step) for i, step in enumerate(steps)])
    question = dice.pick(_OPENINGS, "opening").format(
        name=name, he=he, n=start, topic=topic, acts=acts
    )
    return Problem(question, steps, level, topic)


def _steps(dice: Dice, level: int, attempt: int) -> tuple[int, tuple[Step, ...]]:
    high_start, high = {1: (9, 9), 2: (9, 9), 3: (20, 12), 4: (40, 20)}[level]
    value = start = dice.integer(2, high_start, ("start", attempt))
    special = dice.integer(1, level - 1, ("special", attempt)) if level == 4 else -1
    steps = []
    for i in range(level):
        draw = dice.unit(("op", attempt, i))
        if i == special:
            op, right = ("/", 2) if draw < 0.4 else ("*", 2 if draw < 0.7 else 3)
            if op == "/" and value % 2:
                return start, (Step(0, "-", 0, -1),)
        else:
            op, right = "+" if draw < 0.5 else "-", dice.integer(2, high, ("right", attempt, i))
        steps.append(Step(value, op, right, apply_op(value, op, right)))
        value = steps[-1].value
    return start, tuple(steps)


def apply_op(left: int, op: str, right: int) -> int:
    """Computes `left op right` for + - * and exact /."""
    if op == "/":
        assert left % right == 0, (left, right)
        return left // right
    return {"+": left + right, "-": left - right, "*": left * right}[op]


def _act(dice: Dice, index: int, step: Step) -> str:
    if step.op == "/":
        return dice.pick(_HALF, ("act", index))
    if step.op == "*":
        return dice.pick(_TIMES[step.right], ("act", index))
    verbs = dice.shuffled(_MORE, "more") if step.op == "+" else dice.shuffled(_LESS, "less")
    return verbs[index].format(step.right)


def _join(acts: Sequence[str]) -> str:
    return acts[0] if len(acts) == 1 else ", ".join(acts[:-1]) + " and " + acts[-1]


SOURCES = ("class", "forum", "tutor", "exam", "blog")
LONGEST_RESPONSE = 90
_WORDS = {"+": "plus", "-": "minus", "*": "times", "/": "over"}


def render(style: int, steps: Sequence[Step], dice: Dice) -> str:
    """Writes a solution in one of the five styles, ending in `#### answer`.

    Args:
        style: 0 equations, 1 one running line, 2 a sentence, 3 operators in words, 4 calculator.
        steps: The solution's steps.
        dice: Draws of this response (wording only).
    """
    final = f"#### {steps[-1].value}"
    if style == 0:
        return "\n".join([*(_spaced(s) for s in steps), final])
    if style == 1:
        tail = "".join(f"{s.op}{s.right}={s.value}" for s in steps[1:])
        opening = dice.pick(("so", "it is", "count"), "word")
        return f"{opening} {_tight(steps[0])}{tail}\n{final}"
    if style == 2:
        first = dice.pick(("First", "Now", "Here"), "word")
        lines = [f"{first if i == 0 else 'then'} {_spaced(s)}" for i, s in enumerate(steps)]
        return ", ".join(lines) + f".\n{final}"
    if style == 3:
        return "\n".join(
            [*(f"{s.left} {_WORDS[s.op]} {s.right} is {s.value}" for s in steps), final]
        )
    assert style == 4, style
    return "\n".join([*(f"<<{_tight(s)}>>{s.value}" for s in steps), final])


def style_of(source: int, dice: Dice) -> int:
    """The style a source uses for one question; different sources never share one.

    Args:
        source: Position in `SOURCES`.
        dice: Draws of the question.
    """
    shift = 0 if dice.unit("keep style") < 0.7 else dice.integer(1, 4, "shift")
    return (source + shift) % len(SOURCES)


def _spaced(step: Step) -> str:
    return f"{step.left} {step.op} {step.right} = {step.value}"


def _tight(step: Step) -> str:
    return f"{step.left}{step.op}{step.right}={step.value}"
