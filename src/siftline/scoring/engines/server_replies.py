"""What an OpenAI-compatible server is asked, and how its answers are read.

Log-probabilities of prompt tokens come by one of two routes: vLLM's `prompt_logprobs`, keyed by
token id, or the older `echo` with `logprobs`, which spells the tokens out. Both are read with
suspicion, because a list that is off by one place is full of plausible numbers: there must be an
entry for every token, none for the first (nothing predicts it), entry i must be about token i, no
log-probability is above 0, no rank below 1, and counts of tokens are those of what was sent.

One answer of a server, read with suspicion: bounded in size, without the API key, parsed.
"""

import json
import zlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import httpx
import numpy as np

from siftline.scoring.engines.base import NO_SCORES, Sampling

BAD_REPLY = "bad_reply"
REFUSED = "refused"
HIDDEN = "[API key]"
"""What stands where the server repeated the key."""
PAGE_BYTES = 16 << 20
"""Most bytes of an answer to a GET: a list of models, a version."""
ANSWER_BYTES = 1 << 20
TOKEN_BYTES = 1 << 10
"""Bytes of an answer to a POST: so many, and so many more for each token sent or asked for. vLLM
takes about 100 a token."""
LONGEST_WAIT_S = 30.0
UNUSABLE = (401, 403, 404)
"""Statuses that speak of the key or the model, not of a row: no other row would fare better."""
NO_PAGE = 404
MOVED = (301, 302, 303, 307, 308)
"""Redirects. None is followed: it would hand rows and key to an address that no recipe names."""
AGAIN = (408, 425)
"""Statuses below 500 that ask to come again."""


class NoAnswer(Exception):
    """A try that gave nothing usable.

    Attributes:
        reason: What the ledger records if no further try does better.
        said: What the server said about it.
        final: Whether another try would be the same.
        wait_s: Least seconds to wait before another try, as the server asked.
    """

    def __init__(
        self, reason: str, said: str = "", *, final: bool = False, wait_s: float = 0.0
    ) -> None:
        super().__init__(reason)
        self.reason, self.said, self.final, self.wait_s = reason, said, final, wait_s


class Unusable(RuntimeError, ConnectionError):
    """No row would fare better: the server is away, or takes neither our key nor our model.

    A ConnectionError besides, so that the command line says it in one line.
    """


@dataclass(frozen=True)
class Reply:
    """What came back: its status, whole body, and headers that matter; the key is in none.

    Attributes:
        url: What was asked.
        method: How: GET or POST.
        status: HTTP status.
        body: The body as it was before compression.
        location: Where a redirect leads, or "".
        wait_s: Seconds to wait before another try, as the server asked.
        key: The API key, for what JSON spells otherwise.
    """

    url: str
    method: str
    status: int
    body: bytes
    location: str
    wait_s: float
    key: str | None

    def said(self) -> str:
        """The server's own words of an error: OpenAI's error.message, else the text's start."""
        if self.location:
            return f"it redirects to {one_line(self.location)}, which is not followed"
        try:
            found = self._json()
        except (ValueError, RecursionError):
            found = None
        error = found.get("error") if isinstance(found, dict) else None
        message = error.get("message") if isinstance(error, dict) else None
        if message is not None:
            return one_line(str(message))
        return one_line(self.body[:4096].decode("utf-8", "replace"))

    def parsed(self) -> Any:
        """The JSON of a good answer.

        Raises:
            NoAnswer: for an answer of the row.
            Unusable: for one that all rows would get.
        """
        status = self.status
        if status in AGAIN or status >= 500:
            raise NoAnswer(f"server_error_{status}", self.said(), wait_s=self.wait_s)
        if status in UNUSABLE and (status != NO_PAGE or self.method == "POST"):
            raise Unusable(
                f"{self.url} answers {status} ({self.said()}): check the server's model and "
                "key_variable, and run again"
            )
        if status in MOVED and self.method == "GET":
            raise Unusable(
                f"{self.url} answers {status} ({self.said()}): set the server's url to where it is"
            )
        if status != 200:
            raise NoAnswer(REFUSED, self.said(), final=True)
        try:
            return self._json()
        except RecursionError as error:
            raise NoAnswer(BAD_REPLY, "lists within lists without end") from error
        except ValueError as error:
            raise NoAnswer(BAD_REPLY, self.said()) from error

    def _json(self) -> Any:
        found = json.loads(self.body.decode("utf-8"))
        # Only an escape can spell the key otherwise than the bytes that were searched.
        return without(found, self.key) if self.key and b"\\" in self.body else found


