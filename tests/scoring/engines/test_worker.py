"""The pipe and the worker process, with a backend that needs no model."""

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from siftline.scoring.engines.worker import one_line
from siftline.scoring.engines.worker_process import (
    HEADER,
    Frame,
    WorkerProcess,
    decode,
    encode,
    list_column,
    read_frame,
)

SCRIPT = """
import os, signal, subprocess, sys, time
from siftline.scoring.engines import worker
from siftline.scoring.engines.worker_process import Frame

class Backend:
    def facts(self):
        return {"pid": os.getpid()}

    def handle(self, request):
        if request.kind == "print":
            print("printed by Python")
            os.write(1, b"written to descriptor 1\\n")
            subprocess.run(["echo", "echoed by a child"], check=True)
        elif request.kind == "refuse":
            raise ValueError("token 9 is unknown:\\n  take another")
        elif request.kind == "fail":
            raise IndexError("out of range\\nin self")
        elif request.kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        elif request.kind == "hold":  # a grandchild that has the pipe, as a fork would
            for descriptor in range(3, 20):
                try:
                    os.set_inheritable(descriptor, True)
                except OSError:
                    pass
            holder = subprocess.Popen(["sleep", "60"], close_fds=False)
            print("HOLDER", holder.pid, file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        elif request.kind == "exit":
            os._exit(3)
        elif request.kind == "sleep":
            time.sleep(60)
        return Frame(request.kind, request.facts, request.columns)

def open_backend(facts):
    if facts.get("broken"):
        raise ValueError("no model here: give another")
    return Backend()

if __name__ == "__main__":
    os._exit(worker.main(open_backend=open_backend))
"""

rows = st.lists(
    st.lists(st.integers(-(2**31), 2**31 - 1), max_size=6).map(lambda r: np.array(r, np.int32)),
    max_size=6,
)
facts = st.dictionaries(st.text(max_size=5), st.integers() | st.text(max_size=8) | st.booleans())


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    script = tmp_path / "fake_worker.py"
    script.write_text(SCRIPT)
    return [sys.executable, str(script)]


def started(command: list[str]) -> WorkerProcess:
    worker = WorkerProcess(command)
    assert worker.call(Frame("open")).facts["pid"] == worker.process.pid
    return worker


@pytest.fixture
def worker(command: list[str]):
    worker = started(command)
    yield worker
    worker.close()


def alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return False
    return state != "Z"


def gone_within(pid: int, seconds: float) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def feed(data: bytes, step: int):
    """A `read` that hands out at most `step` bytes a time, as a pipe may."""
    position = 0

    def read(size: int) -> bytes:
        nonlocal position
        part = data[position : position + min(size, step)]
        position += len(part)
        return part

    return read


