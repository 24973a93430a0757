"""Contracts and schemas from annotations, and the breaking changes between them."""

from typing import Annotated, Any, Final, Literal

from hypothesis import strategies as st
from openagentmesh import AgentContract, AgentSpec
from openagentmesh.protocol.schema_diff import breaking_changes
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, create_model

# A contract without a schema.
ABSENT: Final[Any] = object()


def schema_of(hint: Any) -> Any:
    """The JSON schema of an annotation; a JSON value is returned unchanged, ABSENT is None."""
    if hint is ABSENT:
        return None
    return hint if isinstance(hint, list | dict | str) else TypeAdapter(hint).json_schema()


def contract(
    input_hint: Any = ABSENT,
    output_hint: Any = ABSENT,
    chunk_hint: Any = ABSENT,
    *,
    invocable: bool = True,
    streaming: bool = False,
) -> AgentContract:
    """A contract with the schemas of these annotations."""
    return AgentContract.declare(
        AgentSpec(name="a"),
        invocable=invocable,
        streaming=streaming,
        input_schema=schema_of(input_hint),
        output_schema=schema_of(output_hint),
        chunk_schema=schema_of(chunk_hint),
    )


def model(*, extra: Literal["allow", "forbid", "ignore"] | None = None, **fields: Any) -> Any:
    """A model with these fields; a tuple is an annotation and a default."""
    definitions: dict[str, Any] = {
        key: hint if isinstance(hint, tuple) else (hint, ...) for key, hint in fields.items()
    }
    config = ConfigDict(extra=extra) if extra else None
    created: Any = create_model("M", __config__=config, **definitions)
    return created


def input_changes(old: Any, new: Any) -> list[str]:
    """The breaking changes between two inputs."""
    return [str(change) for change in breaking_changes(contract(old), contract(new))]


def output_changes(old: Any, new: Any) -> list[str]:
    """The breaking changes between two outputs, which are also those between two chunks."""
    outputs = breaking_changes(contract(output_hint=old), contract(output_hint=new))
    chunks = breaking_changes(
        contract(chunk_hint=old, streaming=True), contract(chunk_hint=new, streaming=True)
    )
    found = [str(change) for change in outputs]
    assert [str(change) for change in chunks] == [change.replace("output", "chunk", 1) for change in found]
    return found


def at_least(length: int) -> Any:
    """The annotation of a text with a minimum length."""
    return Annotated[str, Field(min_length=length)]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class TextCat(BaseModel):
    """`Cat` with a text for `lives`."""

    model_config = ConfigDict(title="Cat")
    kind: Literal["cat"]
    lives: str


class Dog(BaseModel):
    kind: Literal["dog"]


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
TextPet = Annotated[TextCat | Dog, Field(discriminator="kind")]


class Kennel(BaseModel):
    dogs: int


class TextKennel(BaseModel):
    """`Kennel` with a text for `dogs`."""

    dogs: str


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


class TextTree(BaseModel):
    """`Tree` with a text for `value`."""

    value: str
    children: list["TextTree"] = []


_KEYWORDS = st.sampled_from(
    [
        "$ref", "$defs", "a", "b", "type", "title", "enum", "const", "properties", "required", "items",
        "prefixItems", "additionalProperties", "patternProperties", "propertyNames", "anyOf", "oneOf",
        "allOf", "minLength", "maximum", "exclusiveMaximum", "maxItems", "pattern", "format", "uniqueItems",
    ]
)  # fmt: skip
_TEXTS = st.sampled_from(
    ["string", "object", "array", "integer", "number", "null", "a", "#/$defs/a", "#", "#/a"]
)
# JSON values whose keys are keywords, so that many of them resemble schemas.
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | _TEXTS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_KEYWORDS, inner, max_size=6),
    max_leaves=25,
)
