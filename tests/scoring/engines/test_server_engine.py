"""The server engine on a fake endpoint that misbehaves by plan.

The fake's score of a token is a function of its prefix, so a shifted, cut or swapped answer that
got through would be seen as another number.
"""

import asyncio
import dataclasses
import json
import logging
import socket
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import httpx
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines import server_client, server_engine
from siftline.scoring.engines.base import Failed, ModelSpec, Sampling, Server, open_engine
from siftline.scoring.engines.server_replies import ROUTES
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.recorder import Recorder

TRIES = 4
FAULTS = {
    "500": "server_error_500",
    "503": "server_error_503",
    "429": "server_error_429",
    "502": "server_error_502",
    "reset": "connection_lost",
    "half": "connection_lost",
    "cut": "bad_reply",
    "text": "bad_reply",
    "shift": "bad_reply",
    "swap": "bad_reply",
    "short": "bad_reply",
    "missing": "no_scores",
    "hole": "no_scores",
}
"""What a request can meet, and the reason recorded if that is all it ever meets."""
BUSY = ("429", "502", "503", "504")


class Fake:
    """An endpoint that answers right unless `plan` or `always` says otherwise of a prompt.

    Attributes:
        routes: Names of the routes to scores it takes.
        strict: Whether it refuses fields that OpenAI does not know.
        plan: Faults still to come, by prompt.
        always: A fault for good, by prompt.
        seen: Bodies of all requests.
        entry: Its line in the list of models.
        most: Most requests that were under way at a time.
        gate: Called by every request while it is under way.
    """

    def __init__(self, tokenizer, port=0):
        self.tokenizer = tokenizer
        self.version, self.key = "1.2.3", None
        self.models = [{"id": "m", "owned_by": "fake", "max_model_len": 60}]
        self.reset()
        self.start(port)

    def reset(self):
        self.routes, self.strict, self.tokens = ("prompt_logprobs", "echo"), False, True
        self.plan, self.always, self.seen = {}, {}, []
        self.active = self.most = 0
        self.gate = lambda: None
        self.lock, self.release = threading.Lock(), threading.Event()

    def start(self, port):
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): ...

            def do_GET(self):
                fake.get(self)

            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with fake.lock:
                    fake.seen.append(body)
                    fake.active += 1
                    fake.most = max(fake.most, fake.active)
                try:
                    fake.gate()
                    fake.post(self, body)
                finally:
                    with fake.lock:
                        fake.active -= 1

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.port}/v1"

    def stop(self):
        self.release.set()
        self.http.shutdown()
        self.http.server_close()

    @staticmethod
    def value(prefix, token):
        return -float((sum(prefix) * 31 + len(prefix) * 7 + token) % 97) / 8

    def send(self, handler, content, status=200, missing=0):
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        handler.send_response(status)
        handler.send_header("Content-Length", str(len(data) + missing))
        handler.end_headers()
        handler.wfile.write(data)

    def get(self, handler):
        if self.key and handler.headers["Authorization"] != f"Bearer {self.key}":
            self.send(handler, {"error": {"message": "no such key"}}, 401)
        elif handler.path == "/v1/models":
            self.send(handler, {"data": self.models})
        elif handler.path == "/version" and self.version:
            self.send(handler, {"version": self.version})
        else:
            self.send(handler, b"<html>nothing here</html>", 404)

    def post(self, handler, body):
        row = tuple(body["prompt"])
        with self.lock:
            fault = self.plan[row].pop(0) if self.plan.get(row) else self.always.get(row)
        if fault == "timeout":
            self.release.wait(30)
        elif fault == "reset":
            handler.connection.shutdown(socket.SHUT_RDWR)
        elif fault and fault.isdecimal():
            self.send(handler, {"error": {"message": f"planned\n{fault}"}}, int(fault))
        elif self.strict and set(body) & {"prompt_logprobs", "return_tokens_as_token_ids"}:
            self.send(handler, {"error": {"message": "unknown field"}}, 400)
        elif fault == "text":
            self.send(handler, b"<html>busy</html>")
        else:
            data = json.dumps(self.answer(body, list(row), fault)).encode()
            if fault in ("cut", "half"):
                data = data[: len(data) // 2]
            self.send(handler, data, missing=1 if fault == "half" else 0)

    def answer(self, body, row, fault):
        choice = {"text": "abcXd", "finish_reason": "length", "logprobs": None}
        if body.get("return_token_ids") and self.tokens:
            choice["token_ids"] = self.tokenizer.encode("abcXd")
        if fault != "missing":
            choice |= self.scores(body, row, fault)
        return {"choices": [choice], "usage": {"completion_tokens": 5}}

    def scores(self, body, row, fault):
        values = [None] + [self.value(row[:i], row[i]) for i in range(1, len(row))]
        named = row[:]
        if fault == "shift":
            values, named = [None, *values[2:], -1.0], [*row[1:], row[0]]
        elif fault == "swap":
            named[-1] = named[-1] ^ 1
        elif fault == "short":
            values, named = values[:-1], named[:-1]
        elif fault == "hole":
            values[len(row) // 2 or 1] = None
        found = {}
        if "prompt_logprobs" in body and "prompt_logprobs" in self.routes:
            found["prompt_logprobs"] = [
                value if value is None else {str(t): {"logprob": value, "rank": t % 3 + 1}}
                for value, t in zip(values, named, strict=True)
            ]
        if body.get("echo") and "echo" in self.routes:
            by_id = body.get("return_tokens_as_token_ids")
            names = [f"token_id:{t}" if by_id else self.tokenizer.decode([t]) for t in named]
            if fault not in ("short", "shift"):  # the generated token
                values, names = [*values, -0.5], [*names, "x"]
            found["logprobs"] = {"tokens": names, "token_logprobs": values}
        return found


@pytest.fixture(scope="module")
def endpoint(tiny):
    fake = Fake(tiny.make_tokenizer())
    yield fake
    fake.stop()


@pytest.fixture
def fake(endpoint, monkeypatch):
    monkeypatch.setattr(server_client, "BACKOFF_S", 0.002)
    endpoint.reset()
    entry = dict(endpoint.models[0])
    yield endpoint
    endpoint.release.set()
    endpoint.models, endpoint.version, endpoint.key = [entry], "1.2.3", None


@pytest.fixture
def spec(fake, tiny_model):
    server = Server(fake.url, tries=TRIES, concurrency=4, timeout_s=60, patience_s=60)
    return ModelSpec(str(tiny_model), engine="server", max_length=160, server=server)


def asking(spec, **changes):
    return dataclasses.replace(spec, server=dataclasses.replace(spec.server, **changes))


@pytest.fixture
def engine(spec):
    with open_engine(spec) as engine:
        yield engine


def random_rows(seed, lengths, low=3, high=259):
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, n).tolist() for n in lengths]