@given(st.text(max_size=8), facts, rows, st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_frames_survive_any_chunking(kind, given_facts, given_rows, step):
    text = pa.array([str(len(row)) for row in given_rows], pa.string())
    columns = {"tokens": list_column(given_rows, pa.int32()), "text": text}
    frame = Frame(kind, given_facts, columns)
    read = feed(encode(frame) * 2, step)
    for _ in range(2):
        back = read_frame(read)
        assert back is not None
        assert (back.kind, back.facts) == (kind, given_facts)
        assert back.lists("tokens") == [row.tolist() for row in given_rows]
        assert back.columns["text"].equals(text)
    assert read_frame(read) is None


@given(rows, st.data())
@settings(max_examples=40, deadline=None)
def test_a_frame_cut_anywhere_is_no_frame(given_rows, data):
    whole = encode(Frame("score", {}, {"tokens": list_column(given_rows, pa.int32())}))
    cut = data.draw(st.integers(1, len(whole) - 1))
    with pytest.raises(EOFError, match="pipe ended"):
        read_frame(feed(whole[:cut], 64))


def test_bytes_that_are_no_frame_are_named():
    with pytest.raises(ValueError, match="where a frame should start"):
        read_frame(feed(b"INFO: loading weights\n", 64))
    with pytest.raises(ValueError, match="no Arrow stream"):
        read_frame(feed(HEADER.pack(b"SIFT", 5) + b"hello", 64))
    sink = pa.BufferOutputStream()
    batch = pa.record_batch({"a": [1]})
    with pa.ipc.new_stream(sink, batch.schema) as writer:
        writer.write_batch(batch)
    with pytest.raises(ValueError, match="lacks its kind"):
        decode(sink.getvalue().to_pybytes())
    with pytest.raises(ValueError, match="length"):
        encode(Frame("score", {}, {"a": pa.array([1]), "b": pa.array([1, 2])}))


def test_a_frame_larger_than_the_pipe_comes_back(worker):
    sent = [np.arange(200_000, dtype=np.int32), np.zeros(0, np.int32), np.array([7], np.int32)]
    reply = worker.call(Frame("echo", {"n": 3}, {"tokens": list_column(sent, pa.int32())}))
    assert reply.facts == {"n": 3}
    assert reply.lists("tokens") == [row.tolist() for row in sent]


def test_prints_inside_go_to_stderr(capfd, command):
    worker = started(command)  # not by a fixture: capfd changes descriptor 2 before the test
    assert worker.call(Frame("print", {"a": 1})).facts == {"a": 1}
    assert worker.call(Frame("echo", {"b": 2})).facts == {"b": 2}
    worker.close()
    printed = capfd.readouterr()
    assert printed.out == ""
    for line in ("printed by Python", "written to descriptor 1", "echoed by a child"):
        assert line in printed.err


def test_a_refused_call_leaves_the_worker_usable(capfd, command):
    worker = started(command)
    with pytest.raises(ValueError, match=r"^token 9 is unknown: take another$"):
        worker.call(Frame("refuse"))
    assert "Traceback" in capfd.readouterr().err
    assert worker.call(Frame("echo", {"n": 1})).facts == {"n": 1}
    worker.close()


def test_a_failed_call_ends_the_worker_with_one_line(worker):
    with pytest.raises(RuntimeError) as failure:
        worker.call(Frame("fail"))
    message = str(failure.value)
    assert message == "the vllm worker failed in 'fail': IndexError: out of range in self"
    assert not alive(worker.process.pid)
    with pytest.raises(ValueError, match="closed: open a new engine"):
        worker.call(Frame("echo"))


@pytest.mark.parametrize("kind", ["kill", "hold"])
def test_a_killed_worker_is_one_clear_line_and_no_hang(capfd, command, kind):
    worker = started(command)
    begin = time.monotonic()
    with pytest.raises(
        RuntimeError, match=rf"killed by SIGKILL during '{kind}'.*memory"
    ) as failure:
        worker.call(Frame(kind))
    assert "\n" not in str(failure.value)
    assert time.monotonic() - begin < 20
    lines = capfd.readouterr().err.splitlines()
    holders = [int(line.split()[1]) for line in lines if line.startswith("HOLDER")]
    assert len(holders) == (kind == "hold")
    for holder in holders:
        os.kill(holder, signal.SIGKILL)


def test_a_worker_killed_between_calls_and_one_that_exits(command):
    worker = started(command)
    worker.process.kill()
    worker.process.wait()
    with pytest.raises(RuntimeError, match="killed by SIGKILL during 'echo'"):
        worker.call(Frame("echo"))
    worker = started(command)
    with pytest.raises(RuntimeError, match="ended with code 3 during 'exit'"):
        worker.call(Frame("exit"))


def test_closing_ends_the_worker_idle_or_busy(command):
    worker = started(command)
    worker.close()
    worker.close()
    assert worker.process.returncode == 0

    worker = started(command)
    errors: list[Exception] = []

    def call() -> None:
        try:
            worker.call(Frame("sleep"))
        except RuntimeError as error:
            errors.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    time.sleep(0.5)
    worker.close(wait=0.1)
    thread.join(20)
    assert not thread.is_alive()
    assert "was closed during 'sleep'" in str(errors[0])
    assert not alive(worker.process.pid)


def test_start_up_failures_are_one_line(command, tmp_path):
    worker = WorkerProcess(command)
    with pytest.raises(ValueError, match=r"^no model here: give another$"):
        worker.call(Frame("open", {"broken": True}))
    assert worker.process.returncode == 1
    with pytest.raises(ValueError, match="can't start the vllm worker with '/no/python'"):
        WorkerProcess(["/no/python"])
    silent = WorkerProcess([sys.executable, "-c", "import no_such_library"])
    with pytest.raises(RuntimeError, match=r"ended with code 1 during 'open'; .* needs siftline"):
        silent.call(Frame("open"))


def test_messages_go_to_the_log_file_if_one_is_named(command, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("SIFTLINE_WORKER_LOG", str(tmp_path / "worker.log"))
    worker = started(command)
    worker.call(Frame("print"))
    worker.close()
    assert "written to descriptor 1" in (tmp_path / "worker.log").read_text()
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("opener", ["main", "thread", "fork"])
def test_a_killed_parent_leaves_no_worker_even_in_mid_call(command, tmp_path, opener):
    """Busy in a call; opened by a thread that has ended; with a fork that holds the pipe open."""
    parent = tmp_path / "parent.py"
    parent.write_text(
        textwrap.dedent(
            f"""
            import os, sys, threading, time
            from siftline.scoring.engines.worker_process import Frame
            from siftline.scoring.engines.worker_process import WorkerProcess
            found = []
            def start():
                found.append(WorkerProcess({command!r}))
            if {opener!r} == "thread":
                thread = threading.Thread(target=start)
                thread.start()
                thread.join()
                time.sleep(1)  # the kernel would kill the worker now, were it armed
            else:
                start()
            worker = found[0]
            worker.call(Frame("open"))
            if {opener!r} == "fork" and os.fork() == 0:
                time.sleep(30)
                os._exit(0)
            print(worker.process.pid, flush=True)
            worker.call(Frame("sleep"))
            """
        )
    )
    process = subprocess.Popen([sys.executable, str(parent)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    time.sleep(0.3)
    assert alive(pid)
    process.kill()
    process.wait()
    assert gone_within(pid, 10)


def test_one_line_is_one_line():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 5000))) == 600
