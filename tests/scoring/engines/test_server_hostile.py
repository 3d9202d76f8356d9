"""The server engine against a server that lies, floods, repeats the API key, or dies."""

import dataclasses
import gzip
import json
import logging
import math
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines import server_client
from siftline.scoring.engines import server_replies as server_http
from siftline.scoring.engines.base import Failed, ModelSpec, Sampling, Server, open_engine
from siftline.scoring.engines.server_replies import (
    NoAnswer,
    read_draw,
    read_echo,
    read_prompt_logprobs,
    without,
)
from siftline.scoring.measures.likelihood import score_likelihood
from siftline.scoring.recorder import Recorder

KEY = "sk-Abc/123+secret"
BAD = Failed("bad_reply")


def honest(body):
    row = body["prompt"]
    entries = [None] + [{str(t): {"logprob": -t / 8, "rank": t % 3 + 1}} for t in row[1:]]
    choice = {"text": "yes", "finish_reason": "stop", "prompt_logprobs": entries}
    usage = {"prompt_tokens": len(row), "completion_tokens": 1}
    return {"choices": [choice], "usage": usage}


class Hostile:
    """Answers honestly, but for what `twist` (takes body and honest answer) makes of it.

    `twist` gives JSON, or bytes, or (status, headers, bytes). `seen` counts requests.
    """

    def __init__(self):
        self.twist = lambda body, reply: reply
        self.models = {"data": [{"id": "m", "owned_by": "hostile", "max_model_len": 90}]}
        self.seen, self.headers = 0, []
        self.start(0)

    def start(self, port):
        hostile = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *_): ...

            def do_GET(self):
                hostile.headers.append(dict(self.headers))
                pages = {"/v1/models": hostile.models, "/version": {"version": "1.2"}}
                self.give(pages.get(self.path, {}))

            def do_POST(self):
                hostile.headers.append(dict(self.headers))
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                hostile.seen += 1
                self.give(hostile.twist(body, honest(body)))

            def give(self, said):
                status, headers, data = said if isinstance(said, tuple) else (200, {}, said)
                if callable(data):
                    self.send_response(status)
                    for item in {"Connection": "close", **headers}.items():
                        self.send_header(*item)
                    self.end_headers()
                    data(self.wfile)
                    return
                data = data if isinstance(data, bytes) else json.dumps(data).encode()
                self.send_response(status)
                for item in {"Content-Length": str(len(data)), **headers}.items():
                    self.send_header(*item)
                self.end_headers()
                self.wfile.write(data)

        self.http = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self.http.daemon_threads = True
        self.port = self.http.server_address[1]
        threading.Thread(target=self.http.serve_forever, args=(0.02,), daemon=True).start()

    def stop(self):
        self.http.shutdown()
        self.http.server_close()


@pytest.fixture
def hostile(monkeypatch):
    monkeypatch.setattr(server_client, "BACKOFF_S", 0.001)
    monkeypatch.setenv("SOME_KEY", KEY)
    server = Hostile()
    yield server
    server.stop()


@pytest.fixture
def spec(hostile, tiny_model):
    server = Server(
        f"http://127.0.0.1:{hostile.port}/v1", tries=2, concurrency=2, timeout_s=30,
        patience_s=0.2, key_variable="SOME_KEY",
    )  # fmt: skip
    return ModelSpec(str(tiny_model), engine="server", max_length=80, server=server)


@pytest.fixture
def engine(spec):
    with open_engine(spec) as engine:
        yield engine


ROW_SENT, GOOD_ROW = [40, 50, 60, 70], [41, 51, 61]


def scored(hostile, engine, twist):
    """What one row gets from the twisted server; another one is answered and goes on."""
    hostile.twist = lambda body, reply: (
        twist(body, reply) if body["prompt"] == ROW_SENT else reply
    )
    bad, good = engine.score([ROW_SENT, GOOD_ROW], [(1, 4), (1, 3)])
    assert good.tolist() == [-51 / 8, -61 / 8]
    return bad


def entry(**changes):
    """Changes the entry of the third token."""

    def twist(body, reply):
        reply["choices"][0]["prompt_logprobs"][2]["60"].update(changes)
        return reply

    return twist


def usage(**counts):
    return lambda body, reply: {**reply, "usage": {**reply["usage"], **counts}}


