"""How simulated sources write down a solution.

Five sources, five styles. A source mostly keeps to its own style; now and then all sources swap, so
a source does not name a style for certain. The styles differ in words, not in punctuation alone:
two correct answers to one question are alternatives, never near duplicates of each other.
"""

from collections.abc import Sequence

from siftline.demo.problems import Dice, Step

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
