"""Agents as tools of OpenAI and Anthropic, the way back from a model's arguments, and agent cards."""

import copy
import itertools
import json
import math
import re
from collections.abc import Callable, Iterator
from datetime import datetime
from enum import Enum
from functools import partial
from typing import Annotated, Any, Literal, NamedTuple, Union, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from openagentmesh import AgentContract, AgentSpec
from pydantic import BaseModel, ConfigDict, Field, RootModel, TypeAdapter, ValidationError, create_model


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


class Brief(BaseModel):
    limit: int = 5


class Long(BaseModel):
    limit: int | None = None
    page: int = 1


class Tree(BaseModel):
    name: str
    children: list["Tree"] = []


class Full(BaseModel):
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


class Nothing(BaseModel):
    pass


class Words(BaseModel):
    counts: dict[str, int]


class Loose(BaseModel):
    model_config = ConfigDict(extra="allow")
    name: str


class Listed(BaseModel):
    items: list[Any]


class Nested(BaseModel):
    words: Words | None = None


STRICT_KEYS = {
    "type", "description", "properties", "required", "additionalProperties", "items", "anyOf", "enum",
    "const", "$ref", "$defs", "definitions",
}  # fmt: skip
NAMED = ("properties", "$defs", "definitions")


def schema_of(hint: Any) -> dict[str, Any]:
    return TypeAdapter(hint).json_schema()


def contract(
    takes: dict[str, Any] | None,
    *,
    returns: dict[str, Any] | None = None,
    name: str = "nlp.a",
    invocable: bool = True,
    streaming: bool = False,
) -> AgentContract:
    return AgentContract.declare(
        AgentSpec(name=name, description="Does a.", tags=["x"]),
        invocable=invocable,
        streaming=streaming,
        input_schema=takes,
        output_schema=returns,
        chunk_schema=None,
    )


def input_schema(takes: dict[str, Any] | None) -> dict[str, Any]:
    found: dict[str, Any] = contract(takes).to_tool_schema()["input_schema"]
    Draft202012Validator.check_schema(found)
    assert ("object", dict) == (found["type"], type(found["properties"]))
    return found


def strict_schema(takes: dict[str, Any] | None) -> dict[str, Any]:
    """The parameters of a strict tool, which break none of OpenAI's rules."""
    tool = contract(takes).to_openai_tool(strict=True)["function"]
    assert tool["strict"] is True
    found: dict[str, Any] = tool["parameters"]
    Draft202012Validator.check_schema(found)
    assert [] == list(faults(found, found))
    return found


def faults(schema: Any, root: dict[str, Any], path: str = "#") -> Iterator[str]:
    """Where a schema breaks the rules that OpenAI documents for structured outputs."""
    if not isinstance(schema, dict):
        yield f"{path} is no object"
        return
    types = schema.get("type", [])
    types = [types] if isinstance(types, str) else types
    properties = schema.get("properties", {})
    found = {
        "is no object": path == "#" and (types != ["object"] or "anyOf" in schema),
        "has keys that are not supported": schema.keys() - STRICT_KEYS,
        "has no type": not types and not {"$ref", "anyOf"} & schema.keys(),
        "has keys beside $ref": "$ref" in schema and len(schema) > 1,
        "refers to nothing": not resolves(schema.get("$ref", "#"), root),
        "is open": "object" in types and schema.get("additionalProperties") is not False,
        "has optional properties": sorted(schema.get("required", [])) != sorted(properties),
        "has no items": "array" in types and "items" not in schema,
    }
    yield from (f"{path} {fault}" for fault, there in found.items() if there)
    inner = {f"{key}/{name}": one for key in NAMED for name, one in schema.get(key, {}).items()}
    inner |= {f"anyOf/{at}": one for at, one in enumerate(schema.get("anyOf", []))}
    inner |= {"items": schema["items"]} if "items" in schema else {}
    for name, one in inner.items():
        yield from faults(one, root, f"{path}/{name}")