LIES = {
    "positive": entry(logprob=0.25),
    "slightly positive": entry(logprob=0.01),
    "nan": entry(logprob=math.nan),
    "infinite": entry(logprob=math.inf),
    "huge": entry(logprob=10**400),
    "text": entry(logprob="-1"),
    "true": entry(logprob=True),
    "list": entry(logprob=[-1.0]),
    "rank 0": entry(rank=0),
    "rank -1": entry(rank=-1),
    "rank 1.5": entry(rank=1.5),
    "rank huge": entry(rank=10**30),
    "rank text": entry(rank="1"),
    "prompt tokens": usage(prompt_tokens=5),
    "prompt tokens text": usage(prompt_tokens="4"),
    "no choice": lambda body, reply: {**reply, "choices": []},
    "two choices": lambda body, reply: {**reply, "choices": reply["choices"] * 2},
    "choices missing": lambda body, reply: {"usage": reply["usage"]},
    "choice a list": lambda body, reply: {"choices": [[]]},
    "a list": lambda body, reply: [reply],
    "null": lambda body, reply: b"null",
    "entries an object": lambda body, reply: {"choices": [{"prompt_logprobs": {"a": 1}}]},
    "entries too many": lambda body, reply: {
        "choices": [{"prompt_logprobs": [*reply["choices"][0]["prompt_logprobs"], None]}]
    },
    "nested lists": lambda body, reply: b"[" * 50_000,
    "nested objects": lambda body, reply: b'{"choices":' * 50_000,
    "nested in an error": lambda body, reply: (400, {}, b'{"error":' * 50_000),
    "long number": lambda body, reply: b'{"choices": ' + b"9" * 100_000 + b"}",
    "not utf-8": lambda body, reply: b'{"choices": "\xff\xfe"}',
    "gzip that is none": lambda body, reply: (200, {"Content-Encoding": "gzip"}, b"{}"),
    "another packing": lambda body, reply: (200, {"Content-Encoding": "zstd"}, b"{}"),
    "odd charset": lambda body, reply: (
        200, {"Content-Type": "text/html; charset=punycode"}, b"<html>" * 9,
    ),
}  # fmt: skip


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_about_scores_costs_its_row_alone(hostile, engine, lie, caplog):
    wanted = Failed("refused") if lie == "nested in an error" else BAD
    assert scored(hostile, engine, LIES[lie]) == wanted
    said = [r.getMessage() for r in caplog.records if "rows failed" in r.getMessage()]
    assert all(len(line) < 500 and "\n" not in line for line in said)


def test_rounding_above_zero_is_zero_and_minus_infinity_is_read(hostile, engine):
    assert scored(hostile, engine, entry(logprob=1e-6)).tolist() == [-50 / 8, 0.0, -70 / 8]
    assert scored(hostile, engine, entry(logprob=-math.inf)).tolist()[1] == -math.inf


def test_ranks_that_stop_coming_are_missed(hostile, engine):
    hostile.twist = entry(rank=None)
    assert engine.inspect([ROW_SENT], [(1, 4)], ("top1",)) == [BAD]
    assert engine.score([ROW_SENT], [(1, 4)])[0].tolist() == [-50 / 8, -60 / 8, -70 / 8]


def flood(wfile, block=b"[" * (1 << 20)):
    """Sends until nobody listens, at most 400 MB; says how much it was."""
    sent = 0
    try:
        while sent < 400:
            wfile.write(block)
            sent += 1
    except OSError:
        pass
    return sent


@pytest.mark.parametrize("packed", [False, True])
def test_a_flood_is_cut_off(hostile, engine, packed):
    sent = []
    block = gzip.compress(b" " * (200 << 20), 1) if packed else b"[" * (1 << 20)

    def twist(body, reply):
        headers = {"Content-Encoding": "gzip"} if packed else {}
        if packed:
            return 200, headers, block
        return 200, headers, lambda wfile: sent.append(flood(wfile))

    assert scored(hostile, engine, twist) == BAD
    hostile.http.shutdown()
    assert all(megabytes < 100 for megabytes in sent)  # what the kernel buffers, not all
    assert server_http.answer_limit({"prompt": [1] * 1000, "max_tokens": 24}) == 2 << 20


def test_an_honest_answer_may_be_packed(hostile, engine):
    def twist(body, reply):
        return 200, {"Content-Encoding": "gzip"}, gzip.compress(json.dumps(reply).encode())

    assert scored(hostile, engine, twist).tolist() == [-50 / 8, -60 / 8, -70 / 8]


# ---- text -----------------------------------------------------------------------------------


def choice(**changes):
    return lambda body, reply: {**reply, "choices": [{**reply["choices"][0], **changes}]}