def expected(row, span):
    places = [i for a, b in zip(span[::2], span[1::2], strict=True) for i in range(a, b)]
    return [Fake.value(row[:i], row[i]) for i in places]


def equal(found, rows, spans):
    for mine, row, span in zip(found, rows, spans, strict=True):
        assert mine.dtype == np.float32
        assert mine.tolist() == expected(row, span)
    return True


# ---- scores, by every route ------------------------------------------------------------------


@pytest.mark.parametrize("route", range(len(ROUTES)))
def test_every_road_gives_the_scores_of_the_span_alone(fake, spec, route):
    fake.routes, fake.strict = (ROUTES[route].name,), route == 2
    rows = random_rows(route, [5, 9, 2, 12, 30])
    spans = [(1, 5), (3, 6), (1, 2), (2, 2), (1, 4, 10, 12, 29, 30)]
    with open_engine(spec) as engine:
        assert engine.route is ROUTES[route]
        fake.seen.clear()
        assert equal(engine.score(rows, spans), rows, spans)
        assert engine.score([], []) == []
        assert (engine.requests, engine.retries, engine.failed) == (4, 0, 0)
        # What follows a span is not sent, and an empty span is not asked for.
        sent = sorted(body["prompt"] for body in fake.seen)
        assert sent == sorted([rows[0], rows[1][:6], rows[2], rows[4]])
        if route:
            assert engine.details == frozenset()
            with pytest.raises(ValueError, match=r"server engine gives no top1: use engine"):
                engine.inspect(rows, spans, ("top1",))
        else:
            found = engine.inspect(rows, spans, ("top1",))
            assert found[4].top1.tolist() == [rows[4][i] % 3 == 0 for i in (1, 2, 3, 10, 11, 29)]
            assert found[3].top1.tolist() == []
        with pytest.raises(ValueError, match=r"engine gives no entropy"):
            engine.inspect(rows, spans, ("entropy",))


