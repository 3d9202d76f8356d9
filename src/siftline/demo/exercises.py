"""Texts a base model is trained on: worked examples and verdict exercises.

Both have the form that chat template QUESTION_ANSWER gives a conversation, without its end of
sequence, which the trainer adds. A verdict exercise is the prompt of self-reflection with its one
letter reply; half of the proposed answers are wrong, each in the way planted errors are.
"""

from siftline.demo.defects import truncate, wrong_steps
from siftline.demo.problems import Dice, Problem
from siftline.demo.styles import SOURCES, render
from siftline.scoring.reflection import REFLECTION

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