TALL_TALES = {
    "more tokens than asked": usage(completion_tokens=1000),
    "text of no tokens": usage(completion_tokens=0),
    "negative": usage(completion_tokens=-1),
    "true": usage(completion_tokens=True),
    "prompt counted otherwise": usage(prompt_tokens=1),
    "counts differ": choice(token_ids=[40, 41]),
    "ids no list": choice(token_ids="40"),
    "id negative": choice(token_ids=[-1]),
    "id huge": choice(token_ids=[2**40]),
    "id a fraction": choice(token_ids=[1.5]),
    "no text": choice(text=None),
    "half a pair": choice(text="\ud800"),
    "another end": choice(finish_reason="content_filter"),
    "a list for an end": choice(finish_reason=["stop"]),
}


@pytest.mark.parametrize("tale", TALL_TALES)
def test_a_lie_about_a_draw_costs_it_alone(hostile, engine, tale):
    hostile.twist = lambda body, reply: (
        TALL_TALES[tale](body, reply) if body["prompt"] == [5, 6] else reply
    )
    bad, good = engine.generate([[5, 6], [7]], [[1], [2]], Sampling(max_new_tokens=5))
    assert (bad, good[0].text) == ([BAD], "yes")


JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=4)
    | st.dictionaries(
        st.sampled_from(
            ["choices", "prompt_logprobs", "logprobs", "token_logprobs", "tokens", "text", "usage",
             "token_ids", "finish_reason", "prompt_tokens", "completion_tokens", "7", "logprob",
             "rank"]
        ),
        inner,
        max_size=4,
    ),
    max_leaves=20,
)  # fmt: skip


def reasons(read, *arguments):
    """What a reader makes of an answer, or the reason for making nothing of it."""
    try:
        return read(*arguments)
    except NoAnswer as error:
        return error.reason


@given(JUNK)
@settings(max_examples=100, deadline=None)
def test_any_json_is_an_answer_or_none(reply):
    for read in (read_prompt_logprobs, read_echo):
        found = reasons(read, reply, [3, 7], chr)
        assert found in ("bad_reply", "no_scores") or found.logprobs[1] <= 0
    draw = reasons(read_draw, reply, 2, 5)
    assert draw == "bad_reply" or 0 <= draw.n_tokens <= 6


# ---- the key --------------------------------------------------------------------------------


def escaped(text):
    return "".join(f"\\u{ord(letter):04x}" for letter in text)