def test_minus_infinity_comes_back_from_its_stand_in(fake, engine, monkeypatch):
    row = random_rows(1, [6])[0]
    monkeypatch.setattr(fake, "value", lambda prefix, token: -9999.0)
    assert engine.score([row], [(4, 6)])[0].tolist() == [-np.inf, -np.inf]


def test_options_are_scored_as_continuations(fake, engine):
    prompts, options = random_rows(2, [4, 7]), [[40], [41, 42]]
    fake.always[(*prompts[1], 40)] = "500"
    found = engine.choices(prompts, options)
    assert found.dtype == np.float32
    first = [sum(expected([*prompts[0], *o], (4, 4 + len(o)))) for o in options]
    assert found[0].tolist() == first
    assert np.isnan(found[1]).all()
    assert engine.choices([], options).shape == (0, 2)
    with pytest.raises(ValueError, match="none may be empty"):
        engine.choices(prompts, [[5], []])


def test_refused_calls_send_nothing_and_leave_the_engine_usable(fake, engine):
    row = random_rows(3, [10])[0]
    fake.seen.clear()
    refused = [
        ("span", lambda: engine.score([row], [(0, 3)])),
        ("1 to 59 fit", lambda: engine.score([row * 6], [(1, 2)])),  # max_model_len is 60
        ("1 to 58 fit", lambda: engine.generate([[5] * 59], [[0]], Sampling())),
        ("engine: transformers", lambda: engine.embed([row])),
    ]
    for says, call in refused:
        with pytest.raises(ValueError, match=says) as error:
            call()
        assert "\n" not in str(error.value)
    assert fake.seen == []
    assert equal(engine.score([row], [(1, 10)]), [row], [(1, 10)])


