"""Models of a recipe: which directory plays a role, and engines opened once per process.

Spreads buckets over devices: one recorder a device, each with a copy of the model.
"""

import queue
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Generic, TypeVar

from siftline import scoring as versions
from siftline.recipe.parse import Model, Recipe, expand
from siftline.rows.verified import content_hash, file_hash
from siftline.scoring.engines.base import EngineName, ModelSpec, open_engine
from siftline.scoring.fingerprint import confirm_files, directory_digest, model_digest
from siftline.scoring.recorder import Recorder, Tally
from siftline.workspace import Workspace


def trained_folder(workspace: Workspace, recipe: Recipe, name: str) -> Path:
    """Folder of a model trained here, named by what it is trained from.

    Raises:
        ValueError: if its corpus is not there.
    """
    model = recipe.models[name]
    assert model.pretrain is not None
    corpus = corpus_file(workspace, recipe, model)
    if not corpus.is_file():
        raise ValueError(f"models.{name}: no corpus at {corpus}: materialize the inputs first")
    key = content_hash([vars(model.pretrain), file_hash(corpus)])
    return workspace.model(f"{name}-{key[:12]}")


def corpus_file(workspace: Workspace, recipe: Recipe, model: Model) -> Path:
    """The text file that a model trained here learns from."""
    assert model.corpus is not None
    return Path(expand(model.corpus, workspace.inputs(recipe.name)))


def model_spec(workspace: Workspace, recipe: Recipe, role: str) -> ModelSpec:
    """How the model of a role is run, its path resolved; the engine is that of `role_engine`.

    Raises:
        ValueError: if the directory is not there.
    """
    spec = named_spec(workspace, recipe, recipe.roles.get(role, recipe.roles["target"]))
    engine = role_engine(recipe, role)
    return replace(spec, engine=engine, server=spec.server if engine == "server" else None)


def named_spec(workspace: Workspace, recipe: Recipe, name: str) -> ModelSpec:
    """How a model of the recipe is run, its path resolved.

    Raises:
        ValueError: if the directory is not there.
    """
    model = recipe.models[name]
    adapter = model.spec.adapter
    spec = replace(model.spec, adapter=expand(adapter) if adapter else None)
    if model.pretrain is None:
        return replace(spec, path=expand(spec.path))
    folder = trained_folder(workspace, recipe, name)
    if not (folder / "config.json").is_file():
        confirm_files(folder)  # it was trained, and lost the file
        raise ValueError(f"model {name!r} has not been trained: materialize models/{name} first")
    return replace(spec, path=str(folder))


def role_engine(recipe: Recipe, role: str) -> EngineName:
    """The engine a role runs on: its model's, but an embedder never on vLLM or a server.

    vLLM pools by mean, first or last token only; the position-weighted mean that `embed` promises
    comes from transformers on the same weights. Reports and stage facts name the engine that ran.
    """
    engine = recipe.model(role).spec.engine
    pools = engine in ("transformers", "sentence-transformers")
    return engine if role != "embedder" or pools else "transformers"


def identity(spec: ModelSpec) -> str:
    """Names a model for stage keys without loading it: files, dtype, engine, template, length.

    The engine counts with its version, but not with its library's: a new torch makes stored scores
    stale, and no table.
    """
    return content_hash(
        [
            model_digest(spec),
            directory_digest(Path(spec.adapter).expanduser()) if spec.adapter else None,
            spec.engine,
            versions.ENGINES[spec.engine],
            spec.dtype,
            spec.template,
            spec.max_length,
            spec.revision,
        ]
    )


class Engines:
    """Engines by specification, opened when first asked for."""

    def __init__(self) -> None:
        self._open: dict[tuple[ModelSpec, int, str], Any] = {}

    def get(self, spec: ModelSpec, copy: int = 0, head: str = "causal") -> Any:
        """The model of a specification.

        Args:
            spec: Of several devices it names, `copy` says which.
            copy: Number of the device.
            head: "causal", or "classifier" for sequence classification; a sentence-transformers
                model has its own.
        """
        spec = on_devices(spec)[copy]
        if (spec, copy, head) not in self._open:
            self._open[spec, copy, head] = _opened(spec, head)
        return self._open[spec, copy, head]

    def close(self) -> None:
        """Frees every model."""
        while self._open:
            _, engine = self._open.popitem()
            if hasattr(engine, "close"):
                engine.close()

    def recorder(
        self,
        spec: ModelSpec,
        store: Path,
        progress: Callable[[int, int], None] = lambda rows, tokens: None,
    ) -> Recorder:
        """A recorder on the first device of a specification."""
        return Recorder(self.get(spec), spec, store, progress)

    def recorders(
        self,
        spec: ModelSpec,
        store: Path,
        progress: Callable[[int, int], None] = lambda rows, tokens: None,
        head: str = "causal",
    ) -> list[Recorder]:
        """One recorder for each device of a specification, to spread buckets over."""
        return [
            Recorder(self.get(spec, copy, head), one, store, progress)
            for copy, one in enumerate(on_devices(spec))
        ]


