"""One answer of a server, read with suspicion: bounded in size, without the API key, parsed.

Everything a server says passes through `read_reply` before anything else sees it, so this is the
one place where its size is bounded and where a key that it repeats is taken out: no log, error,
stored record or report can hold one.
"""

import json
import zlib
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

import httpx

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
