"""Schemas of model APIs' tools, and the rules of OpenAI for strict ones."""

from collections.abc import Iterator
from datetime import datetime
from enum import Enum
from typing import Annotated, Any, Final, Literal

from jsonschema import Draft202012Validator
from openagentmesh import AgentContract, AgentSpec
from pydantic import BaseModel, Field, TypeAdapter


class Colour(Enum):
    RED = "red"
    BLUE = "blue"


class Place(BaseModel):
    city: str
    country: str = "NL"


class Cat(BaseModel):
    kind: Literal["cat"] = "cat"
    lives: int = 9


class Dog(BaseModel):
    kind: Literal["dog"]
    lives: int | None = None


class Tree(BaseModel):
    name: str
    children: list["Tree"] = []


class AllKinds(BaseModel):
    """Fields of all kinds."""

    text: str = Field(description="What to read.", min_length=1, max_length=90, pattern="^.+$")
    limit: int = Field(default=10, ge=1, lt=100)
    when: datetime | None = None
    colour: Colour = Colour.RED
    mode: Literal["fast", "slow", 3] = "fast"
    place: Place = Place(city="Delft")
    pet: Annotated[Cat | Dog, Field(discriminator="kind")]
    either: int | str
    tags: list[str] = Field(default=["a"], max_length=3)
    spot: tuple[float, float] = (0.0, 0.0)
    pair: tuple[str, Place]
    tree: Tree | None = None


_STRICT_KEYWORDS: Final = {
    "type", "description", "properties", "required", "additionalProperties", "items", "anyOf", "enum",
    "const", "$ref", "$defs", "definitions",
}  # fmt: skip
# Keywords whose values are schemas by name.
_NAMED: Final = ("properties", "$defs", "definitions")
# The schema of `Place`.
PLACE: Final = {
    "type": "object",
    "title": "Place",
    "properties": {
        "city": {"title": "City", "type": "string"},
        "country": {"default": "NL", "title": "Country", "type": "string"},
    },
    "required": ["city"],
}


def schema_of(hint: Any) -> dict[str, Any]:
    """The JSON schema of an annotation."""
    return TypeAdapter(hint).json_schema()


def contract(
    input_: dict[str, Any] | None,
    *,
    output: dict[str, Any] | None = None,
    name: str = "nlp.a",
    invocable: bool = True,
    streaming: bool = False,
) -> AgentContract:
    """A contract with these schemas."""
    return AgentContract.declare(
        AgentSpec(name=name, description="Does a.", tags=["x"]),
        invocable=invocable,
        streaming=streaming,
        input_schema=input_,
        output_schema=output,
        chunk_schema=None,
    )


def input_schema(input_: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a tool, which are a valid schema of an object."""
    found: dict[str, Any] = contract(input_).to_tool_schema()["input_schema"]
    Draft202012Validator.check_schema(found)
    assert ("object", dict) == (found["type"], type(found["properties"]))
    return found


def strict_schema(input_: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a strict tool, which comply with OpenAI's rules."""
    tool = contract(input_).to_openai_tool(strict=True)["function"]
    assert tool["strict"] is True
    found: dict[str, Any] = tool["parameters"]
    Draft202012Validator.check_schema(found)
    assert [] == list(violations(found, found))
    return found


def violations(schema: Any, root: dict[str, Any], path: str = "#") -> Iterator[str]:
    """Where a schema violates the rules that OpenAI documents for structured outputs."""
    if not isinstance(schema, dict):
        yield f"{path} is not an object"
        return
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    properties = schema.get("properties", {})
    rules = {
        "is not an object": path == "#" and (types != ["object"] or "anyOf" in schema),
        "has unsupported keywords": schema.keys() - _STRICT_KEYWORDS,
        "has no type": not types and not {"$ref", "anyOf"} & schema.keys(),
        "has keywords beside $ref": "$ref" in schema and len(schema) > 1,
        "has an unresolved $ref": not _is_resolved(schema.get("$ref", "#"), root),
        "allows additional properties": "object" in types and schema.get("additionalProperties") is not False,
        "has optional properties": sorted(schema.get("required", [])) != sorted(properties),
        "has no items": "array" in types and "items" not in schema,
    }
    yield from (f"{path} {rule}" for rule, is_violated in rules.items() if is_violated)
    inner = {f"{key}/{name}": each for key in _NAMED for name, each in schema.get(key, {}).items()}
    inner |= {f"anyOf/{index}": each for index, each in enumerate(schema.get("anyOf", []))}
    inner |= {"items": schema["items"]} if "items" in schema else {}
    for name, each in inner.items():
        yield from violations(each, root, f"{path}/{name}")


def _is_resolved(ref: str, root: dict[str, Any]) -> bool:
    match ref.split("/"):
        case ["#"]:
            return True
        case ["#", "$defs" | "definitions" as key, name]:
            return name in root[key]
    return False