def test_the_engine_works_below_a_running_loop_and_in_many_threads(engine):
    rows, spans = random_rows(4, [8] * 12), [(2, 8)] * 12
    found = {}

    async def inside():
        return engine.score(rows, spans)

    def ask(name):
        found[name] = engine.score(rows, spans)

    threads = [threading.Thread(target=ask, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    assert equal(asyncio.run(inside()), rows, spans)
    for thread in threads:
        thread.join()
    assert all(equal(found[n], rows, spans) for n in range(4))
    engine.close()
    engine.close()
    with pytest.raises(ValueError, match="is closed: open a new one"):
        engine.score(rows, spans)


# ---- text -----------------------------------------------------------------------------------


def test_a_draw_is_one_request_with_its_own_seed(fake, engine):
    fake.seen.clear()
    sampling = Sampling(max_new_tokens=7, temperature=0.5, top_p=0.9, stop=("Z", "X"))
    drawn = engine.generate([[5, 6], [7] * 55, [8]], [[3, 2**63 - 1], [4], []], sampling)
    assert [[(g.text, g.n_tokens) for g in own] for own in drawn] == [
        [("abc", 5)] * 2,
        [("abc", 5)],
        [],
    ]
    asked = {body["seed"]: body for body in fake.seen}
    assert sorted(asked) == [3, 4, 2**63 - 1]
    assert asked[4]["max_tokens"] == 4  # 55 of 59 are taken
    eos = fake.tokenizer.eos_token_id
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.9, "stop": ["Z", "X"]}
    assert asked[3].items() >= {**wanted, "stop_token_ids": [eos], "prompt": [5, 6]}.items()
    # Without token ids the server's own text and count are taken.
    fake.tokens = False
    assert engine.generate([[5, 6]], [[3]], sampling)[0] == drawn[0][:1]


def test_a_draw_that_fails_is_alone_in_it(fake, engine):
    fake.always[(5, 6)] = "500"
    fake.plan[(7,)] = ["429", "cut"]
    bad, good = engine.generate([[5, 6], [7]], [[1, 2], [3]], Sampling(max_new_tokens=5))
    assert bad == [Failed("server_error_500")] * 2
    assert good[0].text == "abcXd"
    assert engine.failed == 2


def test_a_stream_keeps_its_connections_busy_and_names_each_draw(fake, engine):
    fake.always[(7,)] = "500"
    left = [(f"draw {seed}", [5, 6] if seed % 3 else [7], seed) for seed in range(9)]
    left.insert(4, ("long", [5] * (engine.max_length + 1), 1))
    flying, most = set(), []

    def pull(free, idle):
        assert idle == (not flying)
        asked = [left.pop(0) for _ in range(min(free, len(left)))]
        flying.update(name for name, _, _ in asked)
        most.append(len(flying))
        return asked

    found = {}
    for name, text in engine.stream(pull, Sampling(max_new_tokens=5)):
        flying.remove(name)
        found[name] = text
    assert max(most) == min(engine.slots, 10)
    assert found.pop("long") == Failed("refused")
    failed = {f"draw {seed}" for seed in (0, 3, 6)}
    assert {n for n, g in found.items() if isinstance(g, Failed)} == failed
    assert {g.text for n, g in found.items() if n not in failed} == {"abcXd"}
    assert engine.failed == 3


# ---- faults ---------------------------------------------------------------------------------


@pytest.mark.parametrize("route", [0, 1])
@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault not in BUSY])
def test_a_fault_costs_a_retry_and_a_lasting_one_the_row(fake, spec, fault, route, caplog):
    fake.routes = (ROUTES[route].name,)
    rows, spans = random_rows(5, [8, 9, 10]), [(1, 8), (4, 9), (2, 10)]
    with open_engine(spec) as engine:
        fake.plan[tuple(rows[1])] = [fault] * (TRIES - 1)
        assert equal(engine.score(rows, spans), rows, spans)
        assert (engine.requests, engine.retries, engine.failed) == (2 + TRIES, TRIES - 1, 0)
        fake.always[tuple(rows[1])] = fault
        found = engine.score(rows, spans)
        assert found[1] == Failed(FAULTS[fault])
        assert equal(found[::2], rows[::2], spans[::2])
        assert (engine.requests, engine.retries, engine.failed) == (
            2 * (2 + TRIES),
            2 * (TRIES - 1),
            1,
        )
    summary = [r.getMessage() for r in caplog.records if r.name == server_engine.__name__][-1]
    assert f"1 of 3 rows failed {{'{FAULTS[fault]}': 1}}" in summary
    assert f"{2 + TRIES} requests, {TRIES - 1} of them retries" in summary
    assert "\n" not in summary


def test_a_row_the_server_refuses_is_not_asked_again(fake, engine):
    rows, spans = random_rows(6, [8, 9]), [(1, 8), (4, 9)]
    fake.always[tuple(rows[0])] = "400"
    found = engine.score(rows, spans)
    assert found[0] == Failed("refused")
    assert equal(found[1:], rows[1:], spans[1:])
    assert (engine.requests, engine.retries) == (2, 0)


@pytest.mark.parametrize("status", ["401", "404"])
def test_a_server_that_turns_us_away_ends_the_call(fake, engine, status):
    rows = random_rows(7, [8] * 6)
    fake.always = {tuple(row): status for row in rows}
    with pytest.raises(RuntimeError, match=rf"answers {status} \(planned {status}\)") as error:
        engine.score(rows, [(1, 8)] * 6)
    assert "\n" not in str(error.value)
    fake.always = {}
    assert equal(engine.score(rows[:1], [(1, 8)]), rows[:1], [(1, 8)])


def test_a_request_that_hangs_times_out(fake, spec):
    rows, spans = random_rows(8, [8, 9, 10]), [(1, 8), (4, 9), (1, 10)]
    with open_engine(asking(spec, timeout_s=0.7, tries=3)) as engine:
        fake.plan[tuple(rows[0])] = ["timeout"]
        fake.always[tuple(rows[1])] = "timeout"
        found = engine.score(rows, spans)
        assert found[1] == Failed("timeout")
        assert equal(found[::2], rows[::2], spans[::2])
        assert engine.retries >= 3
        assert engine.failed == 1