SAYS_THE_KEY = {
    "an error's message": lambda body, reply: (
        400, {}, {"error": {"message": f"bad key Bearer {KEY}"}},
    ),
    "an error's escapes": lambda body, reply: (
        400, {}, f'{{"error": {{"message": "bad key {escaped(KEY)}"}}}}'.encode(),
    ),
    "a page": lambda body, reply: (500, {}, f"<html>{KEY} is wrong".encode()),
    "a busy page": lambda body, reply: (503, {}, f"<html>{KEY} is wrong".encode()),
    "a bad reply": lambda body, reply: f"hello {KEY}".encode(),
    "a wrong type": entry(logprob=f"it is {KEY}"),
    "the end": choice(finish_reason=f"{KEY}!"),
    "a redirect": lambda body, reply: (302, {"Location": f"/v1/{KEY}"}, b"moved"),
    "401": lambda body, reply: (401, {}, {"error": {"message": f"{KEY} is not a key"}}),
    "a slashed error": lambda body, reply: (
        400, {}, b'{"error": {"message": "%s"}}' % KEY.replace("/", "\\/").encode(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("how", SAYS_THE_KEY)
def test_the_key_reaches_no_log_and_no_error(hostile, spec, how, caplog, capfd):
    caplog.set_level(logging.DEBUG)
    errors = []
    with open_engine(spec) as engine:
        hostile.twist = SAYS_THE_KEY[how]
        for call in (
            lambda: engine.score([ROW_SENT], [(1, 4)]),
            lambda: engine.generate([[5, 6]], [[1]], Sampling(max_new_tokens=5)),
            lambda: open_engine(spec).close(),
        ):
            try:
                call()
            except (RuntimeError, ValueError) as error:
                while error is not None:
                    errors.append(f"{error!r} {error}")
                    error = error.__cause__ or error.__context__
    told = "\n".join([*errors, *(r.getMessage() for r in caplog.records), *capfd.readouterr()])
    assert any(h.get("Authorization") == f"Bearer {KEY}" for h in hostile.headers)
    assert KEY not in told
    assert KEY[3:] not in told
    if how != "the end":
        assert "bad_reply" in told or server_http.HIDDEN in told


def test_the_key_in_a_text_or_a_models_name_is_hidden(hostile, engine, spec, tmp_path):
    hostile.twist = choice(text=f"the key is {KEY}")
    ((draw,),) = engine.generate([[5, 6]], [[1]], Sampling(max_new_tokens=5))
    assert draw.text == f"the key is {server_http.HIDDEN}"
    hostile.models = {"data": [{"id": KEY}, {"id": "n"}]}
    with pytest.raises(ValueError, match=r"one of \[API key\], n"):
        open_engine(spec)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.text(alphabet="XYZ", max_size=6)), st.text(alphabet="XYZ", min_size=1))
def test_hiding_leaves_no_key_and_nothing_else_changed(texts, key):
    held = {"deep": [{"in": list(texts), key: 1}], "number": 3}
    found = without(held, key)
    assert found["number"] == 3
    assert found["deep"][0]["in"] == [t.replace(key, server_http.HIDDEN) for t in texts]
    assert key not in found["deep"][0]


@pytest.mark.parametrize("key", ["sk-1\n", "sk 1", "sk-ü", "\r"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(spec, monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    with pytest.raises(ValueError, match=r"SOME_KEY holds what no API key has") as error:
        open_engine(spec)
    assert key.strip() == "" or key.strip() not in str(error.value)


@pytest.mark.parametrize("url", ["http://me:pw" + "@h/v1", "http://h/v1?key=pw", "https://h/v1#pw"])
def test_a_password_in_the_url_is_refused_and_not_shown(url):
    with pytest.raises(ValueError, match="key_variable") as error:
        Server(url)
    assert "pw" not in str(error.value)


def test_no_redirect_is_followed(hostile, spec):
    other = Hostile()
    moved = (307, {"Location": f"http://127.0.0.1:{other.port}/v1/completions"}, b"")
    with open_engine(spec) as engine:
        hostile.twist = lambda body, reply: moved
        assert engine.score([ROW_SENT], [(1, 4)]) == [Failed("refused")]
    hostile.models = (308, {"Location": f"http://127.0.0.1:{other.port}/v1/models"}, b"")
    with pytest.raises(ValueError, match=r"answers 308 \(it redirects to .*set the server's url"):
        open_engine(spec)
    assert (other.seen, other.headers) == (0, [])
    other.stop()


# ---- meeting it, and losing it --------------------------------------------------------------


@pytest.mark.parametrize(
    ("models", "says"),
    [
        ({"data": [{"id": "m", "max_model_len": -5}]}, "takes -5 tokens"),
        ({"data": [{"id": "m", "max_model_len": True}]}, "takes True tokens"),
        ({"data": [{"id": ["m"]}]}, "lists no models"),
        ({"data": {"id": "m"}}, "lists no models"),
        (b"[" * 100_000, "lists no models"),
        (b" " * (17 << 20), "lists no models"),
    ],
)
def test_a_list_of_models_that_is_none_is_said_in_one_line(hostile, spec, models, says):
    hostile.models = models
    with pytest.raises(ValueError, match=says) as error:
        open_engine(spec)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 500


def test_a_server_that_dies_in_mid_run_costs_what_was_not_committed(hostile, spec, tmp_path):
    rows = [
        make_row([message("user", f"{i}+{i}?"), message("assistant", f"it is {2 * i}")])
        for i in range(12)
    ]
    table = pa.Table.from_pylist(sorted(rows, key=lambda r: r["id"]), schema=ROW)
    spec = dataclasses.replace(spec, batch_tokens=120)
    with open_engine(spec) as engine:
        whole, failed = score_likelihood(Recorder(engine, spec, tmp_path / "calm"), 0, table)
        assert not failed
        before, dying = hostile.seen, threading.Event()

        def die(body, reply):
            if hostile.seen - before > 14 and not dying.is_set():
                dying.set()
                hostile.http.server_close()  # takes no connection any more
                threading.Thread(target=hostile.http.shutdown).start()
            return (
                (200, {"Content-Length": "999999", "Connection": "close"}, b"{")
                if (dying.is_set())
                else (200, {"Connection": "close"}, reply)
            )

        hostile.twist = die
        with pytest.raises(ConnectionError, match=r"no connection to .* for 0\.2 s") as error:
            score_likelihood(Recorder(engine, spec, tmp_path / "store"), 0, table)
        assert "\n" not in str(error.value)
        hostile.twist = lambda body, reply: reply
        hostile.start(hostile.port)
        again, asked = Recorder(engine, spec, tmp_path / "store"), hostile.seen
        found, failed = score_likelihood(again, 0, table)
    assert not failed
    assert found.equals(whole)
    assert 0 < hostile.seen - asked < 2 * len(rows)  # what was committed is not asked again
