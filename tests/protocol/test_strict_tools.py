"""Strict tools: every schema that OpenAI's strict mode can express, and how optional fields are decoded."""

import re
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ConfigDict

from tests.support.tool_schemas import (
    PLACE,
    AllKinds,
    Place,
    contract,
    input_schema,
    schema_of,
    strict_schema,
    violations,
)


class Words(BaseModel):
    counts: dict[str, int]


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Listed(BaseModel):
    items: list[Any]


class Nested(BaseModel):
    words: Words | None = None


@pytest.mark.parametrize(
    ("schema", "violation"),
    [
        ({"type": "string"}, "# is not an object"),
        ({"anyOf": [{"type": "string"}]}, "# is not an object"),
        ({"type": "object", "properties": {}, "required": []}, "# allows additional properties"),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False},
            "#/properties/a has no type",
        ),
    ],
)
def test_violations_of_the_rules_are_found(schema: dict[str, Any], violation: str) -> None:
    """The checker that these tests use reports schemas that OpenAI rejects."""
    assert violation in list(violations(schema, schema))


def test_a_strict_tool_has_the_form_of_each_api() -> None:
    """The key `strict` is beside the parameters, which are the same for both APIs."""
    agent = contract(schema_of(Place))
    chat = agent.to_openai_tool(strict=True)["function"]
    assert {"type": "function", **chat} == agent.to_openai_tool(api="responses", strict=True)
    assert {
        "name": "nlp_a",
        "description": "Does a.",
        "strict": True,
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "country": {"type": ["string", "null"]}},
            "required": ["city", "country"],
            "additionalProperties": False,
        },
    } == chat


