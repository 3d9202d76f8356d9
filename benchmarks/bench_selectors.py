"""Selection methods beside what one would call instead: seconds, peak memory, and agreement.

    OMP_WAIT_POLICY=PASSIVE .venv/bin/python benchmarks/bench_selectors.py [--rows 10000,100000]
        [--targets 1000] [--only kmeans,rds] [--limit 900] [--json FILE]

Rows are unit vectors of 384 dimensions at float16 around 300 centres, made by a seed, with numbers
and with texts of 40 words around as many topics; target rows, --targets of them, are near three of
the centres. A tenth of the rows is selected, 10,000 at most. In groups, each with the same work:

    kmeans     siftline's k-means (25 iterations at most, all rows), scikit-learn's KMeans (25, one
               start) and MiniBatchKMeans (its defaults), k = round(sqrt(rows / 2)); the sum of
               squared distances is given beside the time
    transport  GOT-D (epsilon 0.02 of the mean cost, tolerance 0.01, no momentum) and Sinkhorn on
               the whole matrix in float64; rank correlation of the gradients
    rds        RDS+ and its definition on the matrix of all pairs; share of rows chosen by both
    facility   facility location (all rows covered up to 10,000) and plain greedy on the whole
               matrix, 100 rows chosen; the value reached on the covered rows (up to 10,000 rows)
    others     every other method of the registry, alone. Gradient features of less are as wide as
               the embeddings here; its own are 32,768 wide by default. What kmeans_quality_rounds
               does itself is timed (clusters, quotas, draws, weights of three rounds): no model is
               trained and none answers, the scores between its rounds are hashes of the ids

Each contender is a process of its own, one after the other. Seconds are those of the work without
making the rows; memory is the largest resident size, and how much of it came on top of the process
with its rows (what making them took for a moment counts too). A contender that takes longer than
--limit is ended, one that runs out of memory is told. The machine is shared: quote ratios of one
run, of processor time where neighbours were busy.
"""

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

WIDTH = 384
EPSILON = 0.02
GROUPS = {
    "kmeans": ("siftline kmeans", "sklearn KMeans", "sklearn MiniBatchKMeans"),
    "transport": ("siftline got_d", "dense Sinkhorn"),
    "rds": ("siftline rds_plus", "all pairs RDS"),
    "facility": ("siftline facility_location", "plain greedy"),
}
DENSE_VALUES = 500_000_000
"""Numbers of a matrix that a dense peer is given; above it is left out."""


def made(n: int, seed: int, centres: int, near: int | None = None) -> np.ndarray:
    """Unit rows around centres, float16; around the first few where `near` is given."""
    g = np.random.default_rng(0)
    middle = g.normal(size=(centres, WIDTH)).astype(np.float32)
    g = np.random.default_rng(seed)
    out = np.empty((n, WIDTH), dtype=np.float16)
    for start in range(0, n, 10_000):
        stop = min(start + 10_000, n)
        of = g.integers(0, near or centres, stop - start)
        x = middle[of] + 0.8 * g.standard_normal((stop - start, WIDTH), dtype=np.float32)
        out[start:stop] = x / np.linalg.norm(x, axis=1)[:, None]
    return out


def groups() -> dict[str, tuple[str, ...]]:
    """Contenders by group: every registered method is in one."""
    from siftline.selectors.registry import methods

    own = [f"siftline {entry.name}" for entry in methods()]
    peered = {name for group in GROUPS.values() for name in group}
    return {**GROUPS, "others": tuple(name for name in own if name not in peered)}


def words(n: int, seed: int, near: int | None = None) -> list[str]:
    """Texts of 40 words, half of them of one of 300 topics (of the first few with `near`)."""
    g = np.random.default_rng(seed)
    topics = g.integers(0, near or 300, n)
    common = np.minimum(g.zipf(1.3, (n, 20)), 5000)
    rare = 100 * topics[:, None] + g.integers(0, 100, (n, 20))
    return [
        " ".join([*(f"w{i}" for i in a), *(f"t{i}" for i in b)])
        for a, b in zip(common.tolist(), rare.tolist(), strict=True)
    ]


