"""How far a step is: rates of the last minute, lines in logs, a bar on a terminal."""

import contextlib
import json
import os
import pty
import re
import sys
import threading

import pytest

from siftline.cli import main
from siftline.progress import Count, Progress, clock


def test_the_line_tells_rows_rates_and_time_left():
    now = [100.0]
    count = Count("likelihood", 500, "rows", lambda: now[0])
    assert count.line() == "likelihood 0/500 rows (0.0 %) 0 rows/s, unknown left"
    now[0] += 10
    count.add(400, 91_200)
    assert count.line() == "likelihood 400/500 rows (80.0 %) 40 rows/s, 9,120 tokens/s, 0:03 left"
    now[0] += 30
    assert count.line() == "likelihood 400/500 rows (80.0 %) 10 rows/s, 2,280 tokens/s, 0:10 left"
    assert count.summary() == "likelihood 400 rows in 0:40, 91,200 tokens, 2,280 a second"


def test_rates_forget_what_was_found_at_the_start():
    now = [0.0]
    count = Count("likelihood", 100_000, "rows", lambda: now[0])
    count.add(90_000, 0)  # found in the store at once
    for _ in range(180):
        now[0] += 1
        count.add(10, 500)
    rate, tokens = count.rates()
    assert rate == pytest.approx(10, rel=0.05)
    assert tokens == pytest.approx(500, rel=0.05)
    assert count.line().endswith("13:40 left")


def test_without_a_total_there_is_no_time_left():
    count = Count("read", 0, "rows", lambda: 1.0)
    count.add(3, 0)
    assert count.line().startswith("read 3 rows ")
    assert "left" not in count.line()


def test_lines_come_at_the_end_and_only_where_something_was_done():
    said = []
    Progress("a", 5, said.append).close()
    assert said == []
    progress = Progress("b", 0, said.append, "steps")
    progress.advance(2)
    progress.reach(7, 10)
    progress.close()
    assert (progress.count.done, progress.count.total) == (7, 10)
    assert said == ["b 7 steps in 0:00"]


def test_seconds_as_a_clock():
    assert [clock(s) for s in (0, 59.6, 61, 3600, 36_061)] == [
        "0:00", "1:00", "1:01", "1:00:00", "10:01:01",
    ]  # fmt: skip


@contextlib.contextmanager
def terminal(monkeypatch):
    """Makes stderr a terminal of 160 columns; yields a list that is filled at the end."""
    master, slave = pty.openpty()
    seen, text = [], []

    def read():
        with contextlib.suppress(OSError):  # how a terminal says that the other end is closed
            while chunk := os.read(master, 65536):
                seen.append(chunk)

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream, monkeypatch.context() as patch:
        patch.setenv("TERM", "xterm")
        patch.setenv("COLUMNS", "160")
        patch.setattr(sys, "stderr", stream)
        yield text
    reader.join()
    os.close(master)
    text.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", b"".join(seen).decode()))


def test_on_a_terminal_a_bar_shows_rows_rates_and_time_left(
    tiny_model, tmp_path, monkeypatch, capsys
):
    path = tmp_path / "a.jsonl"
    rows = ({"prompt": f"What is {i}?", "completion": f"{i}" * (i % 9 + 1)} for i in range(200))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["score", path, "--model", tiny_model, "--out", tmp_path / "out", "--json"]
    with terminal(monkeypatch) as shown, pytest.raises(SystemExit) as ended:
        main([*map(str, arguments), "--batch-tokens", "300", "--device", "cpu"])
    out, err = capsys.readouterr()
    assert (ended.value.code, err) == (0, "")
    assert json.loads(out)["scored"] == 200, "data on stdout, nothing else"
    (text,) = shown
    assert "━" in text
    assert re.search(
        r"likelihood.*/400 forward rows \(\d.*forward rows/s, .*tokens/s, .*left", text
    )
    assert re.search(r"likelihood 400 forward rows in \d:\d\d, [\d,]+ tokens", text)
