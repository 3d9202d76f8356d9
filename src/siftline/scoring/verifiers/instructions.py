"""Responses held to checkable instructions: length, keywords, format, case, language, edges."""

import ast
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from siftline.scoring.answers.reasoning import without_reasoning
from siftline.scoring.verifiers.instruction_checks import CHECKS, Unusable
from siftline.scoring.verifiers.verdict import Verdict

LONGEST_TEXT = 1_000_000
"""Characters of a response beyond which nothing is checked."""
LONGEST_CONSTRAINTS = 200_000
"""Characters of a row's constraints beyond which they are not read."""
NOT_FOLLOWED = "not followed: "


@dataclass(frozen=True)
class Instruction:
    """One instruction of a row.

    Attributes:
        name: Its id, as `length_constraints:number_words`.
        given: Its arguments.
    """

    name: str
    given: Mapping[str, Any]


class InstructionsVerifier:
    """Checks a response against a row's instructions, which are its reference answer as JSON.

    The instructions have IFEval's published ids and arguments (arXiv 2311.07911), in its own layout
    or one after another:

        {"instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
         "kwargs": [{}, {"num_words": 100, "relation": "at least"}]}
        [{"id": "length_constraints:number_words", "num_words": 100, "relation": "at least"}]

    Strict: the response counts as it stands, reasoning left out. One instruction that is not
    followed is a mismatch; the verdict's `extracted` names them. Where none is and one can't be
    told (an unknown id, an argument that can't be used, a count that readers differ on), the
    verdict is open, `unreadable`, with its name.
    """

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` by the instructions `answer`."""
        if not answer.strip():
            return Verdict(None, None, "no_reference")
        if len(response) > LONGEST_TEXT:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        try:
            asked = read_instructions(answer)
        except ValueError as error:
            return Verdict(None, None, f"unreadable: the instructions {error}")
        text = without_reasoning(response).strip()
        if not text:
            return Verdict(None, None, "no_final_answer")
        broken, doubtful = [], []
        for instruction in asked:
            followed, why = judged(instruction, text)
            if followed is False:
                broken.append(instruction.name)
            elif followed is None:
                doubtful.append(f"{instruction.name} ({why})")
        if broken:
            return Verdict(False, NOT_FOLLOWED + ", ".join(broken), "wrong_answer")
        if doubtful:
            return Verdict(None, None, f"unreadable: can't tell {', '.join(doubtful)}"[:500])
        return Verdict(True, f"followed: {len(asked)}", "match")


def judged(instruction: Instruction, text: str) -> tuple[bool | None, str]:
    """Whether a text follows an instruction, and why nobody can tell where that is None."""
    check = CHECKS.get(instruction.name)
    if check is None:
        return None, "unknown"
    try:
        return check(text, instruction.given), "readers differ"
    except Unusable as error:
        return None, str(error)


def not_followed(verdict: Verdict) -> list[str]:
    """Ids of the instructions that a verdict says are not followed."""
    said = verdict.extracted or ""
    return said.removeprefix(NOT_FOLLOWED).split(", ") if said.startswith(NOT_FOLLOWED) else []


def read_instructions(answer: str) -> list[Instruction]:
    """Reads a row's instructions.

    Args:
        answer: JSON, or the literal that Python prints, in a layout of `InstructionsVerifier`.
            Arguments that are null are left out, as the published table has all of them.

    Raises:
        ValueError: if that is none, or ids and arguments are not as many.
    """
    if len(answer) > LONGEST_CONSTRAINTS:
        raise ValueError(f"have {len(answer)} characters, which are too many")
    found = _flat(_loaded(answer))
    if not found:
        raise ValueError("are none: give at least one id")
    return found


def _loaded(answer: str) -> Any:
    try:
        return json.loads(answer)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(answer.strip())
    except (ValueError, SyntaxError, RecursionError, MemoryError, TypeError) as error:
        raise ValueError("are no JSON") from error


def _flat(value: Any) -> list[Instruction]:
    if isinstance(value, str):
        return [Instruction(value, {})]
    if isinstance(value, Mapping):
        return _mapped(value)
    if isinstance(value, Sequence):
        found = []
        for item in value:
            if not isinstance(item, str | Mapping):
                raise ValueError(f"hold {str(item)[:50]!r}: give ids or objects")
            found += _flat(item)
        return found
    raise ValueError(f"are {str(value)[:50]!r}: give a list or an object")


def _mapped(value: Mapping[str, Any]) -> list[Instruction]:
    names = value.get("instruction_id_list", value.get("instruction_id", value.get("id")))
    if isinstance(names, str):
        given = value.get("kwargs")
        if given is None:
            known = ("instruction_id_list", "instruction_id", "id", "kwargs")
            given = {name: item for name, item in value.items() if name not in known}
        given = given[0] if isinstance(given, list) and len(given) == 1 else given
        return [Instruction(names, _arguments(given))]
    if not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise ValueError("have no ids: give instruction_id_list, or id")
    given = value.get("kwargs")
    if isinstance(given, str):
        given = _loaded(given)
    given = [{}] * len(names) if given is None else given
    if not isinstance(given, Sequence) or len(given) != len(names):
        raise ValueError(f"have {len(names)} ids and other than {len(names)} kwargs")
    return [Instruction(name, _arguments(one)) for name, one in zip(names, given, strict=True)]


def _arguments(given: Any) -> dict[str, Any]:
    if isinstance(given, str):
        given = _loaded(given)
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise ValueError(f"have kwargs {str(given)[:50]!r}, no object")
    return {str(name): value for name, value in given.items() if value is not None}