def resolves(ref: str, root: dict[str, Any]) -> bool:
    match ref.split("/"):
        case ["#"]:
            return True
        case ["#", "$defs" | "definitions" as key, name]:
            return name in root[key]
    return False


@pytest.mark.parametrize(
    ("schema", "fault"),
    [
        ({"type": "string"}, "# is no object"),
        ({"anyOf": [{"type": "string"}]}, "# is no object"),
        ({"type": "object", "properties": {}, "required": []}, "# is open"),
        (
            {"type": "object", "properties": {"a": {}}, "required": ["a"], "additionalProperties": False},
            "#/properties/a has no type",
        ),
    ],
)
def test_the_checker_of_these_tests_finds_faults(schema: dict[str, Any], fault: str) -> None:
    """What OpenAI refuses, the checker names."""
    assert fault in list(faults(schema, schema))


PLACE = {
    "type": "object",
    "title": "Place",
    "properties": {
        "city": {"title": "City", "type": "string"},
        "country": {"default": "NL", "title": "Country", "type": "string"},
    },
    "required": ["city"],
}


def test_a_tool_has_the_form_of_each_api() -> None:
    """Neutral and Anthropic: three keys; OpenAI's chat nests them, its responses do not."""
    made = contract(schema_of(Place), returns=schema_of(Cat))
    description = "Does a.\nReturns: kind, lives."
    neutral = {"name": "nlp_a", "description": description, "input_schema": PLACE}
    function = {"name": "nlp_a", "description": description, "parameters": PLACE}
    assert neutral == made.to_tool_schema() == made.to_anthropic_tool()
    assert {"type": "function", "function": function} == made.to_openai_tool()
    assert {"type": "function", **function, "strict": False} == made.to_openai_tool(api="responses")


def test_a_strict_tool_says_so_in_both_of_openais_forms() -> None:
    """`strict` stands beside the parameters, which are the same in both forms."""
    made = contract(schema_of(Place))
    chat = made.to_openai_tool(strict=True)["function"]
    assert {"type": "function", **chat} == made.to_openai_tool(api="responses", strict=True)
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


def test_an_unknown_api_is_refused() -> None:
    """Only chat and responses are OpenAI's forms."""
    with pytest.raises(ValueError, match="'chat' or 'responses', not 'completions'"):
        contract(None).to_openai_tool(api="completions")  # type: ignore[arg-type] # what a user may write


@pytest.mark.parametrize(("name", "tool"), [("a", "a"), ("a.b-c.D_1", "a_b-c_D_1"), ("a" * 64, "a" * 64)])
def test_a_tools_name_is_the_agents_with_underscores(name: str, tool: str) -> None:
    """Dots become underscores, and 64 characters still fit."""
    assert tool == contract(None, name=name).to_tool_schema()["name"]


@pytest.mark.parametrize("name", ["a" * 65, "naïve", "a b", ""])
def test_a_name_that_no_tool_can_have_is_refused(name: str) -> None:
    """The message has the name, the rule and what to do."""
    with pytest.raises(ValueError, match=r"1 to 64 letters, digits, '_' and '-'.*another name") as caught:
        contract(None, name=name).to_tool_schema()
    assert f"Agent '{name}'" in str(caught.value)


@pytest.mark.parametrize(
    ("streaming", "why"),
    [
        (True, "it is a publisher and cannot be called. Subscribe to its events instead"),
        (False, "it is a background task and cannot be called"),
    ],
)
def test_what_takes_no_requests_is_no_tool(why: str, *, streaming: bool) -> None:
    """A publisher and a background task are refused with what they are, in every form."""
    made = contract(None, invocable=False, streaming=streaming)
    for form in (made.to_tool_schema, made.to_openai_tool, made.to_anthropic_tool):
        with pytest.raises(ValueError, match=f"^Agent 'nlp.a' cannot be a tool: {re.escape(why)}$"):
            form()


