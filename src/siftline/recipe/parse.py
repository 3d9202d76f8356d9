"""The recipe: frozen, validated configuration of one pipeline.

A recipe is a YAML file (or `parse` on a mapping): a pool, evaluation sets, models by role, a list
of stages, one budget, training and evaluation. A stage's options are the fields of the dataclass
that does the work, so a default is stated once, beside its source. Strings may hold `{inputs}`, the
folder a recipe's generator wrote, and `${NAME}`, an environment variable; both are expanded when
used, never in the recipe's hash, so that bytes don't depend on where data lies.

Which recipes there are: the shipped ones, and those in the folders SIFTLINE_RECIPES names.
"""

import copy
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from siftline.config import build, check_names, convert, nearest, override, read_yaml
from siftline.ingest.pool import PoolSpec
from siftline.recipe.kinds import Stage, StageKind, kind_of
from siftline.recipe.sections import Bounds, Budget, Canaries, Card, Inputs, Model, Sets, Training
from siftline.rows.verified import content_hash
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.likelihood import Likelihood
from siftline.scoring.measures.scorers import KINDS, models_of
from siftline.training.evaluate import Evaluation
from siftline.training.pretrain import Pretrain

RECIPE_NAME, SCORER_NAME = r"^[a-z][a-z0-9_]*$", r"^(?!(likelihood|uniform)$)[a-z][a-z0-9_]*$"
REQUIRED = ("name", "pool", "models", "stages", "budget")
ROLES = ("target", "sampler", "judge", "embedder", "nli")
_OPTIONAL: dict[str, Any] = {
    "inputs": Inputs,
    "training": Training,
    "evaluation": Evaluation,
    "canaries": Canaries,
}


