"""What a verifier is, and what it says."""

from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Verdict:
    """What a verifier found.

    Attributes:
        correct: True or False where it could decide, else None.
        extracted: The response's final answer as written; None if it has none.
        reason: `match`; `wrong_answer`, which is a proof; or why the verdict is open:
            `no_final_answer`, `no_reference`, `unreadable: <what can't be told, and why>`, or
            `verifier_error: <what happened>` where the verifier itself failed.
        first_error: Of a refuted response, the step (see `answers.steps`, counted from 0) with its
            first false equation; None where no equation is false, or nobody looked.
        last_right: Of a refuted response, the last right intermediate result before that step, or
            in all of it where no equation is false; None if there is none.
    """

    correct: bool | None
    extracted: str | None
    reason: str
    first_error: int | None = None
    last_right: str | None = None


class Verifier(Protocol):
    """Checks one response against one reference answer."""

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against `answer`; never raises on what they contain."""
        ...