def _opened(spec: ModelSpec, head: str) -> Any:
    if spec.engine == "sentence-transformers":
        from siftline.scoring.measures.embed import SentenceEmbedder

        return SentenceEmbedder(spec)
    if head == "classifier":
        from siftline.scoring.measures.classifiers import open_classifier

        return open_classifier(spec)
    return open_engine(spec)


def on_devices(spec: ModelSpec) -> list[ModelSpec]:
    """The specification once for each device it names; a device named twice runs two copies."""
    return [replace(spec, device=name.strip()) for name in spec.device.split(",")]


@contextmanager
def engines() -> Iterator[Engines]:
    """Engines that are freed at the end, whatever happens."""
    opened = Engines()
    try:
        yield opened
    finally:
        opened.close()


Worker = TypeVar("Worker")
Rows = TypeVar("Rows")
Result = TypeVar("Result")


class Stopped(Exception):
    """Ends the work on a bucket because the run ends; what was committed is kept."""


def over_buckets(
    workers: Sequence[Worker],
    buckets: Iterable[tuple[int, Rows]],
    work: Callable[[Worker, int, Rows], Result],
) -> Iterator[tuple[int, Result]]:
    """Runs `work` on every bucket, one at a time on each worker.

    When the run ends early (an error, Ctrl-C), each worker finishes its batch and no more.

    Args:
        workers: What one device has: its recorder, or several by name or in a row.
        buckets: Store bucket and its rows, each bucket once; read as workers come free.
        work: Asks the models of a worker about the rows of one bucket.

    Yields:
        Bucket and result, in the order of the buckets.
    """
    if len(workers) == 1:
        for bucket, rows in buckets:
            yield bucket, work(workers[0], bucket, rows)
        return
    crew = _Workers(workers, work)
    pool = ThreadPoolExecutor(len(workers), thread_name_prefix="bucket")
    waiting: deque[tuple[int, Future[Result]]] = deque()
    try:
        for bucket, rows in buckets:
            waiting.append((bucket, pool.submit(crew.one, bucket, rows)))
            if len(waiting) > len(workers):
                first, result = waiting.popleft()
                yield first, crew.taken(result)
        for first, result in waiting:
            yield first, crew.taken(result)
    finally:
        crew.stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


class _Workers(Generic[Worker, Rows, Result]):
    """The workers of one run, and whether it ends early."""

    def __init__(
        self, workers: Sequence[Worker], work: Callable[[Worker, int, Rows], Result]
    ) -> None:
        self.work, self.stop = work, threading.Event()
        self._failures: list[BaseException] = []
        self._free: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for worker in workers:
            self._free.put(_stoppable(worker, self.stop))

    def one(self, bucket: int, rows: Rows) -> Result:
        """Does the work on a bucket on the next free worker."""
        worker = self._free.get()
        try:
            return self.work(worker, bucket, rows)
        except Stopped:
            raise
        except BaseException as error:
            self._failures.append(error)
            self.stop.set()
            raise
        finally:
            self._free.put(worker)

    def taken(self, result: Future[Result]) -> Result:
        """A bucket's result; the error that ended the run, where that stopped this bucket."""
        try:
            return result.result()
        except Stopped:
            raise self._failures[0] from None


def _stoppable(worker: Any, stop: threading.Event) -> Any:
    """A worker whose recorders give up after a committed batch once the run ends."""
    if isinstance(worker, dict):
        return {name: _stoppable(each, stop) for name, each in worker.items()}
    if isinstance(worker, list | tuple):
        return type(worker)(_stoppable(each, stop) for each in worker)
    if not isinstance(worker, Recorder):
        return worker

    def advance(rows: int, tokens: int) -> None:
        worker.progress(rows, tokens)
        if stop.is_set():
            raise Stopped

    return replace(worker, progress=advance)


@contextmanager
def counted(
    recorders: Collection[Recorder], units: int, advance: Callable[[int], None]
) -> Iterator[None]:
    """Makes a bucket's rows count in full, those that no question was asked for as well.

    Args:
        recorders: Those that are asked in the body; they report what they are asked.
        units: What the bucket's rows are in the step's total.
        advance: Takes the units that no recorder has reported.
    """
    before = _questions(recorders)
    yield
    advance(units - (_questions(recorders) - before))


def _questions(recorders: Collection[Recorder]) -> int:
    return sum(r.tally.computed + r.tally.found + r.tally.failed for r in recorders)


def total(recorders: Sequence[Recorder]) -> Tally:
    """What the recorders' questions cost together."""
    out = Tally()
    for recorder in recorders:
        for name, value in vars(recorder.tally).items():
            setattr(out, name, getattr(out, name) + value)
    return out
