"""Lanes of `chaos.py`: roots that are disturbed again and again, and what has to hold."""

import contextlib
import importlib.util
import json
import logging
import os
import random
import re
import shutil
import subprocess
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

HERE = Path(__file__).parent
SHARES = {
    "chain": {"kill": 0.5, "full disk": 0.1, "file limit": 0.1, "damage": 0.3},
    "server": {"kill": 0.5, "damage": 0.2, "server killed": 0.3},
    "tree": {"kill": 0.6, "full disk": 0.1, "file limit": 0.1, "damage": 0.2},
    "vllm": {"kill": 0.75, "damage": 0.25},
}
ACTS = {
    "kill": "kill",
    "full disk": "fill",
    "file limit": "limit",
    "server killed": "server",
}
SCORED = {
    "stages": ["duplicates", "likelihood", {"select": {"method": "random"}}],
    "budget": {"unit": "rows", "size": 40, "on_shortfall": "smaller"},
}
"""The part of the recipe that the vllm lane runs: its worker takes 15 s to start."""
FEW_EVENTS = 600
DAMAGED = ("pool", "scores", "store", "stages", "curated", "models", "evaluations", "reports")


def module(name):
    """A module of this folder or of one below it."""
    known = f"siftline_tests_{name}"
    if known not in sys.modules:
        (file,) = HERE.rglob(f"{name}.py")
        spec = importlib.util.spec_from_file_location(known, file)
        sys.modules[known] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[known])
    return sys.modules[known]


class Broken(AssertionError):
    """Something that has to hold did not."""


def must(holds, *said):
    if not holds:
        raise Broken(" ".join(map(str, said)))


@dataclass
class Calm:
    """An undisturbed run: bytes, number of events, rows that models were asked, largest batch."""

    bytes: dict
    events: int
    asked: int
    batch: int


@dataclass
class Figures:
    """What a lane counts."""

    moments: Counter = field(default_factory=Counter)
    damage: Counter = field(default_factory=Counter)
    ends: Counter = field(default_factory=Counter)
    runs: int = 0
    compared: int = 0
    needed: int = 0
    asked: int = 0
    allowed: int = 0
    seconds: float = 0.0
    processor: float = 0.0


@dataclass
class Ended:
    """How a run ended: finished, error (with its line) or killed."""

    how: str
    said: str = ""
    events: int = 0


# ---- runs ------------------------------------------------------------------------------------


def counting_engines(log):
    """Notes each row that an engine is asked for, before it is asked."""
    from siftline.scoring.engines.server_engine import ServerEngine
    from siftline.scoring.engines.transformers_engine import TransformersEngine
    from siftline.scoring.engines.vllm_engine import VllmEngine

    out = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def counted(original):
        def asked(self, rows, *rest, **named):
            os.write(out, f"{len(rows):6}\n".encode())
            return original(self, rows, *rest, **named)

        return asked

    for engine in (TransformersEngine, VllmEngine, ServerEngine):
        for name in ("score", "inspect", "choices", "generate", "embed"):
            if name in vars(engine):
                setattr(engine, name, counted(getattr(engine, name)))


