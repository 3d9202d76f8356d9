"""A judge's grade as an expectation over the scale, read from log-probabilities.

The judge is asked for a grade and not sampled: the grade is the sum of each number times its
probability, renormalised over the scale (G-Eval, arXiv 2303.16634, without its sampling). So rows
that would get the same most likely grade still differ. How much probability the scale holds in all
is reported beside it: a judge that would rather say something else has a mass near 0.
"""

import re
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from siftline.rows.schema import text_view
from siftline.scoring.measures.choices import ask_choices
from siftline.scoring.recorder import Recorder

VERSION = 1
RUBRIC = (
    "Rate the response to the prompt below from {low} (worst) to {high} (best). A good response "
    "does what the prompt asks, is correct, complete and clear, and says nothing needless.\n\n"
    "Prompt:\n{prompt}\n\nResponse:\n{response}\n\n"
    "Reply with one number from {low} to {high} and nothing else."
)
"""The question put to the judge where the recipe gives none."""
_FIELD = re.compile(r"\{(prompt|response|low|high)\}")


@dataclass(frozen=True)
class Rubric:
    """A judge model with a rubric.

    Attributes:
        model: Name of a model of the recipe.
        rubric: Text of the question. {prompt} and {response} stand for the row's texts, {low} and
            {high} for the ends of the scale; other braces are left as they are.
        scale: Lowest and highest grade. One digit each: where a tokenizer splits numbers, the
            first token of 10 is that of 1.
    """

    model: str
    rubric: str = RUBRIC
    scale: tuple[int, int] = (1, 5)

    def __post_init__(self) -> None:
        if len(self.scale) != 2 or not 0 <= self.scale[0] < self.scale[1] <= 9:
            raise ValueError(
                f"scale is {list(self.scale)}: give the lowest and the highest grade, 0 to 9"
            )
        if "{response}" not in self.rubric:
            raise ValueError("rubric has no {response}: say where the response goes")

    @property
    def grades(self) -> tuple[int, ...]:
        """The grades, rising."""
        return tuple(range(self.scale[0], self.scale[1] + 1))

    def question(self, prompt: str, response: str) -> str:
        """The rubric with a row's texts in their places; what these hold is not looked into."""
        low, high = self.scale
        texts = {"prompt": prompt, "response": response, "low": str(low), "high": str(high)}
        return _FIELD.sub(lambda match: texts[match[1]], self.rubric)


def expected_grade(logprobs: np.ndarray, grades: np.ndarray) -> tuple[float, float]:
    """Expected grade and total probability.

    Args:
        logprobs: Log-probability of each grade, finite, nats, shape (k,).
        grades: The grades, shape (k,).

    Returns:
        Sum of grade times probability, renormalised over the grades; and the sum of probabilities
        before that.
    """
    logprobs = np.asarray(logprobs, np.float64)
    weights = np.exp(logprobs - logprobs.max())
    mean = float(weights @ grades / weights.sum())
    # Rounding may leave the scale by a last bit.
    mean = min(max(mean, float(min(grades))), float(max(grades)))
    return mean, float(np.exp(logprobs).sum())


def score_rubric(
    config: Rubric, recorder: Recorder, bucket: int, rows: pa.Table
) -> tuple[dict[str, tuple[float, float]], dict[str, str]]:
    """Grades the rows of one store bucket.

    Args:
        config: The rubric.
        recorder: The judge.
        bucket: Store bucket that all rows belong to.
        rows: Columns of `schema.ROW`. The judge reads all that the turns say, reasoning and tool
            calls included.

    Returns:
        Grade and mass by id, and reasons by id (`too_long`, `template_error`, `no_scores`).
    """
    options = tuple(map(str, config.grades))
    asked = {
        line["id"]: (
            [{"role": "user", "content": config.question(line["prompt"], line["response"])}],
            options,
        )
        for line in text_view(rows, everything=True).to_dicts()
    }
    # Rubric, grades and texts are all in the tokens, and these in the key.
    found, failed = ask_choices(recorder, "rubric", VERSION, bucket, asked, lead_in=True)
    grades = np.asarray(config.grades, np.float64)
    return {i: expected_grade(np.asarray(line), grades) for i, line in found.items()}, failed
