"""Compatible contracts: values of the old models are valid for the new models, as pydantic validates them."""

from datetime import UTC, date, datetime
from typing import Annotated, Any, Literal

from hypothesis import given
from hypothesis import strategies as st
from openagentmesh.protocol.schema_diff import breaking_changes
from pydantic import Field, JsonValue, TypeAdapter

from tests.support.schemas import (
    JSON,
    Cat,
    Pet,
    at_least,
    contract,
    input_changes,
    model,
    output_changes,
    schema_of,
)

INTEGERS = st.integers(-5, 5)
TEXT = st.text("ab", max_size=3)
# Annotations, each with JSON values that it accepts.
FIELDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, TEXT),
    (int, INTEGERS),
    (float, INTEGERS | st.floats(-5, 5)),
    (bool, st.booleans()),
    (str | None, TEXT | st.none()),
    (int | str, INTEGERS | TEXT),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (at_least(2), st.text("ab", min_size=2, max_size=3)),
    (Annotated[str, Field(max_length=2, pattern="^a*$")], st.text("a", max_size=2)),
    (Annotated[int, Field(ge=0, lt=4)], st.integers(0, 3)),
    (Annotated[float, Field(gt=0)], st.floats(0.1, 5)),
    (date, st.dates().map(date.isoformat)),
    (datetime, st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)),
    (list[int], st.lists(INTEGERS, max_size=3)),
    (
        Annotated[list[int | None], Field(min_length=1)],
        st.lists(INTEGERS | st.none(), min_size=1, max_size=3),
    ),
    (tuple[int, str], st.tuples(INTEGERS, TEXT).map(list)),
    (dict[str, int], st.dictionaries(TEXT, INTEGERS, max_size=2)),
    (dict[str, Any], st.dictionaries(TEXT, INTEGERS | TEXT, max_size=2)),
    (JsonValue, JSON.filter(lambda value: value == value)),  # noqa: PLR0124 - NaN is not JSON
    (Cat, st.fixed_dictionaries({"kind": st.just("cat"), "lives": INTEGERS})),
    (Pet, st.just({"kind": "dog"}) | st.fixed_dictionaries({"kind": st.just("cat"), "lives": INTEGERS})),
    (model(a=(int, 0)), st.fixed_dictionaries({}, optional={"a": INTEGERS})),
]
# Fields of a model: an index into FIELDS, and whether the field is required, by name.
Shape = dict[str, tuple[int, bool]]
SHAPES: st.SearchStrategy[Shape] = st.dictionaries(
    st.sampled_from("xyz"), st.tuples(st.integers(0, len(FIELDS) - 1), st.booleans()), max_size=3
)
EXTRA = st.sampled_from(["forbid", "ignore", None])


def model_of(shape: Shape, extra: Any) -> Any:
    """A model of these fields."""
    # The default is not validated, so None fits every annotation.
    definitions: dict[str, Any] = {
        name: (FIELDS[index][0], ... if required else None) for name, (index, required) in shape.items()
    }
    return model(extra=extra, **definitions)


def values(shape: Shape) -> st.SearchStrategy[Any]:
    """JSON objects that the model of a shape accepts."""
    required = {name: FIELDS[index][1] for name, (index, is_required) in shape.items() if is_required}
    optional = {name: FIELDS[index][1] for name, (index, is_required) in shape.items() if not is_required}
    return st.fixed_dictionaries(required, optional=optional)


@given(SHAPES, SHAPES, EXTRA, EXTRA, st.data())
def test_compatible_models_accept_each_others_values(
    old: Shape, new: Shape, old_extra: Any, new_extra: Any, data: st.DataObject
) -> None:
    """Without a change, the new model validates every old input, and the old model every new output."""
    before, after = model_of(old, old_extra), model_of(new, new_extra)
    if not input_changes(before, after):
        after.model_validate(data.draw(values(old)))
    if not output_changes(before, after):
        before.model_validate(data.draw(values(new)))


@given(st.sampled_from(FIELDS), st.sampled_from(FIELDS), st.data())
def test_compatible_annotations_accept_each_others_values(
    old: tuple[Any, st.SearchStrategy[Any]], new: tuple[Any, st.SearchStrategy[Any]], data: st.DataObject
) -> None:
    """Without a change, the new annotation validates every old input, of objects and of all other types."""
    if not input_changes(old[0], new[0]):
        TypeAdapter(new[0]).validate_python(data.draw(old[1]))


@given(SHAPES, EXTRA)
def test_a_contract_is_compatible_with_itself(shape: Shape, extra: Any) -> None:
    """An agent that is declared again, or with another description, has no breaking changes."""
    first, second = (contract(*[model_of(shape, extra)] * 2) for _ in range(2))
    assert [] == breaking_changes(first, second)
    described = {**schema_of(model_of(shape, extra)), "description": "Another description."}
    assert [] == breaking_changes(first, contract(described, described))
