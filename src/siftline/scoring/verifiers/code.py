"""Responses that are programs, held to tests that run in a sandbox.

The program in a response: which blocks belong to it, and which only show how it is used.
"""

import re
import textwrap
from dataclasses import dataclass
from functools import cache
from typing import Literal

from siftline.scoring.answers.reasoning import Block, blocks, without_reasoning
from siftline.scoring.verifiers.sandbox import Limits, Sandbox
from siftline.scoring.verifiers.verdict import Verdict

_PYTHON = re.compile(r"(?:i?python|py)[\d.]*|pycon|python-repl|doctest")
_UNNAMED = ("", "text", "txt", "plaintext", "code")
_MID_LINE = re.compile(r"^([^`\n]+)(```(?:python|py)[\d.]*[ \t]*)$", re.MULTILINE | re.IGNORECASE)
"""A fence behind words: Code: ```python."""
_ITEM = re.compile(r"[ \t>]*(?:[-*+]|\d{1,9}[.)])?[ \t]*")
_BEHIND_FENCE = re.compile(
    r"^([ \t>]{0,20}(?:`{3,}|~{3,}))[ \t]+(?!i?py|[\w.+-]+[ \t]*$|\{)([^`\n]+)$",
    re.MULTILINE | re.IGNORECASE,
)
"""Words behind a closing fence, on its line."""
_DEFINED = re.compile(r"^(?:async[ \t]+def|def|class)[ \t]+(\w+)", re.M)
_ASSIGNED = re.compile(r"^(\w+)[ \t]*(?::[^=\n]{1,200})?=(?!=)", re.M)
_IMPORTS = re.compile(r"^(?:import|from)[ \t]+\w", re.M)
_TESTING = re.compile(
    r"^(?:import|from)[ \t]+(?:unittest|pytest)\b|^(?:async[ \t]+)?def[ \t]+test|^class[ \t]+Test",
    re.M,
)
_BEGINS = re.compile(r"(?:import|from|def|async def|class)[ \t]+\w|@\w")
_CODE = re.compile(
    r"[ \t]|#|@|[)\]}]|(?:import|from|def|async|class|if|elif|for|while|with|assert|return|raise)\b"
    r"|(?:try|else|except\b[^\n]{0,100}|finally)[ \t]*:|[\w.\[\]]+[ \t]*[-+*/|&]?=[^=]|[\w.]+\("
)
_WHOLE = re.compile(r"^[ \t]*(?:(?:async[ \t]+)?def[ \t]+\w+\((?!self|cls)|class[ \t]+\w)")
"""The start of a function or class that belongs to no class in front of it."""
_LATER = 50
"""Blocks behind a draft that are looked at for its names."""


@dataclass(frozen=True)
class Part:
    """A piece of a response's code.

    Attributes:
        text: Python, as far as anybody knows.
        kind: `program`: the last part that defines something, which must not raise. `setup`: what
            stands before it. `example`: what only shows or tests it. Of these two a failure is none
            of the program's: the row's tests decide.
    """

    text: str
    kind: Literal["program", "setup", "example"] = "program"


@dataclass(frozen=True)
class Program:
    """The code of a response.

    Attributes:
        parts: In the response's order.
        fenced: False for a response that is code from end to end; what is no Python then is prose.
    """

    parts: tuple[Part, ...]
    fenced: bool = True

    @property
    def text(self) -> str:
        """The program without its examples."""
        return "\n".join(part.text for part in self.parts if part.kind != "example")


def program_of(response: str) -> Program | None:
    """Finds the program of a response; None without one.

    The blocks fenced as Python, reasoning left out; where they define nothing, unnamed ones too
    that do; without any, the only unnamed block; without any fence, a response that defines
    something and looks like code. A last block that is not closed is cut off: no program. Then:

    - A block that begins indented goes on where the one before it ended.
    - A transcript (`>>> f(1)`) counts by what was typed.
    - A block is left out if a later one defines all its names again: a draft.
    - Blocks without a definition behind the last one with any, and blocks of tests (unittest,
      pytest), are examples.

    Linear in the response's length, but for the number of blocks.
    """
    response = _own_lines(without_reasoning(response))
    fenced = blocks(response)
    if not fenced:
        bare = _bare(response)
        return Program((Part(bare),), fenced=False) if bare else None
    taken = [block for block in fenced if _PYTHON.fullmatch(block.language)]
    if not any(_DEFINED.search(_typed(block.text)) for block in taken):
        unnamed = [block for block in fenced if block.language in _UNNAMED]
        defining = [block for block in unnamed if _DEFINED.search(_typed(block.text))]
        if not taken and len(fenced) == 1:
            taken = unnamed
        elif defining:
            chosen = {block.start for block in (*taken, *defining)}
            taken = [block for block in fenced if block.start in chosen]
    if not taken or not taken[-1].closed:
        return None
    parts = _parts(_texts(taken))
    return Program(tuple(parts)) if any(part.kind == "program" for part in parts) else None


def _own_lines(response: str) -> str:
    """The response with its fences on lines of their own."""

    def cut(found: re.Match[str]) -> str:
        return found[0] if _ITEM.fullmatch(found[1]) else f"{found[1]}\n{found[2]}"

    return _BEHIND_FENCE.sub(r"\1\n\2", _MID_LINE.sub(cut, response))