@dataclass(frozen=True)
class Recipe:
    """A whole pipeline. See `parse` and `load`.

    Attributes:
        name: The recipe's name: lower-case letters, digits and _.
        seed: The seed of every draw.
        pool: Where rows come from.
        sets: Evaluation sets by role.
        models: Models by name.
        roles: Names of models by role. A recipe with one model needs none; roles that are not named
            fall to the target model, except nli.
        stages: What is done, in order: each a kind, or a kind with options.
        budget: What the curated version may cost.
        likelihood: What is scored under the target model.
        scorers: Quality scorers by name.
        bounds: What turns a stage red.
        card: What the dataset card says.
        inputs: A generator of the raw files.
        training: Fine-tuning arms, compared at equal cost.
        evaluation: How accuracy is measured.
        canaries: Planted defects that measure the gates.
        schedule: Cron line of Dagster's schedule, which is off until switched on.
    """

    name: str
    seed: int
    pool: PoolSpec
    sets: Sets
    models: dict[str, Model]
    roles: dict[str, str]
    stages: tuple[Stage, ...]
    budget: Budget
    likelihood: Likelihood = field(default_factory=Likelihood)
    scorers: dict[str, Any] = field(default_factory=dict)
    bounds: Bounds = field(default_factory=Bounds)
    card: Card = field(default_factory=Card)
    inputs: Inputs | None = None
    training: Training | None = None
    evaluation: Evaluation | None = None
    canaries: Canaries | None = None
    schedule: str = "0 3 * * *"

    @cached_property
    def hash(self) -> str:
        """Hash of everything the recipe says, defaults included; 64 hex digits."""
        return content_hash(_plain(self))

    def model(self, role: str) -> Model:
        """The model that plays a role; roles that are not named fall to the target model."""
        return self.models[self.roles.get(role, self.roles["target"])]

    @property
    def shared_names(self) -> frozenset[str]:
        """Names of the pools, sets and models that another recipe may have too."""
        sets = [spec.name for _, spec in self.sets.items()]
        return frozenset((self.pool.name, *sets, *self.models))

    def pool_named(self, name: str) -> PoolSpec:
        """The pool or evaluation set of a name."""
        specs = (self.pool, *(spec for _, spec in self.sets.items()))
        return next(spec for spec in specs if spec.name == name)

    def columns_read(self, name: str) -> frozenset[str]:
        """Input columns of a pool or set that some part of the recipe reads beside the rows.

        Options that read such columns name them in a method `input_columns`.
        """
        parts: list[Any] = []
        if name == self.pool.name:
            parts = [*(stage.options for stage in self.stages), *self.scorers.values()]
        elif name in [spec.name for spec in self.sets.test]:
            parts = [self.evaluation]
        found: set[str] = set()
        for part in parts:
            found.update(getattr(part, "input_columns", tuple)())
        return frozenset(found)

    def stage(self, name: str) -> Stage:
        """A stage by name.

        Raises:
            ValueError: if there is none, naming the nearest.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        known = [stage.name for stage in self.stages]
        raise ValueError(f"recipe {self.name!r} has no stage {name!r}: {nearest(name, known)}")


def _plain(recipe: Recipe) -> dict[str, Any]:
    """What decides the bytes: the schedule, canaries and how the pools are cut do not."""
    plain = {k: v for k, v in asdict(recipe).items() if k not in ("schedule", "canaries")}
    for spec in (plain["pool"], *(s for sets in plain["sets"].values() for s in sets)):
        del spec["buckets"]
    return plain


def expand(text: str, inputs: Path | None = None) -> str:
    """Expands `{inputs}` and `${NAME}`.

    Raises:
        ValueError: naming an environment variable that is not set.
    """

    def variable(match: re.Match[str]) -> str:
        value = os.environ.get(match[1])
        if value is None:
            raise ValueError(f"{text!r}: environment variable {match[1]} is not set: set it")
        return value

    text = re.sub(r"\$\{(\w+)\}", variable, text)
    return text.replace("{inputs}", str(inputs)) if inputs is not None else text


def expand_pool(spec: PoolSpec, inputs: Path) -> PoolSpec:
    """The same pool with every path expanded."""
    sources = tuple(replace(source, path=expand(source.path, inputs)) for source in spec.inputs)
    return replace(spec, inputs=sources)


def parse(data: Mapping[str, Any], overrides: Sequence[str] = ()) -> Recipe:
    """Validates a recipe.

    Args:
        data: What the YAML held.
        overrides: `key=value` assignments, applied first; see `config.override`.

    Raises:
        ValueError: in one line with the dotted place, what is wrong and what would be right.
    """
    raw: dict[str, Any] = copy.deepcopy(dict(data))
    if isinstance(raw.get("stages"), list):
        raw["stages"] = [{s: None} if isinstance(s, str) else s for s in raw["stages"]]
    for assignment in overrides:
        override(raw, assignment)
    known = list(Recipe.__dataclass_fields__)
    for key in raw:
        if key not in known:
            raise ValueError(f"recipe: unknown key {key!r}: {nearest(str(key), known)}")
    for key in REQUIRED:
        if key not in raw:
            raise ValueError(f"recipe: {key!r} is missing")
    name = convert(str, raw["name"], "recipe.name")
    seed = convert(int, raw.get("seed", 0), "recipe.seed")
    if not re.fullmatch(RECIPE_NAME, name):
        raise ValueError(f"recipe: name {name!r}: use lower-case letters, digits and _")
    pool, sets = build(PoolSpec, raw["pool"], "pool"), build(Sets, raw.get("sets"), "sets")
    check_names([pool.name, *(spec.name for _, spec in sets.items())], "pool and sets")
    budget = build(Budget, raw["budget"], "budget")
    bodies = convert(dict[str, Any], raw["models"], "models")
    models = {key: _model(body, f"models.{key}") for key, body in bodies.items()}
    check_names(list(models), "models")
    scorers = _scorers(raw.get("scorers"), models)
    stages = _stages(raw["stages"], budget, seed)
    _check_scores(stages, scorers)
    chosen = {k: build(cls, raw[k], k) for k, cls in _OPTIONAL.items() if raw.get(k) is not None}
    _check_retained(sets, chosen.get("evaluation"))
    _check_prompts(pool, sets, stages, chosen.get("training"))
    if "training" in chosen:
        chosen["training"].check_models(models)
    recipe = Recipe(
        name=name,
        seed=seed,
        pool=pool,
        sets=sets,
        models=models,
        roles=_roles(raw.get("roles"), models),
        stages=stages,
        likelihood=build(Likelihood, raw.get("likelihood"), "likelihood"),
        scorers=scorers,
        budget=budget,
        bounds=build(Bounds, raw.get("bounds"), "bounds"),
        card=build(Card, raw.get("card"), "card"),
        schedule=convert(str, raw.get("schedule", Recipe.schedule), "recipe.schedule"),
        **chosen,
    )
    settled = tuple(stage.of.settle(stage, recipe) for stage in recipe.stages)
    _check_nli(settled, raw.get("roles"))
    return replace(recipe, stages=settled)


def load(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Reads a recipe file.

    Raises:
        ValueError: if it is absent, not YAML, or not a valid recipe; the file's name comes first.
    """
    try:
        data = read_yaml(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: no such recipe file") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise ValueError(f"{path}: not YAML: {detail}") from error
    if not isinstance(data, Mapping):
        raise ValueError(f"{path}: expected a mapping, found {type(data).__name__}")
    try:
        return parse(data, overrides)
    except ValueError as error:
        raise ValueError(f"{path.name}: {error}") from error


def _model(body: Any, where: str) -> Model:
    if not isinstance(body, Mapping):
        raise ValueError(f"{where}: expected a mapping, found {body!r}")
    rest = {k: v for k, v in body.items() if k not in ("pretrain", "corpus")}
    trained = body.get("pretrain") is not None
    if trained == ("path" in rest):
        raise ValueError(f"{where}: give either path, or pretrain and corpus")
    if trained and "corpus" not in body:
        raise ValueError(f"{where}: pretrain needs corpus, a JSONL file of text")
    if not trained and body.get("corpus") is not None:
        raise ValueError(f"{where}: corpus is what pretrain trains on: give both, or neither")
    spec = build(ModelSpec, {"path": "", **rest}, where)
    if not trained:
        return Model(spec)
    corpus = convert(str, body["corpus"], f"{where}.corpus")
    return Model(spec, build(Pretrain, body["pretrain"], f"{where}.pretrain"), corpus)


def _roles(body: Any, models: Mapping[str, Model]) -> dict[str, str]:
    roles = convert(dict[str, str] | None, body, "roles") or {}
    if "target" not in roles:
        if len(models) != 1:
            raise ValueError("roles: 'target' is missing: name the model to be tuned")
        roles["target"] = next(iter(models))
    for role, model in roles.items():
        if role not in ROLES:
            raise ValueError(f"roles: unknown role {role!r}: {nearest(role, ROLES)}")
        if model not in models:
            raise ValueError(f"roles.{role}: no model {model!r}: {nearest(model, list(models))}")
    return roles


def _scorers(body: Any, models: Mapping[str, Model]) -> dict[str, Any]:
    """Scorers by name: `name: {kind: …, options}`."""
    found: dict[str, Any] = {}
    for name, entry in (convert(dict[str, Any] | None, body, "scorers") or {}).items():
        where = f"scorers.{name}"
        if not re.fullmatch(SCORER_NAME, name):
            raise ValueError(
                f"{where}: use lower-case letters, digits and _; likelihood and uniform are taken"
            )
        if not isinstance(entry, Mapping) or entry.get("kind") not in KINDS:
            kind = entry.get("kind") if isinstance(entry, Mapping) else entry
            raise ValueError(f"{where}: kind {kind!r}: {nearest(str(kind), list(KINDS))}")
        options = {key: value for key, value in entry.items() if key != "kind"}
        found[name] = build(KINDS[entry["kind"]], options, where)
        for model in models_of(found[name]):
            if model not in models:
                raise ValueError(f"{where}: no model {model!r}: {nearest(model, list(models))}")
    return found


def _stages(body: Any, budget: Budget, seed: int) -> tuple[Stage, ...]:
    if not isinstance(body, list) or not body:
        raise ValueError("stages: expected a list of stages, each a name or name: options")
    stages: list[Stage] = []
    for i, entry in enumerate(body):
        kind, given = _entry(entry, f"stages[{i}]")
        name = convert(str, given.pop("name", kind.name), f"stages[{i}].name")
        for key in kind.from_budget:
            if key in given:
                raise ValueError(f"stages.{name}: {key!r} belongs to the recipe's budget: move it")
        given |= {key: getattr(budget, key) for key in kind.from_budget}
        given = kind.complete(given, stages, budget)
        if kind.seeded and "seed" in {f.name for f in fields(kind.options)}:
            given.setdefault("seed", seed)
        stage = Stage(name, kind.name, build(kind.options, given, f"stages.{name}"))
        kind.check(stage, stages)
        stages.append(stage)
        if kind.repeats:
            gates = [s for s in stages if s.kind in kind.repeats and s.scope == "all"]
            again = f"_{name}" if any(s.scope == "added" for s in stages) else ""
            added = [replace(s, name=f"{s.name}_added{again}", scope="added") for s in gates]
            stages += added
    check_names([stage.name for stage in stages], "stages")
    if "budget" in [stage.of.role for stage in stages[:-1]]:
        raise ValueError("stages: allocate spends the budget: put it last, once")
    return tuple(stages)


def scorers_read(stage: Stage) -> tuple[str, ...]:
    """Names of the recipe's scorers that a stage reads."""
    return stage.of.scorers(stage.options)


def _check_retained(sets: Sets, evaluation: Evaluation | None) -> None:
    """A retained set is one of the test sets, and at least one other is the task."""
    if evaluation is None or not evaluation.retained:
        return
    known = [spec.name for spec in sets.test]
    for name in evaluation.retained:
        if name not in known:
            raise ValueError(f"evaluation.retained: no test set {name!r}: {nearest(name, known)}")
    if set(known) == set(evaluation.retained):
        raise ValueError("evaluation.retained names every test set: leave the task's own out")


def _check_prompts(
    pool: PoolSpec, sets: Sets, stages: Sequence[Stage], training: Training | None
) -> None:
    """Prompts without responses are answered before anything judges a response."""
    for role, spec in sets.items():
        if role != "test" and spec.holds != "responses":
            raise ValueError(
                f"sets.{role}: {spec.name!r} holds {spec.holds}: only test sets go without "
                "responses"
            )
    if pool.holds == "either":
        raise ValueError("pool.holds: either is for test sets: say responses or prompts")
    if pool.holds == "responses":
        return
    answering = [i for i, stage in enumerate(stages) if stage.of.prompts == "answers"]
    if not answering:
        raise ValueError(
            f"pool {pool.name!r} holds prompts, and no rejection_sampling stage answers them: add "
            "one"
        )
    for stage in stages[: answering[-1]]:
        if stage.scope == "all" and stage.of.prompts is None:
            raise ValueError(
                f"stages.{stage.name}: pool {pool.name!r} holds prompts, which have no response "
                "yet: put it behind rejection_sampling"
            )
    if training is not None and set(training.arms) != {"curated"}:
        raise ValueError(
            f"training.arms: rows of {pool.name!r} have no responses to train on: arms is curated"
        )


def _check_scores(stages: Sequence[Stage], scorers: Mapping[str, Any]) -> None:
    for stage in stages:
        for name in scorers_read(stage):
            if name not in scorers:
                hint = nearest(name, list(scorers)) if scorers else "add it to the recipe's scorers"
                raise ValueError(f"stages.{stage.name}: no scorer {name!r}: {hint}")


def _check_nli(stages: Sequence[Stage], roles: Any) -> None:
    """A cross-encoder is no causal model: its role does not fall to the target model."""
    for stage in stages:
        if "nli" in getattr(stage.options, "more_roles", ()) and "nli" not in (roles or {}):
            raise ValueError(
                f"stages.{stage.name}: weights name nli, and roles have no nli: name the model "
                "of a cross-encoder there"
            )


def _entry(entry: Any, where: str) -> tuple[StageKind, dict[str, Any]]:
    entry = {entry: None} if isinstance(entry, str) else entry
    if not isinstance(entry, Mapping) or len(entry) != 1:
        raise ValueError(f"{where}: expected one stage, found {entry!r}")
    ((kind, options),) = entry.items()
    try:
        found = kind_of(str(kind))
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from None
    if options is not None and not isinstance(options, Mapping):
        raise ValueError(f"{where}.{kind}: expected options, found {options!r}")
    return found, dict(options or {})


SHIPPED = Path(__file__).parents[1] / "pipelines" / "recipes"
VARIABLE = "SIFTLINE_RECIPES"


def recipe_files() -> dict[str, Path]:
    """Recipe files by name, the file's stem; a user's file takes the place of a shipped one."""
    folders = [SHIPPED, *(Path(p) for p in os.environ.get(VARIABLE, "").split(os.pathsep) if p)]
    return {
        file.stem: file
        for folder in folders
        for file in sorted(folder.glob("*.yaml"))
        if file.is_file()
    }


def find(name: str, overrides: Sequence[str] = ()) -> Recipe:
    """Loads a recipe by name.

    Raises:
        ValueError: if there is none, naming the nearest, or it is not valid.
    """
    files = recipe_files()
    if name not in files:
        raise ValueError(f"no recipe {name!r}: {nearest(name, list(files))}")
    recipe = load(files[name], overrides)
    if recipe.name != name:
        raise ValueError(f"{files[name].name}: its name is {recipe.name!r}: rename one of the two")
    return recipe


def all_recipes() -> list[Recipe]:
    """Every recipe, sorted by name.

    Raises:
        ValueError: if one is not valid; the file's name comes first.
    """
    return [find(name) for name in sorted(recipe_files())]


def read_all() -> tuple[list[Recipe], dict[str, str]]:
    """Every recipe that is valid, sorted by name, and what is wrong with each of the others."""
    valid: list[Recipe] = []
    broken: dict[str, str] = {}
    for name in sorted(recipe_files()):
        try:
            valid.append(find(name))
        except ValueError as error:
            broken[name] = str(error)
        except OSError as error:
            broken[name] = f"{name}.yaml can't be read: {error}"
    return valid, broken
