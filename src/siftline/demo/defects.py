"""Planted defects: each takes clean text and returns a spoiled one.

Rewording changes only the ends of a text. The duplicates gate compares sets of character shingles,
and in a text of thirty characters one changed word in the middle is already a third of them.

Texts a base model is trained on: worked examples and verdict exercises.
"""

from collections.abc import Sequence
from dataclasses import replace

from siftline.demo.problems import SOURCES, Dice, Problem, Step, apply_op, render
from siftline.scoring.measures.consistency import REFLECTION
from siftline.stages.canaries import similarity

_QUESTION_EDITS = (
    "Quiz: {}", "Task: {}", "Hi. {}", "So: {}", "{} Thanks.", "{} Show it.", "{} Explain.",
)  # fmt: skip
_RESPONSE_EDITS = ("So {}", "Ok. {}", "We have {}", "{}.", "{} .", "{}!")
_SHIFTS = (1, -1, 2, -2, 10, -10, 3, -3)


def wrong_steps(steps: Sequence[Step], dice: Dice) -> tuple[Step, ...]:
    """Makes one calculation wrong and carries the error to the final value.

    Args:
        steps: A correct solution.
        dice: Draws of this error.

    Returns:
        Steps of the same operations whose final value is positive and differs from the right one.
    """
    order = [
        (index, shift)
        for index in dice.shuffled(range(len(steps)), "where")
        for shift in dice.shuffled(_SHIFTS, "shift")
    ]
    for index, shift in order:
        spoiled = _carry(steps, index, shift)
        if spoiled is not None and spoiled[-1].value != steps[-1].value:
            return spoiled
    raise AssertionError(f"no wrong version of {steps}")


def _carry(steps: Sequence[Step], index: int, shift: int) -> tuple[Step, ...] | None:
    made: list[Step] = []
    for i, step in enumerate(steps):
        left = made[-1].value if made else step.left
        if step.op == "/" and left % step.right:
            return None
        value = apply_op(left, step.op, step.right) + (shift if i == index else 0)
        if value <= 0:
            return None
        made.append(replace(step, left=left, value=value))
    return tuple(made)