def test_fields_of_every_kind_are_converted() -> None:
    """Nested, optional, recursive, discriminated, repeated and constrained fields comply with the rules."""
    schema = strict_schema(schema_of(AllKinds))
    assert {
        "text": {"description": "What to read.", "type": "string"},
        "limit": {"type": ["integer", "null"]},
        "when": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "colour": {"anyOf": [{"$ref": "#/$defs/Colour"}, {"type": "null"}]},
        "mode": {"anyOf": [{"enum": ["fast", "slow", 3], "type": ["string", "integer"]}, {"type": "null"}]},
        "place": {"anyOf": [{"$ref": "#/$defs/Place"}, {"type": "null"}]},
        "pet": {"anyOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
        "either": {"anyOf": [{"type": "integer"}, {"type": "string"}]},
        "tags": {"items": {"type": "string"}, "type": ["array", "null"]},
        "spot": {"items": {"type": "number"}, "type": ["array", "null"]},
        "pair": {"items": {"anyOf": [{"type": "string"}, {"$ref": "#/$defs/Place"}]}, "type": "array"},
        "tree": {"anyOf": [{"$ref": "#/$defs/Tree"}, {"type": "null"}]},
    } == schema["properties"]
    children = schema["$defs"]["Tree"]["properties"]["children"]
    assert {"type": ["array", "null"], "items": {"$ref": "#/$defs/Tree"}} == children
    assert {"const": "cat", "type": "string"} == schema["$defs"]["Cat"]["properties"]["kind"]


def test_a_null_for_a_field_with_a_default_is_removed() -> None:
    """In strict mode a model sends null for an omitted field; the agent gets no key, at any depth."""
    arguments = {
        "text": "x", "limit": None, "when": None, "colour": None, "mode": None, "place": None, "either": 1,
        "pet": {"kind": "cat", "lives": None}, "tags": None, "spot": None,
        "pair": ["x", {"city": "Delft", "country": None}],
        "tree": {"name": "a", "children": [{"name": "b", "children": None}]},
    }  # fmt: skip
    Draft202012Validator(strict_schema(schema_of(AllKinds))).validate(arguments)
    payload = contract(schema_of(AllKinds)).tool_input(arguments)
    assert {
        "text": "x", "when": None, "either": 1, "pet": {"kind": "cat"}, "pair": ["x", {"city": "Delft"}],
        "tree": {"name": "a", "children": [{"name": "b"}]},
    } == payload  # fmt: skip
    assert 10 == AllKinds.model_validate(payload).limit


@pytest.mark.parametrize(
    ("hint", "path", "reason"),
    [
        (dict[str, int], "nlp_a#", "any keys"),
        (Words, "nlp_a#/properties/counts", "any keys"),
        (Nested, "nlp_a#/$defs/Words/properties/counts", "any keys"),
        (list[dict[str, str]], "nlp_a#/properties/value/items", "any keys"),
        (Loose, "nlp_a#", "any keys"),
        (Listed, "nlp_a#/properties/items/items", "any value"),
        ({"type": "object", "patternProperties": {"^a": PLACE}, "properties": {}}, "nlp_a#", "any keys"),
        ({"type": "object", "properties": {"a": {"type": "object"}}}, "nlp_a#/properties/a", "any keys"),
        ({"type": "array"}, "nlp_a#/properties/value", "any items"),
        ({"anyOf": [{"type": "string"}, True]}, "nlp_a#/properties/value/anyOf/1", "any value"),
        ({"allOf": [PLACE, PLACE]}, "nlp_a#/properties/value", "combines several schemas"),
        (PLACE | {"allOf": [PLACE]}, "nlp_a#/properties/value", "combines its properties"),
        ({"$ref": "#/$defs/A", "$defs": {"A": {}}}, "nlp_a#/properties/value", "refers to #/$defs/A"),
        ({"$ref": "https://x.org/y"}, "nlp_a#/properties/value", "refers to https://x.org/y"),
        ({"enum": [[1], [2]]}, "nlp_a#/properties/value", "any items"),
    ],
)
def test_a_schema_that_strict_mode_cannot_express_is_rejected(hint: Any, path: str, reason: str) -> None:
    """The error has the path and the remedy; the agent is a tool that is not strict."""
    schema = hint if isinstance(hint, dict) else schema_of(hint)
    with pytest.raises(ValueError, match=f"express {re.escape(path)}, which .*Use strict=False$") as caught:
        contract(schema).to_openai_tool(strict=True)
    assert reason in str(caught.value)
    assert input_schema(schema)


@pytest.mark.parametrize(
    ("schema", "expected"),
    [
        (
            {"oneOf": [{"type": "string"}, {"type": "null"}]},
            {"anyOf": [{"type": "string"}, {"type": "null"}]},
        ),
        (
            {"allOf": [{"$ref": "#/$defs/P"}], "default": {}},
            {"anyOf": [{"$ref": "#/$defs/P"}, {"type": "null"}]},
        ),
        ({"allOf": [{"type": "string", "format": "uri"}], "title": "T"}, {"type": ["string", "null"]}),
        (
            {"type": ["string", "null"], "enum": ["a", None]},
            {"type": ["string", "null"], "enum": ["a", None]},
        ),
        ({"enum": [1, None, 2]}, {"type": ["integer", "null"], "enum": [1, None, 2]}),
        ({"const": True}, {"anyOf": [{"type": "boolean", "const": True}, {"type": "null"}]}),
        ({"const": "a", "default": "a"}, {"type": "string", "const": "a"}),
        ({"type": ["string", "number"]}, {"type": ["string", "number", "null"]}),
        (
            {"type": "number", "minimum": 1, "multipleOf": 2, "not": {"const": 4}},
            {"type": ["number", "null"]},
        ),
        ({"$ref": "#", "description": "Recursive."}, {"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        (
            {"type": "array", "prefixItems": [{"type": "string"}], "items": False, "uniqueItems": True},
            {"type": ["array", "null"], "items": {"type": "string"}},
        ),
    ],
)
def test_schemas_of_other_libraries_are_converted(schema: dict[str, Any], expected: dict[str, Any]) -> None:
    """The schema of an optional property keeps its meaning, whichever library has written it."""
    root = {"type": "object", "properties": {"a": schema}, "$defs": {"P": PLACE}}
    assert expected == strict_schema(root)["properties"]["a"]


def test_old_definitions_are_resolved() -> None:
    """`definitions`, as in JSON Schema before 2019, are resolved and kept."""
    schema = {"type": "array", "items": {"$ref": "#/definitions/P"}, "definitions": {"P": PLACE}}
    assert {"P"} == strict_schema(schema)["definitions"].keys()
    assert [{"city": "Delft"}] == contract(schema).tool_input({"value": [{"city": "Delft", "country": None}]})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": "object", "properties": 5}, {"type": "object", "properties": {"a": {"type": 5}}},
        {"anyOf": 5}, {"$ref": 5}, {"type": "object", "properties": {"a": 5}}, {"enum": 5}, {"allOf": {}},
        {"type": "object", "$defs": []}, {"type": "array", "prefixItems": 5},
    ],
)  # fmt: skip
def test_a_malformed_schema_is_never_strict(schema: dict[str, Any]) -> None:
    """A malformed schema of a peer is used unchanged; as a strict tool it raises ValueError."""
    assert contract(schema, output=schema).to_tool_schema()
    with pytest.raises(ValueError, match="nlp_a"):
        contract(schema).to_openai_tool(strict=True)
