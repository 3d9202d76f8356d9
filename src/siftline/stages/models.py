"""Models of a recipe: which directory plays a role, and engines opened once per process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from siftline.recipe.parse import Model, Recipe, expand
from siftline.scoring import versions
from siftline.scoring.engines import EngineName, ModelSpec, open_engine
from siftline.scoring.fingerprint import confirm_files, directory_digest, model_digest
from siftline.scoring.recorder import Recorder
from siftline.shards import content_hash, file_hash
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
        from siftline.scoring.embedders import SentenceEmbedder

        return SentenceEmbedder(spec)
    if head == "classifier":
        from siftline.scoring.classifiers import open_classifier

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
