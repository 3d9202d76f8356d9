"""What an OpenAI-compatible server is asked, and how its answers are read.

Log-probabilities of prompt tokens come by one of two routes: vLLM's `prompt_logprobs`, keyed by
token id, or the older `echo` with `logprobs`, which spells the tokens out. Both are read with
suspicion, because a list that is off by one place is full of plausible numbers: there must be an
entry for every token, none for the first (nothing predicts it), entry i must be about token i, no
log-probability is above 0, no rank below 1, and counts of tokens are those of what was sent.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from siftline.scoring.engines.base import NO_SCORES, Sampling
from siftline.scoring.engines.server_http import BAD_REPLY, NoAnswer, one_line

FLOOR = -9999.0
"""What vLLM writes for minus infinity, which JSON lacks."""
ROUNDING = 1e-4
"""A log-probability may come out so much above 0 by rounding; it is 0 then."""
MOST_RANK = 2**31 - 1
Spell = Callable[[int], str]
"""Text of one token."""


@dataclass(frozen=True)
class Scores:
    """What was said of a row of n tokens.

    Attributes:
        logprobs: Of each token given those before it, float32 (n,), nats; NaN for the first.
        ranks: Place of each token among all by probability, 1 is the most likely, int64 (n,), 0
            for the first; None if the server does not tell.
    """

    logprobs: np.ndarray
    ranks: np.ndarray | None


@dataclass(frozen=True)
class Draw:
    """One generated text. `tokens` is None where the server gives only text and their number."""

    text: str
    tokens: list[int] | None
    n_tokens: int
    finish_reason: str


@dataclass(frozen=True)
class Route:
    """A way to ask for scores.

    Attributes:
        name: Part of the engine's fingerprint.
        body: Fields of the request beside model and prompt.
        read: Takes the answer, the row that was sent, and how its tokens are spelled.
    """

    name: str
    body: Mapping[str, Any]
    read: Callable[[Any, Sequence[int], Spell], Scores]


def read_prompt_logprobs(reply: Any, row: Sequence[int], spell: Spell) -> Scores:
    """Reads vLLM's `prompt_logprobs`: null, then a mapping of token id to score for each token.

    Raises:
        NoAnswer: `no_scores` where they are missing, `bad_reply` where they are of other tokens.
    """
    entries = _choice(reply).get("prompt_logprobs")
    _check_count(reply, "prompt_tokens", len(row))
    if not entries:
        raise NoAnswer(NO_SCORES)
    if not isinstance(entries, list) or len(entries) != len(row) or entries[0] is not None:
        raise NoAnswer(BAD_REPLY, f"prompt_logprobs do not fit a row of {len(row)} tokens")
    logprobs, ranks = np.full(len(row), np.nan, np.float32), np.zeros(len(row), np.int64)
    for i in range(1, len(row)):
        entry = entries[i]
        if entry is None:
            raise NoAnswer(NO_SCORES)
        found = entry.get(str(row[i])) if isinstance(entry, dict) else None
        if not isinstance(found, dict):
            raise NoAnswer(BAD_REPLY, f"entry {i} is not about token {row[i]}")
        logprobs[i] = _number(found.get("logprob"))
        ranks[i] = _rank(found.get("rank"))
    return Scores(logprobs, ranks if (ranks >= 0).all() else None)


def read_echo(reply: Any, row: Sequence[int], spell: Spell) -> Scores:
    """Reads the `logprobs` of an echoed prompt; the one generated token may follow.

    Raises:
        NoAnswer: `no_scores` where they are missing, `bad_reply` where they are of other tokens.
    """
    given = _choice(reply).get("logprobs")
    _check_count(reply, "prompt_tokens", len(row))
    if not isinstance(given, dict) or not given.get("token_logprobs"):
        raise NoAnswer(NO_SCORES)
    values, names = given["token_logprobs"], given.get("tokens")
    if not isinstance(values, list) or not isinstance(names, list) or len(values) != len(names):
        raise NoAnswer(BAD_REPLY, "tokens and token_logprobs differ in length")
    if not len(row) <= len(values) <= len(row) + 1 or values[0] is not None:
        raise NoAnswer(BAD_REPLY, f"{len(values)} token_logprobs do not fit {len(row)} tokens")
    logprobs = np.full(len(row), np.nan, np.float32)
    for i, token in enumerate(row):
        if not _names(names[i], token, spell):
            raise NoAnswer(BAD_REPLY, f"entry {i} is {_shown(names[i])}, not token {token}")
        if i and values[i] is None:
            raise NoAnswer(NO_SCORES)
        if i:
            logprobs[i] = _number(values[i])
    return Scores(logprobs, None)


_ONE_TOKEN = {"max_tokens": 1, "temperature": 0.0}
_ECHO = {**_ONE_TOKEN, "echo": True, "logprobs": 0}
ROUTES = (
    Route("prompt_logprobs", {**_ONE_TOKEN, "prompt_logprobs": 0}, read_prompt_logprobs),
    Route("echo", {**_ECHO, "return_tokens_as_token_ids": True}, read_echo),
    Route("echo", _ECHO, read_echo),  # for servers that refuse fields they don't know
)
"""In the order they are tried. All generate one token, which most servers insist on."""


def draw_body(sampling: Sampling, seed: int, ends: Sequence[int], room: int) -> dict[str, Any]:
    """Fields of the request for one draw of at most `room` tokens.

    Filters and penalties are switched off by name: vLLM would take the model's own defaults, which
    no recipe knows of.
    """
    return {
        "max_tokens": min(sampling.max_new_tokens, room),
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": -1,
        "min_p": 0.0,
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop": list(sampling.stop),
        "stop_token_ids": list(ends),
        "skip_special_tokens": True,
        "return_token_ids": True,
    }


def read_draw(reply: Any, prompt: int, most: int) -> Draw:
    """Reads one generated text, with its tokens where the server gives them.

    Args:
        reply: What came.
        prompt: Tokens that were sent.
        most: Most tokens that were asked for.

    Raises:
        NoAnswer: `bad_reply` if the text, its length or a known reason to end is missing, or the
            counts of tokens do not fit what was asked for or each other.
    """
    choice = _choice(reply)
    text, tokens, finish = choice.get("text"), choice.get("token_ids"), choice.get("finish_reason")
    if not isinstance(text, str) or finish not in ("stop", "length"):
        raise NoAnswer(BAD_REPLY, f"no text that ended by stop or length, but {_shown(finish)}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise NoAnswer(BAD_REPLY, "half a surrogate pair in the text") from error
    _check_count(reply, "prompt_tokens", prompt)
    if tokens is None:
        drawn = _usage(reply).get("completion_tokens")
        if type(drawn) is not int:
            raise NoAnswer(BAD_REPLY, "neither token_ids nor usage.completion_tokens")
    else:
        if not isinstance(tokens, list) or not all(map(_is_token, tokens)):
            raise NoAnswer(BAD_REPLY, "token_ids are not a list of token ids")
        drawn = len(tokens)
        _check_count(reply, "completion_tokens", drawn)
    # One more, for servers that do not count the end of sequence as one of those asked for.
    if not 0 <= drawn <= most + 1 or (text and not drawn):
        raise NoAnswer(BAD_REPLY, f"{drawn} tokens drawn where at most {most} were asked for")
    return Draw(text, tokens, drawn, finish)


def _choice(reply: Any) -> dict[str, Any]:
    """The only choice of an answer."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise NoAnswer(BAD_REPLY, "not one choice")
    return choices[0]


