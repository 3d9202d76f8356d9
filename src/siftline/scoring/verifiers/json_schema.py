"""Responses held to a JSON schema."""

import importlib.util
from functools import cache

from siftline.scoring.answers.fences import blocks
from siftline.scoring.verifiers.constraints import Constraint, strict_json
from siftline.scoring.verifiers.text import final_text
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_JSON = 1_000_000
"""Characters beyond which a response is not read."""


class JsonSchemaVerifier:
    """Checks that a response holds one JSON value that satisfies a schema, the reference answer.

    The value is the whole response, or the one block fenced as ```json; with two blocks, or prose
    and no block, there is no final answer. A block that is no JSON is wrong. JSON is read strictly:
    no NaN, no key twice. References to other documents are never fetched, formats (`email`) are
    annotations, and a schema that costs too much gives `verifier_error`.
    """

    def __init__(self, timeout: float = 5.0) -> None:
        """Makes a verifier; its child process starts with the first response.

        Args:
            timeout: Seconds one validation may take.

        Raises:
            ValueError: if timeout is not positive, or jsonschema is not installed.
        """
        if not timeout > 0:
            raise ValueError(f"timeout must be positive, not {timeout}: give seconds, e.g. 5")
        if importlib.util.find_spec("jsonschema") is None:
            raise ValueError(
                "verifier 'json_schema' needs jsonschema: python -m pip install jsonschema"
            )
        self._constraint = Constraint("json_schema", timeout)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` against the schema `answer`."""
        extracted = json_value(final_text(response))
        if not answer.strip():
            return Verdict(None, extracted, "no_reference")
        if extracted is None:
            return Verdict(None, None, "no_final_answer")
        if len(extracted) > LONGEST_JSON:
            return Verdict(None, extracted, "verifier_error: response too long")
        return self._constraint.verdict(answer, extracted)

    def close(self) -> None:
        """Ends the child process, if one was started."""
        self._constraint.close()


def json_value(response: str) -> str | None:
    """The text of a response's one JSON value, fenced or bare; None where there is not just one."""
    fenced = [block for block in blocks(response) if block.language == "json"]
    if fenced:
        whole = len(fenced) == 1 and fenced[0].closed
        return fenced[0].text.strip() if whole else None
    text = response.strip()
    if not text or len(text) > LONGEST_JSON:
        return text or None
    try:
        strict_json(text)
    except ValueError:
        return None
    except RecursionError:
        return text  # the child says so
    return text


@cache
def plain_json_schema() -> JsonSchemaVerifier:
    """One for the process, since each keeps a child process."""
    return JsonSchemaVerifier()