async def read_reply(response: httpx.Response, limit: int, key: str | None) -> Reply:
    """Reads an answer whose body is still to come.

    Args:
        response: Streamed, nothing of its body read.
        limit: Most bytes of its body, unpacked.
        key: The API key, which is taken out of all that is read.

    Raises:
        NoAnswer: `bad_reply` if the body is larger, or packed in a way that was not asked for.
        httpx.HTTPError: if the connection fails.
    """
    packing = response.headers.get("Content-Encoding", "identity").strip().lower()
    if packing not in ("identity", "", "gzip"):
        raise NoAnswer(BAD_REPLY, f"packed as {one_line(packing)}, which was not asked for")
    body = bytearray()
    # Unpacked here, with a limit: some kilobytes of gzip hold gigabytes.
    unpack = zlib.decompressobj(wbits=31) if packing == "gzip" else None
    async for chunk in _chunks(response):
        room = limit + 1 - len(body)
        try:
            body += unpack.decompress(chunk, room) if unpack else chunk[:room]
        except zlib.error as error:
            raise NoAnswer(BAD_REPLY, "not gzip, though it says so") from error
        if len(body) > limit:
            raise NoAnswer(BAD_REPLY, f"an answer of more than {limit:,} bytes")
    return Reply(
        url=_without(str(response.request.url), key),
        method=response.request.method,
        status=response.status_code,
        body=bytes(body).replace(key.encode(), HIDDEN.encode()) if key else bytes(body),
        location=_without(response.headers.get("Location", ""), key)
        if response.status_code in MOVED
        else "",
        wait_s=_retry_after(response),
        key=key,
    )


async def _chunks(response: httpx.Response) -> AsyncIterator[bytes]:
    if response.is_stream_consumed:  # a transport without a network hands over whole answers
        yield response.content
        return
    async for chunk in response.aiter_raw():
        yield chunk


def answer_limit(body: Mapping[str, Any]) -> int:
    """Most bytes that an honest answer to a request takes."""
    tokens = len(body.get("prompt", ())) + int(body.get("max_tokens", 1))
    return ANSWER_BYTES + TOKEN_BYTES * tokens


def without(value: Any, key: str) -> Any:
    """A parsed answer whose texts do not hold the key; lists and objects are changed in place."""
    if isinstance(value, str):
        return _without(value, key)
    left = [value]  # by hand: an answer may be nested deeper than Python calls
    while left:
        here = left.pop()
        items: list[tuple[Any, Any]]
        if isinstance(here, dict):
            items = [(_without(name, key), part) for name, part in here.items()]
            here.clear()
        elif isinstance(here, list):
            items = list(enumerate(here))
        else:
            continue
        for place, part in items:
            here[place] = _without(part, key) if isinstance(part, str) else part
            if isinstance(part, dict | list):
                left.append(part)
    return value


def _without(text: str, key: str | None) -> str:
    return text.replace(key, HIDDEN) if key else text


def _retry_after(response: httpx.Response) -> float:
    asked = response.headers.get("Retry-After", "")
    return min(float(asked), LONGEST_WAIT_S) if asked.isdecimal() and len(asked) < 9 else 0.0


def one_line(text: str, longest: int = 200) -> str:
    """The start of a text on one line."""
    line = " ".join(text[: 8 * longest].split())
    return line if len(line) <= longest else line[: longest - 4] + " ..."


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