@pytest.mark.parametrize(
    ("description", "returns", "expected"),
    [
        ("Does a.", None, "Does a."),
        ("Does a.", str, "Does a."),
        ("Does a.", list[Place], "Does a."),
        ("Does a.", Cat | Place, "Does a."),
        ("Does a.", dict[str, int], "Does a."),
        ("Does a.", Nothing, "Does a."),
        ("Does a.", Place, "Does a.\nReturns: city, country."),
        ("Does a.", Tree, "Does a.\nReturns: name, children."),
        ("", Place, "Returns: city, country."),
    ],
)
def test_the_description_says_what_comes_back(description: str, returns: Any, expected: str) -> None:
    """An object's fields are named, also behind a reference; other outputs are not described."""
    made = contract(None, returns=returns and schema_of(returns))
    made = made.model_copy(update={"description": description})
    assert expected == made.to_tool_schema()["description"]


def test_an_agent_without_input_takes_an_empty_object() -> None:
    """Models call it with no arguments, and it gets no payload."""
    assert {"type": "object", "properties": {}} == input_schema(None)
    strict = {"type": "object", "properties": {}, "required": [], "additionalProperties": False}
    assert strict == strict_schema(None)
    assert contract(None).tool_input({}) is None


@pytest.mark.parametrize(
    ("takes", "payload"),
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
def test_input_that_is_no_object_is_wrapped(takes: Any, payload: Any) -> None:
    """Model APIs want one object, so anything else becomes its `value`, and references still resolve."""
    takes = schema_of(takes)
    before = copy.deepcopy(takes)
    wrapped = {key: schema for key, schema in takes.items() if key != "$defs"}
    expected = {"type": "object", "properties": {"value": wrapped}, "required": ["value"]}
    found = input_schema(takes)
    assert expected | ({"$defs": takes["$defs"]} if "$defs" in takes else {}) == found
    for schema in (found, strict_schema(takes)):
        Draft202012Validator(schema).validate({"value": payload})
        assert not Draft202012Validator(schema).is_valid({"value": {"kind": 1}})
        assert not Draft202012Validator(schema).is_valid({})
    assert payload == contract(takes).tool_input({"value": payload})
    assert before == takes


def test_any_input_is_wrapped_but_never_strict() -> None:
    """An agent that takes anything takes it as `value`; strict mode has no word for anything."""
    assert {"type": "object", "properties": {"value": {}}, "required": ["value"]} == input_schema({})
    assert {"a": [None]} == contract({}).tool_input({"value": {"a": [None]}})
    with pytest.raises(
        ValueError, match=r"nlp_a#/properties/value, which accepts any value. Use strict=False"
    ):
        strict_schema({})


@pytest.mark.parametrize(
    "takes",
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
def test_what_apis_refuse_in_the_root_is_wrapped(takes: dict[str, Any]) -> None:
    """Unions, enumerations and references that lead nowhere cannot stand where an API wants an object."""
    found = input_schema(takes)
    assert ["value"] == list(found["properties"])
    assert "$schema" not in found["properties"]["value"]
    assert 1 == contract(takes).tool_input({"value": 1})


@pytest.mark.parametrize(
    "takes", [Tree, Annotated[Tree, Field(description="A tree.")], Nothing, dict[str, int]]
)
def test_an_object_is_not_wrapped(takes: Any) -> None:
    """What is one object, also behind a reference, stays itself; its `value` is its own."""
    schema = input_schema(schema_of(takes))
    assert "value" not in schema["properties"]
    assert "$ref" not in schema
    assert {"value": 1} == contract(schema_of(takes)).tool_input({"value": 1})


def test_an_object_behind_a_single_allof_is_not_wrapped() -> None:
    """Older pydantic writes a described reference as an `allOf` of one."""
    takes = {"allOf": [{"$ref": "#/$defs/P"}], "description": "Where.", "$defs": {"P": PLACE}}
    assert PLACE | {"description": "Where.", "$defs": {"P": PLACE}} == input_schema(takes)


def test_arguments_that_do_not_fit_go_to_the_agent() -> None:
    """A model that forgets the wrapping hears from the agent what is wrong, not from here."""
    assert {"text": "x"} == contract(schema_of(str)).tool_input({"text": "x"})
    assert {"city": 5, "new": None} == contract(schema_of(Place)).tool_input({"city": 5, "new": None})


def test_every_kind_of_field_is_strict() -> None:
    """Nested, optional, recursive, tagged, listed, constrained: all of it passes OpenAI's rules."""
    schema = strict_schema(schema_of(Full))
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


def test_what_models_leave_out_by_null_has_its_default() -> None:
    """Strict mode makes a model give null for a field with a default: the agent gets no key, at any depth."""
    given = {
        "text": "x", "limit": None, "when": None, "colour": None, "mode": None, "place": None, "either": 1,
        "pet": {"kind": "cat", "lives": None}, "tags": None, "spot": None,
        "pair": ["x", {"city": "Delft", "country": None}],
        "tree": {"name": "a", "children": [{"name": "b", "children": None}]},
    }  # fmt: skip
    Draft202012Validator(strict_schema(schema_of(Full))).validate(given)
    payload = contract(schema_of(Full)).tool_input(given)
    assert {
        "text": "x", "when": None, "either": 1, "pet": {"kind": "cat"}, "pair": ["x", {"city": "Delft"}],
        "tree": {"name": "a", "children": [{"name": "b"}]},
    } == payload  # fmt: skip
    assert 10 == Full.model_validate(payload).limit


def test_deep_arguments_are_read_quickly() -> None:
    """A type that is a list of itself in two ways does not double the work at each depth."""
    takes = schema_of(list[Any]) | {"$defs": {"J": {"anyOf": [
        {"type": "array", "items": {"$ref": "#/$defs/J"}},
        {"type": "array", "prefixItems": [{"$ref": "#/$defs/J"}], "title": "Pair"},
    ]}}, "items": {"$ref": "#/$defs/J"}}  # fmt: skip
    deep: list[Any] = []
    for _ in range(60):
        deep = [deep]
    assert deep == contract(takes).tool_input({"value": deep})


def test_a_null_that_the_agent_takes_is_kept() -> None:
    """Of a union, the keys and the tag say whose null it is."""
    made = contract(schema_of(Cat | Dog))
    assert {"kind": "dog", "lives": None} == made.tool_input({"value": {"kind": "dog", "lives": None}})
    assert {"kind": "cat"} == made.tool_input({"value": {"kind": "cat", "lives": None}})
    made = contract(schema_of(Brief | Long))
    assert {} == made.tool_input({"value": {"limit": None}})
    assert {"limit": None, "page": 1} == made.tool_input({"value": {"limit": None, "page": 1}})


@pytest.mark.parametrize(
    ("takes", "path", "why"),
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
def test_what_strict_mode_cannot_express_is_refused(takes: Any, path: str, why: str) -> None:
    """The message has the place and the way out; without strict the agent is a tool all the same."""
    takes = takes if isinstance(takes, dict) else schema_of(takes)
    with pytest.raises(ValueError, match=f"express {re.escape(path)}, which .*Use strict=False$") as caught:
        contract(takes).to_openai_tool(strict=True)
    assert why in str(caught.value)
    assert input_schema(takes)


@pytest.mark.parametrize(
    ("given", "expected"),
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
        ({"$ref": "#", "description": "Again."}, {"anyOf": [{"$ref": "#"}, {"type": "null"}]}),
        (
            {"type": "array", "prefixItems": [{"type": "string"}], "items": False, "uniqueItems": True},
            {"type": ["array", "null"], "items": {"type": "string"}},
        ),
    ],
)
def test_peers_schemas_are_strict_too(given: dict[str, Any], expected: dict[str, Any]) -> None:
    """What other libraries write, in an optional property, keeps its meaning."""
    takes = {"type": "object", "properties": {"a": given}, "$defs": {"P": PLACE}}
    assert expected == strict_schema(takes)["properties"]["a"]


def test_old_definitions_are_followed() -> None:
    """`definitions`, of JSON Schema before 2019, are definitions."""
    takes = {"type": "array", "items": {"$ref": "#/definitions/P"}, "definitions": {"P": PLACE}}
    assert {"P"} == strict_schema(takes)["definitions"].keys()
    assert [{"city": "Delft"}] == contract(takes).tool_input({"value": [{"city": "Delft", "country": None}]})


@pytest.mark.parametrize(
    "takes",
    [
        {"type": "object", "properties": 5}, {"type": "object", "properties": {"a": {"type": 5}}},
        {"anyOf": 5}, {"$ref": 5}, {"type": "object", "properties": {"a": 5}}, {"enum": 5}, {"allOf": {}},
        {"type": "object", "$defs": []}, {"type": "array", "prefixItems": 5},
    ],
)  # fmt: skip
def test_what_is_no_schema_is_a_value_error(takes: dict[str, Any]) -> None:
    """A peer may have published anything: it is a tool as it stands, and never a strict one."""
    assert contract(takes, returns=takes).to_tool_schema()
    with pytest.raises(ValueError, match="nlp_a"):
        contract(takes).to_openai_tool(strict=True)


def test_a_contract_is_not_changed_by_its_forms() -> None:
    """Every form is a copy: changing one changes neither the contract nor the next."""
    made = contract(schema_of(Full), returns=schema_of(Tree))
    before = made.model_dump_json()
    strict = partial(made.to_openai_tool, strict=True)
    forms: list[Callable[[], Any]] = [made.to_tool_schema, made.to_openai_tool, strict, made.to_agent_card]
    for form in forms:
        changed, expected = form(), form()
        deface(changed)
        assert expected == form()
    assert before == made.model_dump_json()


def deface(document: Any) -> None:
    """Empty a document at every depth."""
    if isinstance(document, dict | list):
        for inner in document.values() if isinstance(document, dict) else document:
            deface(inner)
        document.clear()


def test_a_tool_is_json() -> None:
    """A default of NaN is none of JSON's numbers, and no API would take it."""
    made = contract(PLACE | {"default": math.nan})
    assert '"default": null' in json.dumps(made.to_tool_schema(), allow_nan=False)


def test_a_card_is_the_document_without_what_is_ours() -> None:
    """An A2A card has the published keys but `x-agentmesh`, and `url` when there is one."""
    made = contract(schema_of(Place), returns=schema_of(str))
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
    assert expected == made.to_agent_card()
    assert expected | {"url": "https://a.example"} == made.to_agent_card("https://a.example")


class Kind(NamedTuple):
    """A type and JSON values that it takes, in which LEFT_OUT stands for a field left to its default."""

    hint: Any
    values: st.SearchStrategy[Any]


LEFT_OUT = "\x00left out"
COUNT = itertools.count()
# Types of types that are known only when a test runs.
LIST, TUPLE, UNION = cast("Any", list), cast("Any", tuple), cast("Any", Union)
LEAVES = [
    Kind(str, st.text(max_size=5)),
    Kind(int, st.integers(-99, 99)),
    Kind(float, st.floats(-9, 9)),
    Kind(bool, st.booleans()),
    Kind(None, st.none()),
    Kind(Annotated[int, Field(gt=0, le=5)], st.integers(1, 5)),
    Kind(datetime, st.just("2026-01-02T03:04:05Z")),
    Kind(Colour, st.sampled_from(["red", "blue"])),
    Kind(Literal["a", 1], st.sampled_from(["a", 1])),
    Kind(Literal["only"], st.just("only")),
    Kind(Place, st.fixed_dictionaries({"city": st.text(), "country": st.just(LEFT_OUT)})),
    Kind(Tree, st.just({"name": "a", "children": [{"name": "b", "children": LEFT_OUT}]})),
    Kind(dict[str, int], st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2)),
    Kind(Any, st.integers(0, 9)),
]


def takes_none(hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(None)
    except ValidationError:
        return False
    return True


@st.composite
def models(draw: st.DrawFn, kinds: st.SearchStrategy[Kind]) -> Kind:
    """A model of some fields, each required or not."""
    fields: dict[str, Any] = {}
    values = {}
    for kind in draw(st.lists(kinds, max_size=4)):
        name = f"f{next(COUNT)}"
        fields[name], values[name] = (kind.hint, ...), kind.values
        if draw(st.booleans()):
            default = without(draw(kind.values))
            fields[name] = (kind.hint, TypeAdapter(kind.hint).validate_python(default))
            # A constant by default is given by every model, and a null that is taken is a null.
            if not takes_none(kind.hint) and kind.hint != Literal["only"]:
                values[name] |= st.just(LEFT_OUT)
    return Kind(create_model(f"M{next(COUNT)}", **fields), st.fixed_dictionaries(values))


def composed(kinds: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    def pair(two: tuple[Kind, Kind]) -> Kind:
        return Kind(TUPLE[two[0].hint, two[1].hint], st.tuples(two[0].values, two[1].values).map(list))

    def union(two: tuple[Kind, Kind]) -> Kind:
        return Kind(UNION[two[0].hint, two[1].hint], two[0].values | two[1].values)

    return st.one_of(
        models(kinds),
        kinds.map(lambda one: Kind(LIST[one.hint], st.lists(one.values, max_size=2))),
        kinds.map(lambda one: Kind(UNION[one.hint, None], one.values | st.none())),
        st.tuples(kinds, kinds).map(pair),
        st.tuples(kinds, kinds).map(union),
    )


KINDS = st.recursive(st.sampled_from(LEAVES), composed, max_leaves=6)


def without(value: Any) -> Any:
    """The value as an agent's caller writes it: without the fields that are left out."""
    if isinstance(value, dict):
        return {key: without(inner) for key, inner in value.items() if inner != LEFT_OUT}
    return [without(inner) for inner in value] if isinstance(value, list) else value


def with_nulls(value: Any) -> Any:
    """The value as a model that is held to a strict schema writes it."""
    if isinstance(value, dict):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_nulls(inner) for inner in value]
    return None if value == LEFT_OUT else value


@given(KINDS, st.data())
def test_any_type_makes_a_tool_and_comes_back(kind: Kind, data: st.DataObject) -> None:
    """What the agent takes fits its tool's schema, and is unwrapped to what it was."""
    takes = schema_of(kind.hint)
    schema, value = input_schema(takes), without(data.draw(kind.values))
    arguments = {"value": value} if "value" in schema["properties"] else value
    Draft202012Validator(schema).validate(arguments)
    assert value == contract(takes).tool_input(arguments)


@given(KINDS | models(KINDS), st.data())
def test_any_strict_tool_passes_the_rules_and_comes_back(kind: Kind, data: st.DataObject) -> None:
    """Strict mode works or is refused; what it makes models write means to the agent what was meant."""
    takes = schema_of(kind.hint)
    try:
        schema = strict_schema(takes)
    except ValueError as refused:
        assert "Use strict=False" in str(refused)  # noqa: PT017 - a refusal is one of two right answers
        return
    value = data.draw(kind.values)
    arguments = with_nulls({"value": value} if "value" in schema["properties"] else value)
    Draft202012Validator(schema).validate(arguments)
    payload = contract(takes).tool_input(arguments)
    adapter = TypeAdapter(kind.hint)
    assert adapter.validate_python(without(value)) == adapter.validate_python(payload)
