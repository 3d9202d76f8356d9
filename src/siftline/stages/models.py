"""Models of a recipe: which directory plays a role, and engines opened once per process."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from siftline.recipe import Model, Recipe, expand
from siftline.scoring.engines import EngineName, ModelSpec, open_engine
from siftline.scoring.fingerprint import directory_digest
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
    name = recipe.roles.get(role, recipe.roles["target"])
    model = recipe.models[name]
    spec = replace(model.spec, engine=role_engine(recipe, role))
    if model.pretrain is None:
        return replace(spec, path=expand(spec.path))
    folder = trained_folder(workspace, recipe, name)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model {name!r} has not been trained: materialize models/{name} first")
    return replace(spec, path=str(folder))


def role_engine(recipe: Recipe, role: str) -> EngineName:
    """The engine a role runs on: its model's, but an embedder never on vLLM.

    vLLM pools by mean, first or last token only; the position-weighted mean that `embed` promises
    comes from transformers on the same weights. Reports and stage facts name the engine that ran.
    """
    engine = recipe.model(role).spec.engine
    return "transformers" if role == "embedder" and engine == "vllm" else engine


def identity(spec: ModelSpec) -> str:
    """Names a model for stage keys without loading it: files, dtype, engine, template, lengths."""
    return content_hash(
        [
            directory_digest(Path(spec.path)),
            directory_digest(Path(spec.adapter)) if spec.adapter else None,
            spec.engine,
            spec.dtype,
            spec.template,
            spec.max_length,
        ]
    )


class Engines:
    """Engines by specification, opened when first asked for."""

    def __init__(self) -> None:
        self._open: dict[ModelSpec, Any] = {}

    def get(self, spec: ModelSpec) -> Any:
        """The engine of a specification, or the embedder where it names one."""
        if spec not in self._open:
            if spec.engine == "sentence-transformers":
                from siftline.scoring.embedders import SentenceEmbedder

                self._open[spec] = SentenceEmbedder(spec)
            else:
                self._open[spec] = open_engine(spec)
        return self._open[spec]

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
        """A recorder on the engine of a specification."""
        return Recorder(self.get(spec), spec, store, progress)


@contextmanager
def engines() -> Iterator[Engines]:
    """Engines that are freed at the end, whatever happens."""
    opened = Engines()
    try:
        yield opened
    finally:
        opened.close()