@given(
    st.lists(st.lists(st.sampled_from(sorted(FAULTS)), max_size=TRIES - 1), min_size=1, max_size=6),
    st.sampled_from([0, 1]),
)
@settings(max_examples=40, deadline=None)
def test_any_faults_below_the_number_of_tries_leave_the_scores_alone(faulty, plans, route):
    fake, engines = faulty
    rows = random_rows(len(plans), [7 + i for i in range(len(plans))])
    spans = [(1 + i % 3, len(row)) for i, row in enumerate(rows)]
    engine = engines[route]
    before = engine.requests, engine.retries
    fake.plan = {tuple(row): list(plan) for row, plan in zip(rows, plans, strict=True)}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_client, "BACKOFF_S", 0.001)
        assert equal(engine.score(rows, spans), rows, spans)
    faults = sum(map(len, plans))
    assert engine.requests - before[0] == len(rows) + faults
    assert engine.retries - before[1] == faults
    assert engine.failed == 0
    assert not any(fake.plan.values())


@pytest.fixture(scope="module")
def faulty(endpoint, tiny_model):
    """The endpoint and an engine on each route, for many examples."""
    endpoint.reset()
    server = Server(endpoint.url, tries=TRIES, timeout_s=60)
    spec = ModelSpec(str(tiny_model), engine="server", server=server)
    engines = []
    for route in ROUTES[:2]:
        endpoint.routes = (route.name,)
        engines.append(open_engine(spec))
    endpoint.reset()
    yield endpoint, engines
    for engine in engines:
        engine.close()


def test_requests_under_way_stay_within_the_bound_and_use_it(fake, spec):
    rows = random_rows(9, [6] * 20)
    with open_engine(asking(spec, concurrency=3)) as engine:
        full = threading.Event()

        def wait_for_two_others():
            if fake.active == 3:
                full.set()
            full.wait(20)

        fake.gate, fake.most = wait_for_two_others, 0
        assert equal(engine.score(rows, [(1, 6)] * 20), rows, [(1, 6)] * 20)
        assert fake.most == 3


def test_waits_double_up_to_a_limit_and_are_the_same_every_time():
    for salt in range(20):
        waits = [server_client.delay(attempt, salt) for attempt in range(1, 400)]
        assert waits == [server_client.delay(attempt, salt) for attempt in range(1, 400)]
        for i, wait in enumerate(waits):
            limit = min(server_client.BACKOFF_S * 2**i, server_client.LONGEST_WAIT_S)
            assert limit / 2 <= wait < limit
    assert len({server_client.delay(1, salt) for salt in range(20)}) == 20


# ---- a server that is away ------------------------------------------------------------------


def test_a_server_that_comes_back_costs_no_row_a_try(tiny, tiny_model, monkeypatch, caplog):
    monkeypatch.setattr(server_client, "BACKOFF_S", 0.01)
    fake = Fake(tiny.make_tokenizer())
    server = Server(fake.url, tries=1, concurrency=4, patience_s=60)
    rows, spans = random_rows(10, [8] * 10), [(2, 8)] * 10
    with open_engine(ModelSpec(str(tiny_model), engine="server", server=server)) as engine:
        fake.stop()

        def come_back(record):
            if "no connection" in record.getMessage():
                fake.start(fake.port)
            return True

        client_log = logging.getLogger(server_client.__name__)
        client_log.addFilter(come_back)  # it starts again once it has been missed
        try:
            assert equal(engine.score(rows, spans), rows, spans)
        finally:
            client_log.removeFilter(come_back)
        assert (engine.requests, engine.retries, engine.failed) == (10, 0, 0)
        fake.stop()
        engine._client.server = dataclasses.replace(server, patience_s=0.1)
        with pytest.raises(RuntimeError, match=r"no connection to .* for 0\.1 s .*kept") as error:
            engine.score(rows, spans)
        assert "\n" not in str(error.value)
        fake.start(fake.port)
        assert equal(engine.score(rows, spans), rows, spans)
        fake.stop()


@pytest.mark.parametrize("status", BUSY)
def test_a_busy_server_costs_no_row_a_try(fake, spec, status):
    rows, spans = random_rows(11, [8, 9]), [(1, 8), (4, 9)]
    with open_engine(asking(spec, tries=1)) as engine:
        fake.plan[tuple(rows[0])] = [status] * 7
        assert equal(engine.score(rows, spans), rows, spans)
        assert (engine.requests, engine.retries, engine.failed) == (9, 7, 0)