def _texts(taken: list[Block]) -> list[str]:
    """The text of each block; continuations joined, what was printed left out of transcripts."""
    texts: list[list[str]] = []
    for block in taken:
        first = next((line for line in block.text.splitlines() if line.strip()), "")
        if first.lstrip().startswith(">>>"):
            texts.append([_typed(block.text)])
        elif first[:1] in (" ", "\t") and texts and not _WHOLE.match(first):
            texts[-1].append(block.text)
        elif first:
            texts.append([textwrap.dedent(block.text) if first[0] in " \t" else block.text])
    return ["".join(pieces) for pieces in texts]


def _typed(text: str) -> str:
    """What was typed in a transcript; any other text as it is."""
    if not text.lstrip().startswith(">>>"):
        return text
    lines = [line.lstrip() for line in text.splitlines()]
    return "".join(f"{line[4:]}\n" for line in lines if line[:4].rstrip() in (">>>", "..."))


def _parts(texts: list[str]) -> list[Part]:
    names = [{*_DEFINED.findall(text), *_ASSIGNED.findall(text)} for text in texts]
    testing = [bool(_TESTING.search(text)) for text in texts]
    defining = [
        bool(_DEFINED.search(text)) and not t for text, t in zip(texts, testing, strict=True)
    ]
    last = max((i for i, defines in enumerate(defining) if defines), default=None)
    parts: list[Part] = []
    later: list[set[str]] = []
    for i in reversed(range(len(texts))):
        if last is not None and (testing[i] or i > last):
            parts.append(Part(texts[i], "example"))
            continue
        draft = names[i] and any(names[i] <= others for others in later[-_LATER:])
        if not (draft and not _IMPORTS.search(texts[i])):
            parts.append(Part(texts[i], "program" if last in (None, i) else "setup"))
        later.append(names[i])
    return parts[::-1]


def _bare(response: str) -> str | None:
    """A response without a fence, if it defines something: from its first line of code on."""
    text = _typed(response)
    if not _DEFINED.search(text):
        return None
    lines = text.splitlines(keepends=True)
    first = next(i for i, line in enumerate(lines) if _BEGINS.match(line))
    last = max(i for i, line in enumerate(lines) if _CODE.match(line))
    return "".join(lines[first : last + 1])


LONGEST_PROGRAM = 200_000
"""Characters of code or tests beyond which nothing is run."""
_NO_PYTHON = "the response raised SyntaxError"
LONGEST_RESPONSE = 2_000_000
"""Characters of a response beyond which no program is looked for."""


class CodeVerifier:
    """Runs a response's program with tests, the reference answer, in a sandbox.

    Which blocks of the response make the program stands in `program_of`. The tests are
    plain Python statements that see the program's names, and pass if they run to their end:
    `assert add(1, 2) == 3`. Python's standard library is there, nothing else.

    The walls and what they keep out stand in `sandbox`, and so do the limits. A program that
    raises, exits, crashes, prints too much or whose tests fail is wrong; examples of its use
    (`sandboxed.statements`) may fail. The verdict is open, `unreadable`, where a failure proves
    nothing: a library is not there, the program wants input, or its own `__eq__` decided a
    comparison of the
    tests. A program that takes too long or is killed gives `verifier_error`, for that may be the
    machine; so do tests that can't be compiled, or that check nothing when they run.

    What `match` proves: the process that ran the program also ran the tests to their end and told
    the secret that came with them, after the program's module had run. Exiting early by any way,
    printing, writing to every open file, killing the parent, waiting threads, patched built-ins
    and objects that equal everything do not give it. What it can't prove: program and tests share
    one interpreter, so code written against this very harness, that looks through frames or memory
    for the secret, speaks the protocol itself, or patches modules that the tests use
    (`math.isclose`), could pass. Read what you train on if its author may gain by that.
    """

    def __init__(self, limits: Limits | None = None, isolation: str | None = None) -> None:
        """Makes a verifier and tries its walls once.

        Args:
            limits: What one run may use.
            isolation: `bubblewrap` or `unshare`; by default the first that works.

        Raises:
            ValueError: if no isolation works on this machine: code is not run without it.
        """
        self.sandbox = Sandbox(limits, isolation)

    def __call__(self, response: str, answer: str) -> Verdict:
        """Judges `response` by the tests `answer`."""
        if len(response) > LONGEST_RESPONSE:
            return Verdict(None, None, f"unreadable: {len(response)} characters are too many")
        program = program_of(response)
        if not answer.strip():
            return Verdict(None, program.text if program else None, "no_reference")
        if program is None:
            return Verdict(None, None, "no_final_answer")
        parts = [(part.text, part.kind) for part in program.parts]
        if max(sum(len(text) for text, _ in parts), len(answer)) > LONGEST_PROGRAM:
            return Verdict(None, program.text, "verifier_error: program or tests too long")
        outcome = self.sandbox.run(parts, answer)
        if outcome.status == "passed":
            return Verdict(True, program.text, "match")
        if outcome.status != "failed":
            return Verdict(None, program.text, f"verifier_error: {outcome.detail}")
        if outcome.open:
            return Verdict(None, program.text, f"unreadable: {outcome.open}")
        if not program.fenced and outcome.detail.startswith(_NO_PYTHON):
            return Verdict(None, None, "no_final_answer")
        return Verdict(False, program.text, "wrong_answer")


def python_block(response: str) -> str | None:
    """The text of a response's program without its examples; None without one."""
    program = program_of(response)
    return program.text if program else None


@cache
def plain_code() -> CodeVerifier:
    """One for the process, since its walls are tried when it is made."""
    return CodeVerifier()