class Lane:
    """One root, disturbed again and again."""

    changed, sections = (), None
    anew = 0.2
    """Share of the ends after which a lane begins from nothing."""

    def __init__(self, name, work, seed, inputs, aged=False, done=False):
        self.name, self.work, self.inputs, self.aged = name, work, inputs, aged
        self.dice = random.Random(f"{seed}-{name}")
        self.root, self.log = work / "root", work / "asked"
        self.older, self.calm, self.done = None, None, done
        self.figures, self.owed = Figures(), 0
        work.mkdir(parents=True, exist_ok=True)

    # -- one run

    def recipe(self):
        from siftline.config import read_yaml
        from siftline.recipe.parse import find, parse, recipe_files

        if self.sections is None:
            return find("mini", self.changed)
        body = {**read_yaml(recipe_files()["mini"].read_text(encoding="utf-8")), **self.sections}
        return parse(body, self.changed)

    def work_in_child(self, plan):
        from siftline.disk import explained

        os.setsid()
        logging.disable(logging.WARNING)
        hook = module("chaos_hook")
        counting_engines(self.log)
        hook.inside(hook.arm(plan))
        try:
            module("conftest").run_chain(self.root, self.recipe())
        except Exception as found:
            error = explained(found) or found  # as the command line does
            told = isinstance(error, ValueError | OSError)
            said = " ".join(str(error).split()) if told else traceback.format_exc()
            os.write(self.says, said.encode()[:60_000])
            os._exit(1)
        if plan["at"] < 0:  # a disturbed one may not be able to write
            (self.work / "modules").write_text("\n".join(sys.modules))
        os._exit(0)

    def run(self, act="kill", at=-1, keep=0):
        """Runs to the end, or to the `at`-th event and what happens then."""
        count = self.work / "count"
        count.unlink(missing_ok=True)
        plan = {"root": str(self.root), "at": at, "act": act, "keep": keep, "count": str(count)}
        self.figures.runs += 1
        ended = self.started(plan)
        self.learn()
        ended.events = count.stat().st_size if count.exists() else 0
        (self.root / ".filler").unlink(missing_ok=True)
        return ended

    def started(self, plan):
        hear, self.says = os.pipe()
        child = os.fork()
        if not child:
            os.close(hear)
            try:
                self.work_in_child(plan)
            finally:
                os._exit(2)
        os.close(self.says)
        with os.fdopen(hear, "rb") as pipe:
            said = pipe.read().decode()  # its end is that of every process that holds it
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        return Ended({0: "finished", 1: "error", -9: "killed"}.get(code, f"code {code}"), said)

    def learn(self):
        """Loads what an undisturbed run has loaded, so that the next child need not."""
        told = self.work / "modules"
        if not told.exists():
            return
        for name in told.read_text().splitlines():
            if name not in sys.modules and not name.startswith(("__", "siftline_tests_")):
                with contextlib.suppress(Exception):
                    importlib.import_module(name)
        told.unlink()

    # -- states of the root

    def fresh(self):
        for path in list(self.root.iterdir()) if self.root.exists() else ():
            remove(path)
        self.root.mkdir(exist_ok=True)
        for name in ("inputs", "models"):
            if (self.inputs / name).exists():
                shutil.copytree(self.inputs / name, self.root / name)
        if self.done:  # without every fourth part of what models said
            shutil.copytree(self.inputs / "store", self.root / "store")
            for path in sorted(self.root.glob("store/*/parts/*"))[::4]:
                path.unlink()

    def strip(self):
        """Takes away what a run has to make again."""
        if self.dice.random() < self.anew:
            self.fresh()
            if self.dice.random() < 0.2:
                remove(self.root / "models")
            self.figures.needed += self.calm.asked
            return
        self.loosen()

    def loosen(self):
        """Takes away what is made again without a model."""
        for name in ("stages", "curated", "scores", "pool"):
            if self.dice.random() < 0.6 and (self.root / name).exists():
                remove(self.root / name)

    def undisturbed(self):
        """Bytes and counts of a run that nothing disturbs."""
        if self.done:  # `inputs` is a finished root
            bytes_ = module("conftest").tree_bytes(self.inputs / "curated")
            self.calm = Calm(bytes_, FEW_EVENTS, 0, 0)
            return
        self.fresh()
        self.log.unlink(missing_ok=True)
        ended = self.run()
        must(ended.how == "finished", "the undisturbed run:", ended)
        asked = self.asked()
        self.log.unlink(missing_ok=True)
        self.figures.runs = 0
        self.calm = Calm(self.bytes(), ended.events, sum(asked), max(asked, default=0))

    def bytes(self):
        return module("conftest").tree_bytes(self.root / "curated")

    def asked(self):
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    # -- moments

    def disturb(self, moments):
        """Lives through so many moments and then to the end."""
        begun = time.monotonic()
        module("chaos_hook").adopt()
        self.undisturbed()
        if self.aged:
            self.age()
        self.fresh()
        self.figures.needed = self.calm.asked
        shares = SHARES[self.name]
        while (done := self.figures.moments.total() + self.owed) < moments:
            (kind,) = self.dice.choices(list(shares), list(shares.values()))
            if kind == "damage":
                # To the end of a run once more is long: most are met at an end.
                if self.dice.random() < 0.9:
                    self.owed += 1
                else:
                    self.figures.moments[kind] += self.damage()
                continue
            # Near the start of what is left to do, so that a lane gets through it a few times.
            reach = (
                max(30, 6 * self.calm.events // moments)
                if self.dice.random() < 0.8
                else (self.calm.events)
            )
            keep = self.dice.choice((0, 100, 4096, 20_000, 60_000))
            ended = self.run(ACTS[kind], self.dice.randint(1, reach), keep)
            if ended.how == "finished":
                # It came after the end, or harmed nothing: a full disk that was large enough.
                self.ended()
                continue
            self.check(kind, ended)
            self.figures.moments[kind] += 1
            self.figures.ends[ended.how] += 1
            self.figures.allowed += self.calm.batch
            show(f"{self.name} {done + 1}: {kind} at {ended.events}: {ended.how} {ended.said}")
        self.finish()
        self.ended(last=True)
        self.figures.asked = sum(self.asked())
        repeated = self.figures.asked - self.figures.needed
        must(self.done or repeated <= self.figures.allowed, "asked again:", repeated, self.figures)
        self.figures.seconds = time.monotonic() - begun
        self.figures.processor = module("chaos_hook").spent()

    def check(self, kind, ended):
        """The disturbance ended the run as it may."""
        if kind == "kill":
            must(ended.how == "killed", kind, ended)
            return
        must(ended.how == "error" and "\n" not in ended.said, kind, ended)
        if kind == "server killed":
            must(re.search(r"no connection to .* for .* s", ended.said), ended)
            return
        must(REFUSED.search(ended.said) and str(self.root) in ended.said, kind, ended)

    def ended(self, last=False):
        """A run came to its end."""
        self.compare()
        while self.owed:
            self.loosen()
            met = self.damage()
            self.owed -= met
            self.figures.moments["damage"] += met
        if not last:
            self.strip()

    def compare(self):
        """The bytes are those of the undisturbed run."""
        must(self.bytes() == self.calm.bytes, self.name, "ended in other bytes")
        self.figures.compared += 1

    def finish(self):
        """Runs to the end, doing what errors say."""
        for _ in range(20):
            ended = self.run()
            if ended.how == "finished":
                return
            must(ended.how == "error", ended)
            remedy(self.root, ended.said)
        raise Broken(f"no end: {ended}")

    def age(self):
        """Keeps a root of fewer rows, whose files stand in for older copies."""
        self.fresh()
        path = self.root / "inputs" / "mini" / "pool.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        path.write_text("".join(lines[: len(lines) * 3 // 4]), encoding="utf-8")
        must(self.run().how == "finished", "the older root")
        self.older = self.work / "older"
        shutil.copytree(self.root, self.older, symlinks=True)
        self.log.unlink(missing_ok=True)

    def damage(self):
        """Damages a file; the next run ends in the same bytes, or names it and the remedy."""
        groups = [found for name in DAMAGED if (found := damageable(self.root / name))]
        if not groups:
            return False
        group = self.dice.choice(groups)
        path = self.dice.choice(group)
        others = [f for f in group if f != path and f.suffix == path.suffix]
        old = [f for f in self.older.rglob(f"*{path.suffix}")
               if f.parent.name == path.parent.name] if self.older else []  # fmt: skip
        damages = module("test_verified").DAMAGE
        name = self.dice.choice(sorted(damages))
        if (name == "swap" and not others) or (name == "older copy" and not old):
            return False
        records = held_by(path)
        before = path.read_bytes()
        damages[name](path, self.dice.choice(others or [path]), self.dice.choice(old or [path]))
        damaged = path.read_bytes() if path.exists() else None
        if damaged == before:
            return False
        self.figures.damage[name] += 1
        within = path.relative_to(self.root)
        if within.parts[0] == "store":
            self.figures.allowed += records
        said = []
        for _ in range(6):
            ended = self.run()
            said.append(ended.said)
            if ended.how == "finished":
                break
            must(ended.how == "error" and "\n" not in ended.said, name, within, ended)
            must(path.name in ended.said or path.parent.name in ended.said, name, within, ended)
            remedy(self.root, ended.said)
        must(ended.how == "finished", name, within, said)
        if damaged is not None and path.exists() and path.read_bytes() == damaged:
            path.write_bytes(before)  # nothing read it: it would come to light in a later moment
        self.figures.ends["named and mended" if said[0] else "made again or never read"] += 1
        show(f"{self.name}: {name} of {within}: {said[0] or 'equal bytes'}")
        self.compare()
        return True


class ServerLane(Lane):
    """The model is at a server that fails now and then, is killed, and comes back."""

    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.port, self.process = None, None

    def serve(self):
        command = [sys.executable, str(HERE / "chaos.py"), "--serve", str(self.port or 0)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self.port = int(self.process.stdout.readline())
        (self.work / "server.pid").write_text(str(self.process.pid))
        where = f"{{url: 'http://127.0.0.1:{self.port}/v1', patience_s: 0.3, concurrency: 4}}"
        self.changed = ("models.tiny.engine=server", f"models.tiny.server={where}",
                        "models.tiny.batch_tokens=4096")  # fmt: skip

    def run(self, *arguments, **named):
        if self.process is None or self.process.poll() is not None:
            self.serve()
        return super().run(*arguments, **named)

    def started(self, plan):
        ended = super().started(plan)
        if plan["act"] == "server" and self.process.poll() is None and ended.how != "finished":
            time.sleep(0.2)  # it was killed a moment ago
            must(self.process.poll() is not None, "the server lives", ended)
        return ended

    def disturb(self, moments):
        try:
            super().disturb(moments)
        finally:
            if self.process is not None:
                self.process.kill()


class VllmLane(Lane):
    """The pool is scored in a vLLM worker."""

    changed = ("models.tiny.engine=vllm", "models.tiny.batch_tokens=2048")
    sections = SCORED


class TreeLane(Lane):
    """`siftline run`, with all its processes, forked from one that has loaded what they need."""

    def started(self, plan):
        hooked = self.work / "hooked"
        hooked.mkdir(exist_ok=True)
        shutil.copy(HERE / "chaos_hook.py", hooked / "sitecustomize.py")
        said = self.work / "said"
        run = os.fork()
        if not run:
            code = 2
            try:
                code = self.command(plan, hooked, said)
            finally:
                os._exit(code)
        end = time.monotonic() + 600
        while not (status := os.waitpid(run, os.WNOHANG))[0]:
            must(time.monotonic() < end, "a run does not end")
            time.sleep(0.05)
        must(module("chaos_hook").orphans_ended(), "left behind by", plan)
        code = os.waitstatus_to_exitcode(status[1])
        lines = said.read_text().splitlines()
        if code == 1:
            told = [line for line in lines if line.startswith("error: ")]
            return Ended("error", "\n".join(told) if told else "\n".join(lines[-30:]))
        return Ended({0: "finished", -9: "killed"}.get(code, f"code {code}"))

    def command(self, plan, hooked, said):
        """What `siftline run` does, in this process; returns its exit status."""
        import siftline.cli
        from siftline.pipelines.executor import prepare_environment

        os.setsid()
        out = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(out, 1)
        os.dup2(out, 2)
        # Processes that are started, not forked, count too.
        changes = {"SIFTLINE_TEST_CHAOS": json.dumps(plan)}
        os.environ.update(module("conftest").mini_environment(hooked, **changes))
        prepare_environment()
        sys.modules["__main__"] = siftline.cli  # as `python -m siftline.cli` has it
        hook = module("chaos_hook")
        hook.inside(hook.arm(plan))
        hook.fork_steps()
        code = 0
        try:
            siftline.cli.main(["run", "mini", "--root", str(self.root)])
        except SystemExit as ended:
            code = ended.code or 0
        except BaseException:
            traceback.print_exc()
            code = 1
        if not code and plan["at"] < 0:
            (self.work / "modules").write_text("\n".join(sys.modules))
        sys.stdout.flush()
        sys.stderr.flush()
        return code

    def strip(self):
        super().strip()
        for name in ("models", "evaluations", "reports"):
            for path in (self.root / name).glob("mini-*" if name == "models" else "*"):
                if self.dice.random() < 0.5:
                    remove(path)


REFUSED = re.compile(
    r"No space left for .*free some|has .* free and .* needs at least|"
    r"is larger than files may be here: raise the limit|fails to read or write|"
    r"no space left for .*: free some and run again"
)
CLASSES = {"chain": Lane, "server": ServerLane, "tree": TreeLane, "vllm": VllmLane}


def remove(path):
    """Whatever lies there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def damageable(folder):
    """Files of a folder that hold something; pictures and cards of models are for people."""
    return [
        path for path in sorted(folder.rglob("*"))
        if path.is_file() and not path.is_symlink() and path.stat().st_size
        and not path.name.startswith(".") and path.suffix not in (".png", ".html")
    ]  # fmt: skip


def held_by(path):
    """Records of a part or journal of the store."""
    import pyarrow.parquet as pq

    from siftline.store.namespace import read_journal

    try:
        if path.suffix == ".journal":
            return sum(table.num_rows for table in read_journal(path))
        return pq.read_metadata(path).num_rows if path.suffix == ".parquet" else 0
    except Exception:
        return 0


def remedy(root, said):
    """Does what an error says.

    Raises:
        Broken: if it says nothing that can be done.
    """
    named = re.search(rf"({re.escape(str(root))}[^\s:,]*)", said)
    must(named, "no file is named:", said)
    path = Path(named[1].rstrip(".,'"))
    cut = re.search(r"truncate -s (\d+)", said)
    if cut:
        os.truncate(path, int(cut[1]))
    elif "move the folder away" in said:
        while path.parent.parent.name != "curated":
            path = path.parent
        path.rename(root.parent / f"away-{time.time_ns()}")
        latest = path.parent / "latest"
        must(not latest.exists(), "latest leads to what was moved away")
    elif "remove the folder" in said:
        while path.parent.name != "models":
            path = path.parent
        remove(path)
    elif "delete both" in said:
        for other in path.parent.glob(f"{path.name.partition('-')[0]}-*"):
            remove(other)
    elif re.search(r"delete (it|the part)|move it away", said):
        remove(path)
    else:
        must("run again" in said, "no remedy:", said)


def show(line):
    print(time.strftime("%H:%M:%S"), line[:400], flush=True)