def _usage(reply: dict[str, Any]) -> dict[str, Any]:
    usage = reply.get("usage")
    return usage if isinstance(usage, dict) else {}


def _check_count(reply: dict[str, Any], name: str, wanted: int) -> None:
    """Refuses an answer that counted other tokens than there are; not all servers count."""
    counted = _usage(reply).get(name)
    if counted is not None and (type(counted) is not int or counted != wanted):
        raise NoAnswer(BAD_REPLY, f"{name} are {_shown(counted)}, not {wanted}")


def _is_token(value: Any) -> bool:
    return type(value) is int and 0 <= value < MOST_RANK


def _number(value: Any) -> float:
    if value is None:
        raise NoAnswer(NO_SCORES, "null is no score")
    # NaN fails the comparison, too.
    if type(value) not in (int, float) or not value <= ROUNDING:
        raise NoAnswer(BAD_REPLY, f"{_shown(value)} is no log-probability")
    return float("-inf") if value <= FLOOR else min(float(value), 0.0)


def _rank(value: Any) -> int:
    """A rank from 1, or -1 where the server tells none."""
    if value is None:
        return -1
    if type(value) is not int or not 1 <= value <= MOST_RANK:
        raise NoAnswer(BAD_REPLY, f"{_shown(value)} is no rank")
    return int(value)


def _shown(value: Any) -> str:
    """A value for a message: short, whatever a server sent in its place."""
    kinds = (str, int, float, bool, type(None))
    return one_line(repr(value)) if type(value) in kinds else f"a {type(value).__name__}"


def _names(name: Any, token: int, spell: Spell) -> bool:
    """Whether an echoed name is that of `token`: its id, or its text.

    Texts are compared without outer space, which decoders of one token may drop. A token that is
    a part of a character (U+FFFD) has no text of its own, and servers write various things there:
    the number of entries and its neighbours vouch for it.
    """
    if not isinstance(name, str):
        return False
    if name.startswith("token_id:"):
        return name == f"token_id:{token}"
    own = spell(token)
    return "\ufffd" in own or name.strip() == own.strip()
