"""Breaking changes between two contracts: which changes break callers, and how they are reported."""

import copy
from datetime import date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from openagentmesh.protocol.schema_diff import Change, breaking_changes
from pydantic import Field, JsonValue, SecretStr

from tests.support.schemas import (
    ABSENT,
    Cat,
    Dog,
    Kennel,
    Pet,
    TextCat,
    TextKennel,
    TextPet,
    TextTree,
    Tree,
    at_least,
    contract,
    input_changes,
    model,
    output_changes,
    schema_of,
)

StartsA = Annotated[str, Field(pattern="^a")]
StartsB = Annotated[str, Field(pattern="^b")]

# A type, a wider type, the change from the wider type, and the change to it where that one breaks.
NARROWER = [
    (int, float, "'x': float became int", "'x': int became float"),
    (str, str | None, "'x': str | None became str", "'x': str became str | None"),
    (str, str | int, "'x': str | int became str", "'x': str became str | int"),
    (Literal["a"], Literal["a", "b"], "'x': 'a' | 'b' became 'a'", "'x': 'a' became 'a' | 'b'"),
    (Literal["a"], str, "'x': str became 'a'", "'x': 'a' became str"),
    (Literal[1], Literal["a", 1], "'x': 'a' | 1 became 1", "'x': 1 became 'a' | 1"),
    (int, JsonValue, "'x': any became int", "'x': int became any"),
    (at_least(3), at_least(1), "'x': minLength 1 became minLength 3", "'x': minLength 3 became minLength 1"),
    (at_least(3), str, "'x': minLength 3 was added", "'x': minLength 3 was removed"),
    (
        Annotated[int, Field(gt=0)],
        Annotated[int, Field(ge=0)],
        "'x': minimum 0 became exclusiveMinimum 0",
        "'x': exclusiveMinimum 0 became minimum 0",
    ),
    (
        Annotated[int, Field(le=5)],
        Annotated[int, Field(lt=9)],
        "'x': exclusiveMaximum 9 became maximum 5",
        "'x': maximum 5 became exclusiveMaximum 9",
    ),
    (StartsA, str, "'x': pattern ^a was added", "'x': pattern ^a was removed"),
    (datetime, str, "'x': format date-time was added", "'x': format date-time was removed"),
    (set[int], list[int], "'x': uniqueItems True was added", "'x': uniqueItems True was removed"),
    (list[int], list[int | str], "'x[]': int | str became int", "'x[]': int became int | str"),
    (
        Annotated[list[int], Field(max_length=3)],
        list[int],
        "'x': maxItems 3 was added",
        "'x': maxItems 3 was removed",
    ),
    (tuple[int, int], tuple[int, float], "'x[1]': float became int", "'x[1]': int became float"),
    (dict[str, int], dict[str, float], "'x.*': float became int", "'x.*': int became float"),
    (dict[str, int], dict[str, Any], "'x.*': any became int", "'x.*': int became any"),
    (
        dict[Literal["a"], int],
        dict[Literal["a", "b"], int],
        "'x.*': 'a' | 'b' became 'a'",
        "'x.*': 'a' became 'a' | 'b'",
    ),
    (dict[StartsA, int], dict[StartsA, float], "'x.{^a}': float became int", "'x.{^a}': int became float"),
    (list[Cat], list[Cat | None], "'x[]': Cat | None became Cat", "'x[]': Cat became Cat | None"),
    (Cat, Pet, "'x': Cat | Dog became Cat", "'x': Cat became Cat | Dog"),
    (
        {"anyOf": [{"const": 1}, {"const": 2}]},
        {"enum": [1, 2, 3]},
        "'x': 1 | 2 | 3 became 1 | 2",
        "'x': 1 | 2 became 1 | 2 | 3",
    ),
    (
        {"type": "string"},
        {"type": ["string", "null"]},
        "'x': str | None became str",
        "'x': str became str | None",
    ),
    ({"type": "string"}, True, "'x': any became str", "'x': str became any"),
    (
        {"allOf": [{"type": "string"}, {"minLength": 2}]},
        {"type": "string"},
        "'x': minLength 2 was added",
        "'x': minLength 2 was removed",
    ),
]  # fmt: skip


def field(hint: Any) -> dict[str, Any]:
    """The schema of an object with one required field `x`, with the field's definitions at its root."""
    schema = hint if isinstance(hint, bool) else schema_of(hint)
    definitions = {"$defs": schema.pop("$defs")} if isinstance(schema, dict) and "$defs" in schema else {}
    return {"type": "object", "title": "M", "properties": {"x": schema}, "required": ["x"], **definitions}


