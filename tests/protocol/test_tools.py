"""Agents as tools of OpenAI and Anthropic, the payloads of tool calls, and agent cards."""

import copy
import json
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any, Literal

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, Field, RootModel

from tests.support.tool_schemas import (
    PLACE,
    AllKinds,
    Cat,
    Colour,
    Dog,
    Place,
    Tree,
    contract,
    input_schema,
    schema_of,
    strict_schema,
)


class Short(BaseModel):
    limit: int = 5


class Long(BaseModel):
    limit: int | None = None
    page: int = 1


class Empty(BaseModel):
    pass


def test_a_tool_has_the_form_of_each_api() -> None:
    """The neutral form and Anthropic's are equal; OpenAI's chat API nests the function."""
    agent = contract(schema_of(Place), output=schema_of(Cat))
    description = "Does a.\nReturns: kind, lives."
    neutral = {"name": "nlp_a", "description": description, "input_schema": PLACE}
    function = {"name": "nlp_a", "description": description, "parameters": PLACE}
    assert neutral == agent.to_tool_schema() == agent.to_anthropic_tool()
    assert {"type": "function", "function": function} == agent.to_openai_tool()
    assert {"type": "function", **function, "strict": False} == agent.to_openai_tool(api="responses")


def test_an_unknown_api_is_rejected() -> None:
    """OpenAI has the APIs `chat` and `responses`."""
    with pytest.raises(ValueError, match="'chat' or 'responses', not 'completions'"):
        contract(None).to_openai_tool(api="completions")  # type: ignore[arg-type] # what is tested


@pytest.mark.parametrize(("name", "tool"), [("a", "a"), ("a.b-c.D_1", "a_b-c_D_1"), ("a" * 64, "a" * 64)])
def test_the_name_of_a_tool_has_underscores(name: str, tool: str) -> None:
    """Dots are replaced by underscores; a name has up to 64 characters."""
    assert tool == contract(None, name=name).to_tool_schema()["name"]


@pytest.mark.parametrize("name", ["a" * 65, "naïve", "a b", ""])
def test_a_name_that_is_not_valid_for_a_tool_is_rejected(name: str) -> None:
    """The error has the name, the rule and the remedy."""
    with pytest.raises(ValueError, match=r"1 to 64 letters, digits, '_' and '-'.*another name") as caught:
        contract(None, name=name).to_tool_schema()
    assert f"Agent '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("streaming", "reason"),
    [
        (True, "it is a publisher and cannot be called. Subscribe to its events instead"),
        (False, "it is a background task and cannot be called"),
    ],
)
def test_an_agent_that_cannot_be_called_is_not_a_tool(reason: str, *, streaming: bool) -> None:
    """Publishers and background tasks are rejected in every form, with their kind."""
    agent = contract(None, invocable=False, streaming=streaming)
    for form in (agent.to_tool_schema, agent.to_openai_tool, agent.to_anthropic_tool):
        with pytest.raises(ValueError, match=f"^Agent 'nlp.a' cannot be a tool: {re.escape(reason)}$"):
            form()


@pytest.mark.parametrize(
    ("description", "output", "expected"),
    [
        ("Does a.", None, "Does a."),
        ("Does a.", str, "Does a."),
        ("Does a.", list[Place], "Does a."),
        ("Does a.", Cat | Place, "Does a."),
        ("Does a.", dict[str, int], "Does a."),
        ("Does a.", Empty, "Does a."),
        ("Does a.", Place, "Does a.\nReturns: city, country."),
        ("Does a.", Tree, "Does a.\nReturns: name, children."),
        ("", Place, "Returns: city, country."),
    ],
)
def test_the_description_lists_the_fields_of_the_output(description: str, output: Any, expected: str) -> None:
    """Fields of an object are listed, also behind a reference; other outputs are not described."""
    agent = contract(None, output=output and schema_of(output))
    agent = agent.model_copy(update={"description": description})
    assert expected == agent.to_tool_schema()["description"]


def test_an_agent_without_input_takes_an_empty_object() -> None:
    """Models call it without arguments, and the agent gets no payload."""
    assert {"type": "object", "properties": {}} == input_schema(None)
    strict = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    assert strict == strict_schema(None)
    assert contract(None).tool_input({}) is None


@pytest.mark.parametrize(
    ("hint", "payload"),
    [
        (str, "x"),
        (int, 0),
        (bool, False),
        (list[str], ["x"]),
        (list[Tree], [{"name": "a", "children": [{"name": "b", "children": []}]}]),
        (tuple[int, str], [1, "x"]),
        (Literal["a", "b"], "a"),
        (Colour, "red"),
        (int | str, "x"),
        (Place | None, None),
        (Cat | Dog, {"kind": "cat", "lives": 9}),
        (Annotated[Cat | Dog, Field(discriminator="kind")], {"kind": "dog", "lives": None}),
        (RootModel[list[Place]], [{"city": "Delft", "country": "NL"}]),
    ],
)
def test_an_input_that_is_not_an_object_is_wrapped(hint: Any, payload: Any) -> None:
    """Model APIs require an object, so any other input becomes its `value`; references still resolve."""
    schema = schema_of(hint)
    before = copy.deepcopy(schema)
    wrapped = {key: value for key, value in schema.items() if key != "$defs"}
    expected = {"type": "object", "properties": {"value": wrapped}, "required": ["value"]}
    found = input_schema(schema)
    assert expected | ({"$defs": schema["$defs"]} if "$defs" in schema else {}) == found
    for parameters in (found, strict_schema(schema)):
        Draft202012Validator(parameters).validate({"value": payload})
        assert not Draft202012Validator(parameters).is_valid({"value": {"kind": 1}})
        assert not Draft202012Validator(parameters).is_valid({})
    assert payload == contract(schema).tool_input({"value": payload})
    assert before == schema


