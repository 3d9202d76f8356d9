"""Random kills, full disks, damage and restarts over the whole chain, and equal bytes at the end.

    python tests/chaos.py --work DIR [--seed 0] [--lanes chain=140,server=30,tree=22,vllm=8]

A *moment* is one disturbance that took place. Its time is chosen by what a run does: the n-th
change to a file, half of a journal's frame or a block of a Parquet file, counted over all processes
of the run. A lane goes on from the state that a moment left, until a run ends; then `curated/` has
to have the bytes of an undisturbed run, and part of the root is taken away, or all of it.

Lanes: `chain` does what the assets do, all stages under the transformers engine, in a forked
process; `server` the same on an OpenAI-compatible server that fails, dies and comes back; `tree` is
`siftline run` with Dagster, training, evaluation and report, all its processes; `vllm` scores the
pool in a vLLM worker, gates by likelihood, selects and publishes.

What has to hold: a killed run leaves no process; a disk that is full or limited ends in one line
with file and remedy; damage ends in the same bytes or in one line that names the file and what to
do, which is then done; no run asks a model again for more than the batches that were interrupted
and the records that were damaged.
"""

import argparse
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import traceback
from collections import Counter
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))
from chaos_lanes import CLASSES, HERE, SHARES, module, must

LANES = {"chain": 140, "server": 30, "tree": 22, "vllm": 8}
MANY = 100
"""Moments of a chain from which it meets damage by older copies too, of a root of its own."""


# ---- the server ------------------------------------------------------------------------------


def serve(port):
    """Answers as `test_server_engine.Fake`, and fails each fifth row once."""
    fakes, tiny = module("test_server_engine"), module("tiny")

    class Failing(fakes.Fake):
        def post(self, handler, body):
            row = tuple(body["prompt"])
            with self.lock:
                if sum(row) % 5 == 0 and row not in self.plan:
                    faults = ("500", "503", "429", "half", "cut", "text", "reset")
                    self.plan[row] = [faults[sum(row) % len(faults)]]
            super().post(handler, body)

    fake = Failing(tiny.make_tokenizer(), port)
    fake.models = [{"id": "m", "owned_by": "fake", "max_model_len": 384}]
    print(fake.port, flush=True)
    signal.pause()


# ---- all of it -------------------------------------------------------------------------------


def mounted(folder):
    """A disk of its own for a lane's root, where this process may mount one."""
    folder.mkdir(parents=True)
    mount = ["mount", "-t", "tmpfs", "-o", "size=256m", "tmpfs", str(folder)]
    return not subprocess.run(mount, capture_output=True, check=False).returncode


def live(name, moments, work, seed, inputs, done):
    """One lane on a disk of its own; returns its figures."""
    own = mounted(work)
    if not own:
        SHARES[name].pop("full disk", None)
    try:
        aged = name == "chain" and moments >= MANY
        lane = CLASSES[name](name, work / "lane", seed, inputs, aged, done)
        lane.disturb(moments)
        return lane.figures
    finally:
        if own:
            subprocess.run(["umount", "-l", str(work)], check=False)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--work", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--lanes", default=",".join(f"{k}={n}" for k, n in LANES.items()))
    parser.add_argument("--inputs", type=Path, help="a root with inputs and models of mini")
    parser.add_argument("--done", action="store_true", help="that root is finished: no calm run")
    parser.add_argument("--serve", type=int)
    asked = parser.parse_args()
    if asked.serve is not None:
        serve(asked.serve)
        return
    work = asked.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    lanes = {k: int(n) for k, _, n in (one.partition("=") for one in asked.lanes.split(","))}
    os.environ.update(module("conftest").mini_environment())
    sys.path[:0] = [str(HERE / "recipes")]
    prepare()
    inputs = asked.inputs or made(work / "inputs")
    # Two side by side: the longest alone, the others one after the other.
    first = [n for n in lanes if n == "chain"]
    groups = [g for g in (first, [n for n in lanes if n not in first]) if g]
    said = [work / f"said-{k}" for k in range(len(groups))]
    children = []
    for group, out in zip(groups, said, strict=True):
        child = os.fork()
        if not child:
            code = 3
            try:
                found = {
                    n: vars(live(n, lanes[n], work / n, asked.seed, inputs, asked.done))
                    for n in group
                }
                out.write_text(json.dumps(found))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        children.append(child)
    codes = [os.waitpid(child, 0)[1] for child in children]
    if any(codes):
        raise SystemExit("chaos: something did not hold, see above")
    report({k: v for out in said for k, v in json.loads(out.read_text()).items()})


def prepare():
    """Loads what children use, once; one thread, because a fork loses the others."""
    import torch

    torch.set_num_threads(1)
    from siftline.pipelines.executor import PRELOADED

    more = (
        "siftline.cli", "siftline.definitions", "siftline.stages.publish", "sklearn.base",
        "siftline.scoring.engines.server_engine", "transformers.models.auto.tokenization_auto",
    )  # fmt: skip
    for name in (*PRELOADED, *more):
        importlib.import_module(name)


def made(root):
    """Inputs and base model of the mini recipe."""
    siftline = module("conftest").siftline
    done = siftline(
        "run", "mini", "--root", root, "--select", 'key:"inputs/mini" or key:"models/tiny"'
    )
    must(done.returncode == 0, done.stderr)
    return root


def report(figures):
    """Prints the figures of all lanes."""
    total = Counter()
    for name, one in figures.items():
        total.update(one["moments"])
        kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(one["moments"].items()))
        damage = ", ".join(f"{n} {kind}" for kind, n in sorted(one["damage"].items()))
        print(f"{name}: {sum(one['moments'].values())} moments ({kinds}) in {one['runs']} runs, "
              f"{one['compared']} compared: equal bytes; {one['seconds']:.0f} s, "
              f"{one['processor']:.0f} s of processor time")  # fmt: skip
        print(f"  ends: {one['ends']}; damage: {damage or 'none'}")
        print(f"  rows asked of models {one['asked']}, needed {one['needed']}, again "
              f"{one['asked'] - one['needed']} (allowed: {one['allowed']})")  # fmt: skip
    kinds = ", ".join(f"{n} {kind}" for kind, n in sorted(total.items()))
    print(f"chaos: {total.total()} moments, all held ({kinds})")


if __name__ == "__main__":
    main()