def frame(x: np.ndarray, prefix: str, texts: list[str] | None) -> Any:
    import polars as pl

    n = len(x)
    g = np.random.default_rng(1)
    column = pl.Series("embedding", x, dtype=pl.Array(pl.Float16, WIDTH))
    numbers = (
        "perplexity", "complexity", "quality", "reward", "understandability", "naturalness",
        "coherence",
    )  # fmt: skip
    columns = {
        "id": [f"{prefix}{i:030d}" for i in range(n)],
        "prompt_id": [f"{i // 2:020d}" for i in range(n)],
        "source": g.choice(["a", "b", "c"], n, p=[0.8, 0.15, 0.05]),
        "ifd_loss_ratio": 1.2 * g.random(n),
        "logprob_mean": -g.random(n),
        "n_tokens": g.integers(1, 400, n),
        **{name: g.random(n) for name in numbers},
        **({} if texts is None else {"text": texts}),
    }
    return pl.DataFrame(columns).with_columns(column)


def clusters(n: int) -> int:
    return round(float(np.sqrt(n / 2)))


def taught(number: int, ids: list[str]) -> Any:
    """Scores of rows after a round without a model: hashes of their ids, so the same every time."""
    import polars as pl

    from siftline.kernels.draws import uniforms

    u = uniforms(0, f"bench_selectors/{number}", ids)
    return pl.DataFrame({"id": ids, "difference": u - 0.5})