def test_a_row_that_alone_keeps_the_server_busy_fails_and_stops_no_run(fake, spec):
    rows, spans = random_rows(12, [8, 9]), [(1, 8), (4, 9)]
    with open_engine(asking(spec, patience_s=0.2)) as engine:
        fake.always[tuple(rows[0])] = "502"
        found = engine.score(rows, spans)
        assert found[0] == Failed("server_error_502")
        assert equal(found[1:], rows[1:], spans[1:])
        assert engine.score(rows[:1], spans[:1]) == [Failed("server_error_502")]


def test_a_server_that_stays_busy_ends_the_run(fake, spec):
    row = random_rows(13, [8])[0]
    impatient = asking(spec, patience_s=0.2)

    def busy():
        fake.always[tuple(fake.seen[-1]["prompt"])] = "503"

    with open_engine(impatient) as engine:
        fake.gate = busy
        says = r"has no time for 0\.2 s \(server_error_503: planned 503\): run again.*kept"
        with pytest.raises(RuntimeError, match=says) as error:
            engine.score([row], [(1, 8)])
        assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"can't use .* has no time"):
        open_engine(impatient)


@pytest.mark.parametrize("lost", [httpx.ReadError("reset"), None])
def test_a_connection_that_was_lost_was_one(spec, monkeypatch, lost):
    """Patience counts from the last connection, whatever became of the request on it."""
    clock, calls = [0.0], []

    async def answer(request):
        calls.append(request)
        clock[0] += 8.0
        if len(calls) in (1, 3):
            raise httpx.ConnectError("refused")
        if len(calls) == 2 and lost is not None:
            raise lost
        if len(calls) == 2:
            await asyncio.sleep(60)
        return httpx.Response(200, json={})

    monkeypatch.setattr(server_client, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    client = server_client.Client(dataclasses.replace(spec.server, patience_s=10, timeout_s=0.3))
    client._http = httpx.AsyncClient(transport=httpx.MockTransport(answer))
    (found,), counts = client.ask([server_client.Job({}, lambda reply: reply)])
    assert found == {}
    assert (len(calls), counts.requests, counts.retries) == (4, 2, 1)
    client.close()


# ---- meeting a server -----------------------------------------------------------------------


def test_a_server_that_is_no_use_is_refused_in_one_line(fake, spec, tiny, tmp_path, monkeypatch):
    def clients():
        return sum(thread.name == "server-client" for thread in threading.enumerate())

    running = clients()

    def refused(says, spec):
        with pytest.raises(ValueError, match=says) as error:
            open_engine(spec)
        assert "\n" not in str(error.value)
        assert clients() == running

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
        away = r"no connection to .* for 0\.1 s \(.*start the server.*or correct its url"
        refused(away, asking(spec, url=nobody, patience_s=0.1))
    refused("lists no models.*say in /v1", asking(spec, url=fake.url.removesuffix("/v1")))
    refused("model 'other' not there: set server's model to one of m", asking(spec, model="other"))
    refused("NO_SUCH_KEY is not set", asking(spec, key_variable="NO_SUCH_KEY"))
    refused("url is 'http://h:x/v1'", asking(spec, url="http://h:x/v1"))
    (tmp_path / "adapter_config.json").write_text("{}")
    refused("takes no adapter", dataclasses.replace(spec, adapter=str(tmp_path)))
    fake.routes = ()
    refused(r"no log-probabilities.*prompt_logprobs: no_scores.*echo: no_scores", spec)
    fake.strict = True
    refused(r"prompt_logprobs: refused \(unknown field\).*serve the model with vLLM", spec)
    fake.reset()
    fake.gate = lambda: fake.plan.setdefault(tuple(fake.seen[-1]["prompt"]), ["500"] * 50)
    refused("test of prompt_logprobs ended in server_error_500.*run again", spec)
    fake.reset()
    fake.models[0]["parent"] = "base"
    refused("model 'm' is an adapter on 'base'.*name base and adapter in the model's revis", spec)
    del fake.models[0]["parent"]
    fake.models.append({"id": "n"})
    refused("set server's model to one of m, n", spec)
    fake.key = "right"
    monkeypatch.setenv("SOME_KEY", "wrong")
    refused(r"answers 401 \(no such key\).*key_variable", asking(spec, key_variable="SOME_KEY"))
    monkeypatch.setenv("SOME_KEY", "right")
    open_engine(asking(spec, key_variable="SOME_KEY", model="n")).close()
    tiny.make_tokenizer().save_pretrained(tmp_path)
    bare = dataclasses.replace(spec, path=str(tmp_path))
    fake.seen.clear()
    refused(r"no weights, so nothing tells.*set the model's revision", bare)
    assert fake.seen == []


def test_a_flaky_moment_at_the_start_does_not_change_the_road(fake, spec):
    left = ["500", "missing"]

    def once():
        fake.plan = {tuple(fake.seen[-1]["prompt"]): [left.pop(0)]} if left else {}

    fake.gate = once
    with open_engine(spec) as engine:
        assert engine.route is ROUTES[0]
    assert left == []


def test_the_fingerprint_names_weights_and_server_but_neither_address_nor_name(
    fake, spec, tiny, tmp_path
):
    def of(spec):
        with open_engine(spec) as engine:
            assert engine.fingerprint() == engine.fingerprint()
            return engine.fingerprint()

    first = of(spec)
    other_url = fake.url.replace("127.0.0.1", "localhost")
    fake.version, fake.models = "1.2.9", [{**fake.models[0], "id": "renamed"}]
    assert of(asking(spec, url=other_url, concurrency=1, model="renamed")) == first
    tiny.make_tokenizer().save_pretrained(tmp_path)
    bare = dataclasses.replace(spec, path=str(tmp_path), revision="a")
    prints = [first, of(bare), of(dataclasses.replace(bare, revision="b"))]
    prints.append(of(dataclasses.replace(spec, revision="a")))
    fake.routes = ("echo",)
    prints.append(of(spec))
    fake.version = "1.3.0"
    prints.append(of(spec))
    fake.version = None
    prints.append(of(spec))
    # Adapters of one server: the revision is what tells them apart.
    fake.models = [{"id": "one", "parent": "m"}, {"id": "other", "parent": "m"}]
    named = [asking(dataclasses.replace(spec, revision=n), model=n) for n in ("one", "other")]
    prints.extend(map(of, named))
    fake.models = [{"id": "m", "owned_by": "another"}]
    prints.append(of(spec))
    assert len(set(prints)) == len(prints)


def test_importing_the_engine_loads_no_model_library():
    code = (
        "import sys, siftline.scoring.engines.server_engine as e; "
        "sys.exit(bool({'torch', 'vllm', 'transformers', 'dagster'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ---- through the store ----------------------------------------------------------------------


def conversations(n):
    rows = []
    for i in range(n):
        question, reply = message("user", f"{i}+{i}?"), message("assistant", f"is {2 * i}")
        rows.append(make_row([question, reply]))
    return pa.Table.from_pylist(rows, schema=ROW)


def test_a_row_that_always_fails_ends_as_failed_with_its_reason(fake, engine, spec, tmp_path):
    rows = conversations(6)
    ids = rows["id"].to_pylist()
    recorder = Recorder(engine, spec, tmp_path)
    fake.seen.clear()
    whole, none = score_likelihood(Recorder(engine, spec, tmp_path / "whole"), 0, rows)
    assert not none
    asked = Counter(tuple(body["prompt"]) for body in fake.seen)
    text = engine.tokenizer.encode("4+4?")
    bad = next(p for p in asked if str(text)[1:-1] in str(list(p)))  # row 4 with its prompt
    fake.always[bad] = "500"
    scores, failed = score_likelihood(recorder, 0, rows)
    assert failed == {ids[4]: "server_error_500"}
    assert scores.equals(whole.filter(whole["id"] != ids[4]))
    assert recorder.tally.failed == engine.failed == 1
    # It is asked again next time, and only it.
    fake.always.clear()
    fake.seen.clear()
    scores, failed = score_likelihood(recorder, 0, rows)
    assert scores.equals(whole)
    assert not failed
    assert [tuple(body["prompt"]) for body in fake.seen] == [bad]