def test_an_input_of_any_type_is_wrapped() -> None:
    """An agent that accepts any value gets it as `value`; a strict tool cannot express any value."""
    assert {"type": "object", "properties": {"value": {}}, "required": ["value"]} == input_schema({})
    assert {"a": [None]} == contract({}).tool_input({"value": {"a": [None]}})
    with pytest.raises(
        ValueError, match=r"nlp_a#/properties/value, which accepts any value. Use strict=False"
    ):
        strict_schema({})


@pytest.mark.parametrize(
    "schema",
    [
        {"type": ["object", "null"], "properties": {}},
        {"type": "object", "anyOf": [{"required": ["a"]}, {"required": ["b"]}]},
        {"type": "object", "properties": {"a": {}}, "allOf": [{"properties": {"b": {}}}]},
        {"type": "object", "enum": [{"a": 1}]},
        {"$ref": "https://example.com/other.json"},
        {"$ref": "#"},
        {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}]}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "type": "string"},
    ],
)
def test_a_schema_that_is_invalid_at_the_root_is_wrapped(schema: dict[str, Any]) -> None:
    """Unions, enumerations and unresolved references are not allowed where an API requires an object."""
    found = input_schema(schema)
    assert ["value"] == list(found["properties"])
    assert "$schema" not in found["properties"]["value"]
    assert 1 == contract(schema).tool_input({"value": 1})


@pytest.mark.parametrize("hint", [Tree, Annotated[Tree, Field(description="A tree.")], Empty, dict[str, int]])
def test_an_object_is_not_wrapped(hint: Any) -> None:
    """An object, also behind a reference, is unchanged; a field `value` belongs to it."""
    schema = input_schema(schema_of(hint))
    assert "value" not in schema["properties"]
    assert "$ref" not in schema
    assert {"value": 1} == contract(schema_of(hint)).tool_input({"value": 1})


def test_an_object_behind_a_single_allof_is_not_wrapped() -> None:
    """Older versions of pydantic write a reference with a description as an `allOf` of one."""
    schema = {"allOf": [{"$ref": "#/$defs/P"}], "description": "Where.", "$defs": {"P": PLACE}}
    assert PLACE | {"description": "Where.", "$defs": {"P": PLACE}} == input_schema(schema)


def test_invalid_arguments_are_passed_to_the_agent() -> None:
    """Arguments without the `value` are not rejected here, but by the agent with its own error."""
    assert {"text": "x"} == contract(schema_of(str)).tool_input({"text": "x"})
    assert {"city": 5, "new": None} == contract(schema_of(Place)).tool_input({"city": 5, "new": None})


def test_deeply_nested_arguments_are_decoded_in_linear_time() -> None:
    """A type that is a list of itself in two ways does not double the work at each depth."""
    schema = schema_of(list[Any]) | {"$defs": {"J": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/J"}},
        {"type": "array", "prefixItems": [{"$ref": "#/$defs/J"}], "title": "Pair"},
    ]}}, "items": {"$ref": "#/$defs/J"}}  # fmt: skip
    deep: list[Any] = []
    for _ in range(60):
        deep = [deep]
    assert deep == contract(schema).tool_input({"value": deep})


def test_a_null_that_the_agent_accepts_is_kept() -> None:
    """In a union, the keys and the discriminator select the member that a null belongs to."""
    agent = contract(schema_of(Cat | Dog))
    assert {"kind": "dog", "lives": None} == agent.tool_input({"value": {"kind": "dog", "lives": None}})
    assert {"kind": "cat"} == agent.tool_input({"value": {"kind": "cat", "lives": None}})
    agent = contract(schema_of(Short | Long))
    assert {} == agent.tool_input({"value": {"limit": None}})
    assert {"limit": None, "page": 1} == agent.tool_input({"value": {"limit": None, "page": 1}})


def test_a_contract_is_not_changed_by_its_forms() -> None:
    """Every form is a copy: a change of one changes neither the contract nor the next form."""
    agent = contract(schema_of(AllKinds), output=schema_of(Tree))
    before = agent.model_dump_json()
    strict = partial(agent.to_openai_tool, strict=True)
    forms: list[Callable[[], Any]] = [agent.to_tool_schema, agent.to_openai_tool, strict, agent.to_agent_card]
    for form in forms:
        changed, expected = form(), form()
        clear(changed)
        assert expected == form()
    assert before == agent.model_dump_json()


def clear(document: Any) -> None:
    """Clear a document at every depth."""
    if isinstance(document, dict | list):
        for inner in document.values() if isinstance(document, dict) else document:
            clear(inner)
        document.clear()


def test_a_tool_is_strict_json() -> None:
    """A default of NaN is encoded as null, since JSON has no NaN."""
    agent = contract(PLACE | {"default": math.nan})
    assert '"default": null' in json.dumps(agent.to_tool_schema(), allow_nan=False)


def test_an_agent_card_has_no_extensions() -> None:
    """An A2A card has the keys of the contract document except `x-agentmesh`, and `url` if it is given."""
    agent = contract(schema_of(Place), output=schema_of(str))
    expected = {
        "name": "nlp.a",
        "description": "Does a.",
        "version": "0.1.0",
        "capabilities": {"streaming": False, "invocable": True},
        "skills": [
            {
                "id": "nlp.a", "name": "nlp.a", "description": "Does a.", "tags": ["x"],
                "inputSchema": schema_of(Place), "outputSchema": {"type": "string"},
            }
        ],
    }  # fmt: skip
    assert expected == agent.to_agent_card()
    assert expected | {"url": "https://a.example"} == agent.to_agent_card("https://a.example")