@pytest.mark.parametrize(("narrow", "wide", "narrowed", "widened"), NARROWER)
def test_an_input_may_widen_and_an_output_may_narrow(
    narrow: Any, wide: Any, narrowed: str, widened: str
) -> None:
    """A wider input and a narrower output are compatible; a narrower input and a wider output are not."""
    narrow, wide = field(copy.deepcopy(narrow)), field(copy.deepcopy(wide))
    assert [] == input_changes(narrow, wide)
    assert [f"input {narrowed}"] == input_changes(wide, narrow)
    assert [] == output_changes(wide, narrow)
    assert [f"output {widened}"] == output_changes(narrow, wide)


@pytest.mark.parametrize(
    ("one", "other", "change"),
    [
        (str, int, "'x': str became int"),
        (bool, int, "'x': bool became int"),
        (str | None, int, "'x': str | None became int"),
        (Literal[True], Literal[1], "'x': True became 1"),
        (StartsA, StartsB, "'x': pattern ^a became pattern ^b"),
        (datetime, date, "'x': format date-time became format date"),
        (Pet, TextPet, "'x.lives': int became str"),
        (Cat | None, TextCat | None, "'x.lives': int became str"),
        (list[str], dict[str, str], "'x': list became object"),
        (Kennel | None, TextKennel | None, "'x.dogs': int became str"),
        (list[Pet], list[TextPet], "'x[].lives': int became str"),
    ],
)  # fmt: skip
def test_a_different_type_breaks_in_both_directions(one: Any, other: Any, change: str) -> None:
    """A type that is neither narrower nor wider breaks callers, in the input and in the output."""
    one, other = field(one), field(other)
    assert [f"input {change}"] == input_changes(one, other)
    assert [f"output {change}"] == output_changes(one, other)


SELF_REFERENCE = {
    "$ref": "#/$defs/a",
    "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}]}},
}


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (str | int, int | str),
        (Literal["a", "b"], Literal["b", "a"]),
        (SecretStr, str),
        (bytes, str),
        (Decimal, Decimal | str),
        (Cat | Dog, Pet),
        (at_least(0), str),
        (
            {"allOf": [{"type": "array", "items": {"type": "number"}}, {"items": {"type": "integer"}}]},
            list[int],
        ),
        ({"allOf": [{"type": "number"}, {"type": "integer"}]}, int),
        (SELF_REFERENCE, int),
        (Annotated[int, Field(title="T", description="d", examples=[1])], int),
        ({"enum": ["a", "b"]}, {"oneOf": [{"const": "a"}, {"const": "b", "type": "string"}]}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, {"allOf": [{"type": "string"}]}),
        ({"$ref": "https://elsewhere/a"}, {"$ref": "https://elsewhere/b"}),
    ],
)
def test_equivalent_schemas_have_no_changes(one: Any, other: Any) -> None:
    """Order, titles, descriptions and equivalent notations are no breaking changes."""
    one, other = field(one), field(other)
    assert [] == input_changes(one, other) + input_changes(other, one)
    assert [] == output_changes(one, other) + output_changes(other, one)


ALL_OF = {
    "allOf": [
        {"properties": {"a": {"type": "number"}}, "required": ["a"]},
        {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]},
    ]
}
A_AND_B = {"properties": {"a": {"type": "integer"}, "b": True}, "required": ["a", "b"]}


@pytest.mark.parametrize(
    ("old", "new", "input_change", "output_change"),
    [
        (model(a=str), model(a=str, b=int), "'b': required int was added", None),
        (model(a=str), model(a=str, b=(int, 0)), None, None),
        (model(a=str, b=int), model(a=str), None, "'b': required int was removed"),
        (model(a=str, b=(int, 0)), model(a=str), None, "'b': optional int was removed"),
        (model(a=(str, "")), model(a=str), "'a': optional str became required str", None),
        (model(a=str), model(a=(str, "")), None, "'a': required str became optional str"),
        (model(a=str, b=(int, 0)), model(extra="forbid", a=str), *["'b': optional int was removed"] * 2),
        (model(extra="forbid", a=str), model(a=str, b=(int, 0)), None, "'b': optional int was added"),
        (model(extra="allow", a=str), model(extra="forbid", a=str), "'*': any was removed", None),
        (model(a=str), model(extra="allow", a=str), None, None),
        (dict[str, int], model(a=(str, "")), "'a': int became str", "'a': int became str"),
        (model(a=str), dict[str, int], "'a': str became int", "'a': required str was removed"),
        (model(a=str), dict[str, Any], None, "'a': required str was removed"),
        (model(a=(str, "")), model(), None, "'a': optional str was removed"),
        (model(p=Pet), model(p=TextPet), "'p.lives': int became str", "'p.lives': int became str"),
        (model(p=Pet), model(p=Cat), "'p': Cat | Dog became Cat", None),
        ({"type": "object"}, dict[str, int], "'*': any became int", None),
        ({"type": "object"}, {"type": "object", "required": ["a"]}, "'a': required any was added", None),
        (ALL_OF, A_AND_B, None, None),
        (A_AND_B, ALL_OF, None, None),
        (ALL_OF, A_AND_B | {"required": ["a"]}, None, "'b': required any became optional any"),
    ],
)  # fmt: skip
def test_added_and_removed_fields(
    old: Any, new: Any, input_change: str | None, output_change: str | None
) -> None:
    """An input may lose fields and gain optional ones; an output may gain fields and lose none."""
    assert [f"input {input_change}"] * bool(input_change) == input_changes(old, new)
    assert [f"output {output_change}"] * bool(output_change) == output_changes(old, new)


