"""Tools of generated types: a payload is valid for the tool's schema, and is decoded unchanged."""

from datetime import datetime
from itertools import count
from typing import Annotated, Any, Literal, NamedTuple, Union, cast

from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from pydantic import Field, TypeAdapter, ValidationError, create_model

from tests.support.tool_schemas import Colour, Place, Tree, contract, input_schema, schema_of, strict_schema


class Kind(NamedTuple):
    """A type and JSON values that it accepts, with OMITTED for each field that has its default."""

    hint: Any
    values: st.SearchStrategy[Any]


OMITTED = "\x00omitted"
NUMBERS = count()
# Generic types whose arguments are known only when a test runs.
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
    Kind(Place, st.fixed_dictionaries({"city": st.text(), "country": st.just(OMITTED)})),
    Kind(Tree, st.just({"name": "a", "children": [{"name": "b", "children": OMITTED}]})),
    Kind(dict[str, int], st.dictionaries(st.text(max_size=2), st.integers(0, 9), max_size=2)),
    Kind(Any, st.integers(0, 9)),
]


def accepts_none(hint: Any) -> bool:
    try:
        TypeAdapter(hint).validate_python(None)
    except ValidationError:
        return False
    return True


@st.composite
def models(draw: st.DrawFn, kinds: st.SearchStrategy[Kind]) -> Kind:
    """A model with some fields, each required or optional."""
    fields: dict[str, Any] = {}
    values = {}
    for kind in draw(st.lists(kinds, max_size=4)):
        name = f"f{next(NUMBERS)}"
        fields[name], values[name] = (kind.hint, ...), kind.values
        if draw(st.booleans()):
            default = without_omitted(draw(kind.values))
            fields[name] = (kind.hint, TypeAdapter(kind.hint).validate_python(default))
            # A constant is never omitted, and an accepted null does not mean omitted.
            if not accepts_none(kind.hint) and kind.hint != Literal["only"]:
                values[name] |= st.just(OMITTED)
    return Kind(create_model(f"M{next(NUMBERS)}", **fields), st.fixed_dictionaries(values))


def composed(kinds: st.SearchStrategy[Kind]) -> st.SearchStrategy[Kind]:
    """Models, lists, unions and tuples of these kinds."""

    def pair(members: tuple[Kind, Kind]) -> Kind:
        first, second = members
        return Kind(TUPLE[first.hint, second.hint], st.tuples(first.values, second.values).map(list))

    def union(members: tuple[Kind, Kind]) -> Kind:
        first, second = members
        return Kind(UNION[first.hint, second.hint], first.values | second.values)

    return st.one_of(
        models(kinds),
        kinds.map(lambda kind: Kind(LIST[kind.hint], st.lists(kind.values, max_size=2))),
        kinds.map(lambda kind: Kind(UNION[kind.hint, None], kind.values | st.none())),
        st.tuples(kinds, kinds).map(pair),
        st.tuples(kinds, kinds).map(union),
    )


KINDS = st.recursive(st.sampled_from(LEAVES), composed, max_leaves=6)


def without_omitted(value: Any) -> Any:
    """The value as a caller sends it: without the omitted fields."""
    if isinstance(value, dict):
        return {key: without_omitted(inner) for key, inner in value.items() if inner != OMITTED}
    return [without_omitted(inner) for inner in value] if isinstance(value, list) else value


def with_nulls(value: Any) -> Any:
    """The value as a model sends it to a strict tool: with null for each omitted field."""
    if isinstance(value, dict):
        return {key: with_nulls(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [with_nulls(inner) for inner in value]
    return None if value == OMITTED else value


@given(KINDS, st.data())
def test_any_type_is_a_tool_and_its_payload_is_decoded(kind: Kind, data: st.DataObject) -> None:
    """A payload is valid for the tool's schema, and is decoded unchanged."""
    agent_schema = schema_of(kind.hint)
    schema, value = input_schema(agent_schema), without_omitted(data.draw(kind.values))
    arguments = {"value": value} if "value" in schema["properties"] else value
    Draft202012Validator(schema).validate(arguments)
    assert value == contract(agent_schema).tool_input(arguments)


@given(KINDS | models(KINDS), st.data())
def test_any_type_is_a_strict_tool_or_is_rejected(kind: Kind, data: st.DataObject) -> None:
    """A strict tool complies with the rules, and its arguments are decoded to an equal value."""
    agent_schema = schema_of(kind.hint)
    try:
        schema = strict_schema(agent_schema)
    except ValueError as exc:
        assert "Use strict=False" in str(exc)  # noqa: PT017 - a rejection is one of two correct results
        return
    value = data.draw(kind.values)
    arguments = with_nulls({"value": value} if "value" in schema["properties"] else value)
    Draft202012Validator(schema).validate(arguments)
    payload = contract(agent_schema).tool_input(arguments)
    adapter = TypeAdapter(kind.hint)
    assert adapter.validate_python(without_omitted(value)) == adapter.validate_python(payload)
