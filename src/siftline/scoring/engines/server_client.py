"""Asks an HTTP server many things at a time, and outlasts its faults.

Two kinds of trouble are kept apart. A request that was taken and not answered well (reset,
time-out, 500, an answer that can't be read) costs its row one of its tries, since the row itself
may be the cause. A server that takes no connection, or says that it has no time (`BUSY`), says
nothing about the row: every row then waits, up to the server's patience, and loses no try. When
patience ends with a busy server, a row it is known to answer decides whose fault it is.

The event loop runs in a thread of its own, so that the calls are plain functions wherever they are
made: in a step's process, in a thread, or below somebody else's running loop.
"""

import asyncio
import logging
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar
from urllib.parse import urlsplit

import httpx

from siftline.scoring.engines.base import Failed, Server
from siftline.scoring.engines.server_replies import (
    BAD_REPLY,
    LONGEST_WAIT_S,
    PAGE_BYTES,
    REFUSED,
    NoAnswer,
    Reply,
    Unusable,
    answer_limit,
    one_line,
    read_reply,
)

logger = logging.getLogger(__name__)
Answer = TypeVar("Answer")

BACKOFF_S = 0.5
"""Longest wait before the second try; it doubles with every further one."""
START_S = 10.0
"""Patience when a server is met for the first time: a wrong address must not cost minutes."""
CONNECT_S = 10.0
BUSY = (429, 502, 503, 504)
"""Statuses of a server that is overloaded or starts, or of a gateway without one behind it."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class Busy(NoAnswer):
    """The server had no time for this request for as long as patience lasts."""


class Unreachable(Unusable):
    """The server took no connection, or had no time, for as long as patience lasts."""


@dataclass(frozen=True)
class Job(Generic[Answer]):
    """One request and how its answer is read.

    Attributes:
        body: JSON to post.
        read: Takes the parsed answer; raises NoAnswer where that is not what was asked for.
    """

    body: Mapping[str, Any]
    read: Callable[[Any], Answer]


@dataclass
class Counts:
    """What one call cost: requests sent, tries after the first, reasons of the failed."""

    requests: int = 0
    retries: int = 0
    failed: Counter[str] = field(default_factory=Counter)
    said: str = ""


@dataclass
class Call:
    """State of one call: how patient it is, and since when nothing answers."""

    tries: int
    patience_s: float
    counts: Counts = field(default_factory=Counts)
    down_since: float | None = None
    warned: bool = False


def delay(attempt: int, salt: int) -> float:
    """Seconds to wait before try number `attempt` (1 is the second).

    Between half and all of an exponentially growing limit. The part is a hash of salt and attempt:
    it spreads the rows of one call without any random state.
    """
    part = zlib.crc32(f"{salt} {attempt}".encode()) / 2**32
    return float(min(BACKOFF_S * 2.0 ** min(attempt - 1, 30), LONGEST_WAIT_S)) * (0.5 + part / 2)


class Client:
    """An HTTP client for one server. Safe to call from several threads; close it at the end.

    Attributes:
        proof: Body of a request that the server has answered. It is asked again where one row
            gets nothing but busy answers, to tell a row's fault from the server's.
    """

    proof: Mapping[str, Any] | None = None

    def __init__(self, server: Server, key: str | None = None) -> None:
        """Starts the loop's thread; nothing is sent yet. `key` is the server's API key.

        Raises:
            ValueError: if the server's url is none.
        """
        try:
            httpx.URL(server.url)
        except httpx.InvalidURL as error:
            raise ValueError(
                f"url is {server.url!r} ({error}): give it as http://HOST:PORT/v1"
            ) from error
        self.server = server
        self.url = server.url.rstrip("/")
        for library in ("httpx", "httpcore"):  # they log every request, with headers at last
            logging.getLogger(library).setLevel(logging.WARNING)
        self._key = key
        packed = {"Accept-Encoding": "gzip"}
        self._http = httpx.AsyncClient(
            headers={**packed, "Authorization": f"Bearer {key}"} if key else packed,
            # A request's whole time is bounded in _send; httpx would bound every read alone.
            timeout=httpx.Timeout(None, connect=min(CONNECT_S, server.timeout_s / 2)),
            limits=httpx.Limits(
                max_connections=server.concurrency, max_keepalive_connections=server.concurrency
            ),
            trust_env=urlsplit(server.url).hostname not in LOOPBACK,  # a proxy would not find it
        )
        self._slots = asyncio.Semaphore(server.concurrency)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="server-client", daemon=True
        )
        self._thread.start()

    def get(self, url: str) -> Any:
        """JSON that the server gives for `url`, or None where it has no such page.

        Raises:
            Unreachable: if it takes no connection.
            NoAnswer: if it fails every time.
        """

        async def work() -> Any:
            call = Call(self.server.tries, min(START_S, self.server.patience_s))
            for attempt in range(1, call.tries + 1):
                try:
                    return await self._send("GET", url, None, call)
                except NoAnswer as error:
                    if error.reason in (REFUSED, BAD_REPLY):
                        return None
                    if error.final or attempt == call.tries:
                        raise
                    await asyncio.sleep(max(delay(attempt, 0), error.wait_s))

        return self._run(work())

    def ask(
        self,
        jobs: Sequence[Job[Answer]],
        *,
        tries: int | None = None,
        patience_s: float | None = None,
    ) -> tuple[list[Answer | Failed], Counts]:
        """Posts every job to /completions.

        Args:
            jobs: What is asked; answers come in their order.
            tries: Times a job is tried; by default the server's.
            patience_s: Seconds without connection; by default the server's.

        Raises:
            Unreachable: if no connection was taken, or nothing answered, for that long.
            RuntimeError: if the server refuses the key or no longer has the model.
        """
        call = Call(tries or self.server.tries, patience_s or self.server.patience_s)

        async def work() -> list[Answer | Failed]:
            try:
                async with asyncio.TaskGroup() as group:
                    rows = [self._ask(i, job, call) for i, job in enumerate(jobs)]
                    tasks = [group.create_task(row) for row in rows]
            except BaseExceptionGroup as errors:
                raise errors.exceptions[0] from None
            return [task.result() for task in tasks]

        answers = self._run(work())
        return answers, call.counts

    def start(self, place: int, job: Job[Answer], call: Call) -> Future[Answer | Failed]:
        """Posts one job while others are under way.

        Args:
            place: The job's number in its call, which spreads its waits.
            job: What is asked.
            call: What jobs of one stream share; see `begin`.

        Returns:
            Its answer to come; raises what `ask` would. Cancelling it ends the request.
        """
        if self._loop.is_closed():
            raise ValueError(f"the engine of {self.url} is closed: open a new one")
        return asyncio.run_coroutine_threadsafe(self._ask(place, job, call), self._loop)

    def begin(self) -> Call:
        """What the jobs of one stream share: patience and counts."""
        return Call(self.server.tries, self.server.patience_s)

    def close(self) -> None:
        """Closes all connections and ends the thread; twice is fine."""
        if self._loop.is_closed():
            return

        async def end() -> None:
            running = asyncio.all_tasks() - {asyncio.current_task()}
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)
            await self._http.aclose()

        asyncio.run_coroutine_threadsafe(end(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _run(self, work: Coroutine[Any, Any, Answer]) -> Answer:
        if self._loop.is_closed():
            work.close()
            raise ValueError(f"the engine of {self.url} is closed: open a new one")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:
            future.cancel()  # Ctrl-C in this thread must not leave the requests running
            raise

    async def _ask(self, place: int, job: Job[Any], call: Call) -> Any:
        """One job to its end. A row that waits keeps its slot: a struggling server gets less."""
        async with self._slots:
            attempt = 0
            while True:
                attempt += 1
                try:
                    url = f"{self.url}/completions"
                    reply = await self._send("POST", url, job.body, call, place)
                    return job.read(reply)
                except NoAnswer as error:
                    if isinstance(error, Busy) and not await self._answers_proof():
                        raise Unreachable(
                            f"{self.url} has no time for {call.patience_s:g} s ({error.reason}: "
                            f"{error.said}): run again later; what was committed is kept"
                        ) from error
                    if error.final or attempt == call.tries:
                        call.counts.failed[error.reason] += 1
                        call.counts.said = error.said or call.counts.said
                        return Failed(error.reason)
                    call.counts.retries += 1
                    await asyncio.sleep(max(delay(attempt, place), error.wait_s))

    async def _answers_proof(self) -> bool:
        """Whether the server still answers what it has answered before."""
        if self.proof is None:
            return False
        try:
            async with asyncio.timeout(self.server.timeout_s):
                reply = await self._request("POST", f"{self.url}/completions", self.proof)
                return reply.status == 200
        except (httpx.HTTPError, TimeoutError, NoAnswer):
            return False

    async def _send(self, method: str, url: str, body: Any, call: Call, salt: int = 0) -> Any:
        """Sends one request, again while the server is away or busy; returns the parsed answer."""
        waited, busy_since = 0, None
        while True:
            try:
                async with asyncio.timeout(self.server.timeout_s):
                    reply = await self._request(method, url, body)
            except (httpx.ConnectError, httpx.ConnectTimeout) as error:
                waited += 1
                await self._wait_for_server(call, waited, error)
                continue
            except TimeoutError:
                call.counts.requests += 1
                call.down_since = None  # it was there: connecting has a shorter limit of its own
                raise NoAnswer("timeout") from None
            except NoAnswer:  # it was there, and what it sent was not read to its end
                call.counts.requests += 1
                call.down_since = None
                raise
            except httpx.TransportError as error:
                call.counts.requests += 1
                call.down_since = None
                raise NoAnswer("connection_lost", one_line(str(error))) from error
            call.counts.requests += 1
            call.down_since = None
            if reply.status not in BUSY:
                return reply.parsed()
            waited += 1
            busy_since = time.monotonic() if busy_since is None else busy_since
            await self._wait_while_busy(call, busy_since, delay(waited, salt), reply)

    async def _request(self, method: str, url: str, body: Any) -> Reply:
        async with self._http.stream(method, url, json=body) as response:
            limit = PAGE_BYTES if body is None else answer_limit(body)
            return await read_reply(response, limit, self._key)

    async def _wait_while_busy(self, call: Call, since: float, wait_s: float, reply: Reply) -> None:
        left = call.patience_s - (time.monotonic() - since)
        if left <= 0:
            raise Busy(f"server_error_{reply.status}", reply.said(), final=True)
        if not call.warned:
            call.warned = True
            logger.warning("%s answers %d: waiting for it", self.url, reply.status)
        call.counts.retries += 1
        await asyncio.sleep(min(max(wait_s, reply.wait_s), left))

    async def _wait_for_server(self, call: Call, waited: int, error: Exception) -> None:
        now = time.monotonic()
        if call.down_since is None:
            call.down_since = now
            logger.warning("no connection to %s: waiting %g s for it", self.url, call.patience_s)
        left = call.patience_s - (now - call.down_since)
        if left <= 0:
            raise Unreachable(
                f"no connection to {self.url} for {call.patience_s:g} s ({one_line(str(error))}): "
                "start the server and run again; what was committed is kept"
            )
        await asyncio.sleep(min(delay(waited, 0), left))
