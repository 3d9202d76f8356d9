"""JSON Schema of a recipe, for editors and for programs that write recipes.

It says what `parse` takes, as far as that can be said of one key at a time: its types are those
that `config` checks, its texts those of the docstrings. What hangs together across a recipe, such
as the name of a model that is not there, only `parse` finds.
"""

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, NotRequired, Union, get_origin

from pydantic import Discriminator, Field, Tag, TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from siftline.config import NAME, accepted, checked_fields, field_texts, mapping_type, summary
from siftline.recipe.kinds import StageKind, kind_of, known
from siftline.recipe.parse import RECIPE_NAME, REQUIRED, ROLES, SCORER_NAME, Recipe
from siftline.recipe.sections import Model
from siftline.scoring.engines.base import ModelSpec
from siftline.scoring.measures.scorers import KINDS

FILE = "recipe.schema.json"
"""How the schema is called beside the shipped recipes."""
_SEED = "Seed of its draws; the recipe's if left out."
DIALECT = "https://json-schema.org/draft/2020-12/schema"


class _Schemas(GenerateJsonSchema):
    """Pydantic's own, without a title that repeats each key."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False


def recipe_schema() -> dict[str, Any]:
    """The schema of a whole recipe, stages and methods of installed packages included.

    Returns:
        JSON Schema of draft 2020-12.

    Raises:
        ValueError: naming the package, if one registers a stage or a method that can't be used.
    """
    kinds = [kind_of(name) for name in known()]
    methods = {kind.name: kind.methods() for kind in kinds}
    asked: list[tuple[Any, Literal["validation"], TypeAdapter[Any]]] = [
        ("", "validation", TypeAdapter(_recipe(kinds)))
    ]
    for classes in methods.values():
        asked += [(cls, "validation", TypeAdapter(accepted(cls))) for cls in classes.values()]
    found, rest = TypeAdapter.json_schemas(asked, schema_generator=_Schemas)
    shared = rest["$defs"]
    for name, classes in methods.items():
        if classes:
            said = {method: found[cls, "validation"] for method, cls in classes.items()}
            _by_method(shared[f"{name}_options"], said)
    whole = shared.pop(found["", "validation"]["$ref"].rpartition("/")[2])
    return {"$schema": DIALECT, **whole, "title": "Siftline recipe", "$defs": shared}


def schema_text() -> str:
    """The schema as a file holds it."""
    return json.dumps(recipe_schema(), indent=1, ensure_ascii=False) + "\n"


def _by_method(options: dict[str, Any], methods: Mapping[str, Any]) -> None:
    """Lets the key `options` of a stage follow from its `method`."""
    method = options["properties"]["method"]
    taken = [{"enum": list(methods)}, {"type": "string", "pattern": ":"}]
    options["properties"]["method"] = {
        **{key: value for key, value in method.items() if key != "type"},
        "anyOf": taken,
    }
    options["allOf"] = [
        {
            "if": {
                "properties": {"method": {"const": name}},
                **({} if name == method.get("default") else {"required": ["method"]}),
            },
            "then": {"properties": {"options": said}},
        }
        for name, said in methods.items()
    ]


def _recipe(kinds: list[StageKind]) -> Any:
    fields, texts = checked_fields(Recipe), field_texts(Recipe)
    roles = {role: NotRequired[accepted(str)] for role in ROLES}
    special = {
        "name": Annotated[str, Field(pattern=RECIPE_NAME)],
        "seed": Annotated[accepted(int), Field(json_schema_extra={"default": 0})],
        "models": _named(_model(), NAME),
        "roles": mapping_type("Roles", roles, "Names of models by role.") | None,
        "stages": Annotated[list[_stage(kinds)], Field(min_length=1)],  # type: ignore[misc]
        "scorers": _named(_scorer(), SCORER_NAME) | None,
    }
    for name, typed in special.items():
        fields[name] = Annotated[typed, Field(description=texts[name])]
    for name in ("seed", "sets", "roles", "scorers"):
        fields[name] = NotRequired[fields[name]]
    assert {n for n, t in fields.items() if get_origin(t) is not NotRequired} == {*REQUIRED}
    return mapping_type("Recipe", fields, "")


def _named(typed: Any, pattern: str) -> Any:
    """A mapping from names to what is of one type."""
    shown = Field(json_schema_extra={"propertyNames": {"pattern": pattern}})
    return Annotated[dict[str, typed], shown]


def _model() -> Any:
    """A model as a recipe writes it: a directory, or one that is trained here."""
    own = checked_fields(Model)
    fields = checked_fields(ModelSpec)
    fields["path"] = NotRequired[fields["path"]]
    fields |= {"pretrain": own["pretrain"], "corpus": own["corpus"]}
    trained = {
        "required": ["pretrain", "corpus"],
        "properties": {"path": False, "pretrain": {"not": {"type": "null"}}},
    }
    absent = {"pretrain": {"type": "null"}, "corpus": {"type": "null"}}
    either = [{"required": ["path"], "properties": absent}, trained]
    return mapping_type("Model", fields, summary(Model), oneOf=either)


def _scorer() -> Any:
    """A scorer by its `kind`."""
    choices = [
        Annotated[
            mapping_type(
                f"{kind}_scorer", {"kind": Literal[kind], **checked_fields(cls)}, summary(cls)
            ),
            Tag(kind),
        ]
        for kind, cls in KINDS.items()
    ]
    return Annotated[Union[tuple(choices)], Discriminator("kind")]  # noqa: UP007


def _stage(kinds: list[StageKind]) -> Any:
    """A stage: its kind alone, or its kind with options."""
    members, alone = [], []
    for kind in kinds:
        typed = _options(kind)
        if not typed.__required_keys__:
            alone.append(kind.name)
            typed = typed | None
        members.append(Annotated[mapping_type(kind.name, {kind.name: typed}, ""), Tag(kind.name)])
    bare = Annotated[Literal[tuple(alone)], Tag("")]  # type: ignore[valid-type]
    # Which it is, nobody asks here: it makes the schema say that a stage is one of them.
    return Annotated[Union[(bare, *members)], Discriminator(str)]


def _options(kind: StageKind) -> Any:
    """A stage's options as a recipe gives them, its name included."""
    text = "The stage's name; the kind's if left out."
    name = Annotated[str, Field(pattern=NAME, description=text)]
    fields: dict[str, Any] = {"name": NotRequired[name]}
    for key, typed in checked_fields(kind.options).items():
        if key == "seed" and kind.seeded:
            fields[key] = NotRequired[Annotated[accepted(int), Field(description=_SEED)]]
        elif key not in kind.from_budget:
            fields[key] = typed
    return mapping_type(f"{kind.name}_options", fields, summary(kind.options))