def run_siftline(name: str, n: int, targets: int) -> Callable[[], dict[str, Any]]:
    from siftline.selectors.method import select
    from siftline.selectors.registry import find
    from siftline.selectors.spending import Budget

    options = {
        "got_d": {"momentum": 1.0, "epsilon": EPSILON},
        "simcore": {"stop": False},
        "kmeans_quality": {"quality": "quality"},
        "kmeans_quality_rounds": {"quality": "quality"},
    }.get(name, {})
    entry = find(name)
    if n > entry.limit_at(WIDTH):
        raise ValueError(f"{name} takes {entry.limit_at(WIDTH):,} rows at most")
    reads = "text" in entry.needs
    pool = frame(made(n, 1, 300), "p", words(n, 1) if reads else None)
    target = None
    if entry.targeted:
        near = words(targets, 2, 3) if reads else None
        target = frame(made(targets, 2, 300, 3), "t", near)
    method = entry.method(**options)
    budget = Budget(100 if name == "facility_location" else min(n // 10, 10_000), "rows", "smaller")

    def work() -> dict[str, Any]:
        if "training" in entry.needs:
            found = method.apply(pool, method.refine([method.summarise(pool)], budget, taught))
        else:
            found = select(method, pool, budget, target)
        lines = found.decisions.sort("id")
        wanted = ("iterations", "converged", "list_length", "looked_at", "kept")
        facts = {key: found.facts[key] for key in wanted if key in found.facts}
        return {
            "kept": np.flatnonzero(lines["kept"].to_numpy()),
            "values": lines["value"].to_numpy().astype(np.float64),
            "facts": facts,
        }

    return work


def run_kmeans(kind: str, n: int) -> Callable[[], dict[str, Any]]:
    x = made(n, 1, 300)

    def work() -> dict[str, Any]:
        k = clusters(n)
        if kind == "siftline":
            from siftline.kernels.vectors.kmeans import kmeans

            found = kmeans(x, k, 0, [f"p{i:030d}" for i in range(n)])
            return {"inertia": float(found.distances.sum(dtype=np.float64))}
        from sklearn.cluster import KMeans, MiniBatchKMeans

        wide = x.astype(np.float32)
        if kind == "KMeans":
            model = KMeans(k, n_init=1, max_iter=25, random_state=0).fit(wide)
        else:
            model = MiniBatchKMeans(k, n_init=1, random_state=0).fit(wide)
        return {"inertia": float(model.inertia_)}

    return work


def run_dense_sinkhorn(n: int, targets: int) -> Callable[[], dict[str, Any]]:
    x, y = made(n, 1, 300), made(targets, 2, 300, 3)

    def soft(z: np.ndarray, axis: int) -> np.ndarray:
        top = z.max(axis=axis, keepdims=True)
        return (top + np.log(np.exp(z - top).mean(axis=axis, keepdims=True))).squeeze(axis)

    def work() -> dict[str, Any]:
        wide, y64 = x.astype(np.float64), y.astype(np.float64)
        cost = (wide**2).sum(1)[:, None] + (y64**2).sum(1) - 2 * wide @ y64.T
        epsilon = EPSILON * float(cost.mean())
        g, sweeps, error = np.zeros(len(y)), 0, np.inf
        while error > 0.01 and sweeps < 2000:
            f = -epsilon * soft((g - cost) / epsilon, 1)
            fresh = -epsilon * soft((f[:, None] - cost) / epsilon, 0)
            error = float(np.abs(np.expm1((g - fresh) / epsilon)).mean())
            g, sweeps = fresh, sweeps + 1
        f = -epsilon * soft((g - cost) / epsilon, 1)
        return {"values": f - (f.sum() - f) / (len(f) - 1), "facts": {"iterations": sweeps}}

    return work


def run_all_pairs(n: int, targets: int) -> Callable[[], dict[str, Any]]:
    x, y = made(n, 1, 300), made(targets, 2, 300, 3)

    def work() -> dict[str, Any]:
        wide, y32 = x.astype(np.float32), y.astype(np.float32)
        wide /= np.linalg.norm(wide, axis=1)[:, None]
        left = (y32 / np.linalg.norm(y32, axis=1)[:, None]) @ wide.T
        order: list[int] = []
        while len(order) < min(n // 10, 10_000):
            for query in range(len(left)):
                order.append(int(left[query].argmax()))
                left[:, order[-1]] = -np.inf
        return {"kept": np.sort(order[: min(n // 10, 10_000)])}

    return work


def run_greedy(n: int) -> Callable[[], dict[str, Any]]:
    x = made(n, 1, 300)

    def work() -> dict[str, Any]:
        wide = x.astype(np.float32)
        similar = np.maximum(wide @ wide.T, 0)
        covered, kept = np.zeros(n, np.float32), []
        for _ in range(100):
            gains = np.maximum(similar - covered, 0).sum(axis=1)
            kept.append(int(gains.argmax()))
            covered = np.maximum(covered, similar[kept[-1]])
        return {"kept": np.sort(kept)}

    return work


def prepared(name: str, n: int, targets: int) -> Callable[[], dict[str, Any]]:
    kind, _, what = name.partition(" ")
    if what == "kmeans" or kind == "sklearn":
        return run_kmeans("siftline" if what == "kmeans" else what, n)
    if name == "dense Sinkhorn":
        return run_dense_sinkhorn(n, targets)
    if name == "all pairs RDS":
        return run_all_pairs(n, targets)
    return run_greedy(n) if name == "plain greedy" else run_siftline(what, n, targets)


def one(name: str, n: int, targets: int, out: Path) -> None:
    """The work of one process."""
    work = prepared(name, n, targets)
    # What a first call imports and compiles is no part of the work.
    prepared(name, 600, 50)()
    before = resident()
    begun, used = time.perf_counter(), time.process_time()
    found = work()
    seconds, busy = time.perf_counter() - begun, time.process_time() - used
    arrays = {key: found.pop(key) for key in ("kept", "values") if key in found}
    np.savez(out.with_suffix(".npz"), **arrays)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    numbers = {"seconds": seconds, "processor_seconds": busy, "peak_mib": peak}
    out.write_text(json.dumps({**numbers, "added_mib": max(0.0, peak - before), **found}))


def resident() -> float:
    with Path("/proc/self/statm").open(encoding="utf-8") as stream:
        return int(stream.read().split()[1]) * os.sysconf("SC_PAGESIZE") / 2**20


def measured(name: str, n: int, targets: int, folder: Path, limit: float) -> dict[str, Any]:
    dense = {"dense Sinkhorn": targets, "all pairs RDS": targets, "plain greedy": n}
    if n * dense.get(name, 0) > DENSE_VALUES:
        return {"name": name, "left_out": f"a matrix of {n:,} x {dense[name]:,}"}
    out = folder / f"{name.replace(' ', '_')}.json"
    command = [sys.executable, __file__, "--one", name, "--rows", str(n), "--to", str(out)]
    command += ["--targets", str(targets)]
    try:
        done = subprocess.run(command, timeout=limit, check=False, capture_output=True, text=True)
    except subprocess.TimeoutExpired:
        return {"name": name, "left_out": f"longer than {limit:.0f} s"}
    if done.returncode:
        last = done.stderr.strip().splitlines()[-1:] or [f"status {done.returncode}"]
        return {"name": name, "left_out": last[0]}
    return {"name": name, **json.loads(out.read_text())}


def agreement(group: str, n: int, folder: Path) -> str:
    """How the results of a group's two contenders compare."""
    paths = [folder / f"{name.replace(' ', '_')}.npz" for name in GROUPS.get(group, ())]
    if group in ("kmeans", "others") or not all(path.exists() for path in paths):
        return ""
    first, second = (np.load(path) for path in paths)
    if group == "transport":
        from scipy.stats import spearmanr

        found = spearmanr(first["values"], second["values"]).statistic
        return f"rank correlation of the gradients {found:.6f}"
    if group == "rds":
        both = np.intersect1d(first["kept"], second["kept"])
        return f"{100 * len(both) / len(first['kept']):.2f} % of the rows chosen by both"
    x = made(n, 1, 300).astype(np.float32)
    values = [float(np.maximum(x @ x[f["kept"]].T, 0).max(axis=1).mean()) for f in (first, second)]
    return f"value {values[0]:.5f} against {values[1]:.5f}"


def report(line: dict[str, Any], first: dict[str, Any]) -> str:
    name = f"{line['name']:<28}"
    if "left_out" in line:
        return f"{name} left out: {line['left_out']}"
    more = "".join(f"  {k} {v}" for k, v in line.get("facts", {}).items())
    if "inertia" in line:
        more += f"  inertia {line['inertia']:.1f}"
    ratio = line["seconds"] / first["seconds"] if "seconds" in first else float("nan")
    return (
        f"{name}{line['seconds']:>9.2f}{ratio:>8.2f}{line['processor_seconds']:>9.2f}"
        f"{line['peak_mib']:>10,.0f}{line['added_mib']:>9,.0f}{more}"
    )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", default="10000,100000")
    parser.add_argument("--targets", type=int, default=1000)
    parser.add_argument("--only", default=",".join([*GROUPS, "others"]))
    parser.add_argument("--limit", type=float, default=900)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one")
    parser.add_argument("--to", type=Path)
    given = parser.parse_args()
    if given.one:
        one(given.one, int(given.rows), given.targets, given.to)
        return
    said: dict[str, Any] = {
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scikit-learn", "faiss-cpu", "scipy")},
        "load_before": os.getloadavg()[0],
        "targets": given.targets,
        "runs": [],
    }
    for n in map(int, given.rows.split(",")):
        print(f"\n{n:,} rows x {WIDTH}, {given.targets:,} target rows, k = {clusters(n)}")
        print(f"{'':<28}{'seconds':>9}{'ratio':>8}{'cpu s':>9}{'peak MiB':>10}{'added':>9}")
        for group in given.only.split(","):
            with tempfile.TemporaryDirectory() as scratch:
                folder, lines = Path(scratch), []
                for name in groups()[group]:
                    lines.append(measured(name, n, given.targets, folder, given.limit))
                    first = lines[-1] if group == "others" else lines[0]
                    print(report(lines[-1], first), flush=True)
                agrees = agreement(group, n, folder)
            if agrees:
                print(f"    {agrees}", flush=True)
            said["runs"].append({"rows": n, "group": group, "lines": lines, "agreement": agrees})
    text = json.dumps(said)
    print(text)
    if given.json:
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