def test_a_tuple_is_compatible_with_a_list() -> None:
    """A list accepts every tuple of its items; a tuple rejects lists of other lengths."""
    assert [] == input_changes(tuple[int, int], list[int])
    assert ["input: minItems 2 was added", "input: maxItems 2 was added"] == input_changes(
        list[int], tuple[int, int]
    )


def test_any_alternative_of_a_union_may_accept_the_value() -> None:
    """A value that another alternative accepts breaks nothing, though the one with its title changed."""
    renamed = {
        "anyOf": [{**schema_of(TextKennel), "title": "Kennel"}, {**schema_of(Kennel), "title": "Other"}]
    }
    assert [] == input_changes(Kennel, renamed)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (ABSENT, model(a=str), ["input 'a': required str was added"]),
        (ABSENT, model(a=(str, "")), []),
        (ABSENT, dict[str, int], []),
        (ABSENT, JsonValue, []),
        (ABSENT, str, ["input: nothing became str"]),
        (model(a=str), ABSENT, []),
        (str, ABSENT, []),
        (ABSENT, ABSENT, []),
    ],
)
def test_an_added_or_removed_input(old: Any, new: Any, changes: list[str]) -> None:
    """Callers that send no payload still work if the new input accepts an empty object."""
    assert changes == input_changes(old, new)


@pytest.mark.parametrize(
    ("old", "new", "changes"),
    [
        (ABSENT, str, []),
        (str, ABSENT, ["output: str became nothing"]),
        (model(a=str), ABSENT, ["output 'a': required str was removed"]),
        (model(a=(str, "")), ABSENT, ["output 'a': optional str was removed"]),
        (ABSENT, ABSENT, []),
    ],
)
def test_an_added_or_removed_output(old: Any, new: Any, changes: list[str]) -> None:
    """An added output is compatible; a removed one breaks callers."""
    assert changes == output_changes(old, new)


@pytest.mark.parametrize(
    ("old", "new", "change"),
    [
        ((True, False), (True, True), "kind: responder became streamer"),
        ((True, False), (False, True), "kind: responder became publisher"),
        ((False, True), (False, False), "kind: publisher became background task"),
    ],
)
def test_a_change_of_the_kind_is_reported_alone(
    old: tuple[bool, bool], new: tuple[bool, bool], change: str
) -> None:
    """Each kind of agent has other verbs, so changes of the schemas are not reported in addition."""
    before = contract(str, str, invocable=old[0], streaming=old[1])
    after = contract(int, int, invocable=new[0], streaming=new[1])
    assert [change] == [str(found) for found in breaking_changes(before, after)]


def test_a_recursive_model_is_compared_once() -> None:
    """The comparison of a schema that refers to itself ends, and reports changes at the root and below."""
    found = input_changes(Tree, TextTree)
    assert ["input 'value': int became str", "input 'children[].value': int became str"] == found
    assert [] == input_changes(Tree, {**schema_of(Tree), "description": "new"})


def test_a_change_has_structured_fields_and_one_line_of_text() -> None:
    """A change has its part, path, old and new value; control characters in names are escaped."""
    old = contract({"properties": {"a\n\x1b": {"type": "integer"}}}, Kennel)
    new = contract({"properties": {"a\n\x1b": {"type": "string"}}}, TextKennel)
    assert [
        Change("input", r"a\n\x1b", "int", "str"),
        Change("output", "dogs", "int", "str"),
    ] == breaking_changes(old, new)
    assert "chunk: cannot be compared" == str(Change("chunk", "", "", ""))