def truncate(response: str, dice: Dice) -> str:
    """Cuts a response before its final `####` line, somewhere in its second half."""
    body = response[: response.rindex("####")].rstrip()
    least = max(1, len(body) // 2)
    return body[: dice.integer(least, len(body), "cut")].rstrip()


def reword(question: str, response: str, dice: Dice, at_least: float) -> tuple[str, str]:
    """Rewords both texts so little that each stays `at_least` similar to what it was.

    Args:
        question: A clean question.
        response: A clean response.
        dice: Draws of this pair.
        at_least: Similarity that both must keep, see `similarity`.
    """
    return (
        _first_close(question, dice.shuffled(_QUESTION_EDITS, "question edit"), at_least),
        _first_close(response, dice.shuffled(_RESPONSE_EDITS, "response edit"), at_least),
    )


def _first_close(text: str, edits: Sequence[str], at_least: float) -> str:
    for edit in edits:
        if similarity(text, edit.format(text)) >= at_least:
            return edit.format(text)
    raise AssertionError(f"no edit keeps {text!r} {at_least} similar")


_CITIES = (
    "Rome", "Oslo", "Cairo", "Lima", "Delhi", "Paris", "Quito", "Seoul", "Tunis", "Kyoto",
    "Bergen", "Malaga", "Dublin", "Havana", "Nairobi",
)  # fmt: skip
_FOODS = (
    "rice", "lentils", "salmon", "tofu", "beets", "squash", "noodles", "mussels", "polenta",
    "turnips", "chicken", "mushrooms", "barley", "spinach", "cabbage",
)  # fmt: skip
_SIDES = (
    "mint", "lemon juice", "brown butter", "toasted almonds", "sour cream", "black pepper",
    "fried onions", "olive oil", "fresh dill", "soft cheese",
)  # fmt: skip
_GEAR = (
    "a warm coat", "sun cream", "walking boots", "an umbrella", "a thin scarf", "a swim suit",
    "a big hat", "dark glasses", "wool socks", "a light bag",
)  # fmt: skip
_ANIMALS = (
    "owls", "otters", "geese", "foxes", "whales", "beetles", "lizards", "swans", "wolves",
    "herons", "badgers", "spiders", "salamanders", "puffins", "ponies",
)  # fmt: skip
_HABITS = (
    "sleep in tall grass", "hunt near rivers", "sing at dawn", "rest under stones",
    "travel in flocks", "hide from the rain", "swim against the wind", "dig deep tunnels",
    "guard the nest", "feed after dark",
)  # fmt: skip
_MOODS = (
    "autumn", "the harbour", "an old friend", "the first snow", "a lost key", "the night train",
    "my garden", "a quiet street", "the lighthouse", "a summer storm", "the piano", "a long walk",
    "the market", "an empty house", "the moon",
)  # fmt: skip
_LINES = (
    "Leaves drift over the wall", "Someone hums below the stairs", "The bells are far away",
    "Lamps glow along the quay", "A door moves in the wind", "Rain writes on the glass",
    "Smoke rises and is gone", "The road bends out of sight",
)  # fmt: skip
_CLUSTERS = (
    ("What should I pack for {}?", _CITIES, _GEAR, "Take {}, {} and {}."),
    ("What tastes good with {}?", _FOODS, _SIDES, "Serve it with {}, {} or {}."),
    ("What do {} like to do?", _ANIMALS, _HABITS, "They {}, {} and {}."),
    ("Write a verse about {}.", _MOODS, _LINES, "{}. {}. {}."),
)


def off_topic(dice: Dice) -> tuple[str, str]:
    """Writes a question and a response that have nothing to do with arithmetic.

    They come from four clusters (travel, food, animals, verse) of a few hundred texts each.
    """
    question, subjects, things, answer = dice.pick(_CLUSTERS, "cluster")
    chosen = dice.shuffled(things, "things")[:3]
    return question.format(dice.pick(subjects, "subject")), answer.format(*chosen)


TEXT = "Question: {question}\nAnswer: {response}"
DRILL_LINES = 6
ALPHABET = "".join(chr(c) for c in range(32, 127))
"""One text with every printable character, so that a character model has read each one."""


def worked_example(problem: Problem, dice: Dice, noise: float) -> str:
    """A problem and a solution in a drawn style.

    Args:
        problem: The problem.
        dice: Draws of this text.
        noise: Share of solutions that are wrong or, as often, truncated.
    """
    style = _style(dice)
    u = dice.unit("noise")
    steps = wrong_steps(problem.steps, dice) if u < noise / 2 else problem.steps
    response = render(style, steps, dice)
    if noise / 2 <= u < noise:
        response = truncate(response, dice)
    return TEXT.format(question=problem.question, response=response)


def verdict_exercise(problem: Problem, dice: Dice) -> str:
    """A problem, a proposed answer that is wrong half the time, and the verdict A or B."""
    style = _style(dice)
    right = dice.unit("right") < 0.5
    steps = problem.steps if right else wrong_steps(problem.steps, dice)
    proposed = render(style, steps, dice)
    asked = REFLECTION.format(prompt=problem.question, response=proposed)
    return TEXT.format(question=asked, response="A" if right else "B")


def drill(dice: Dice) -> str:
    """A chain of bare equations, each going on from the last result: arithmetic without words."""
    value = dice.integer(2, 9, "start")
    lines = []
    for i in range(DRILL_LINES):
        right = dice.integer(2, 9 if dice.unit(("small", i)) < 0.7 else 20, ("right", i))
        op = "-" if right < value and dice.unit(("op", i)) < 0.5 else "+"
        result = value - right if op == "-" else value + right
        lines.append(f"{value} {op} {right} = {result}")
        value = result if result < 60 else dice.integer(2, 9, ("again", i))
    return "\n".join(lines)


def _style(dice: Dice) -> int:
    """Most of the texts are plain equations: a small model learns one form well and reads all."""
    return 0 if dice.unit("plain") < 0.7 else dice.integer(1, len(SOURCES) - 1, "style")
