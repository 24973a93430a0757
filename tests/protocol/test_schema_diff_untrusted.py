"""Schemas of other peers: any JSON is compared, in bounded time and with a bounded result."""

import time
from typing import Any

import pytest
from hypothesis import example, given
from openagentmesh.protocol.schema_diff import breaking_changes

from tests.support.schemas import JSON, Tree, contract, input_changes, output_changes

MAX_CHANGES = 20
STRING: dict[str, Any] = {"type": "string"}


def branching(leaf: dict[str, Any], *, union: bool) -> dict[str, Any]:
    """A small document that expands to a tree of 2^60 nodes."""
    definitions: dict[str, Any] = {"n60": leaf}
    for depth in range(60):
        child = {"$ref": f"#/$defs/n{depth + 1}"}
        node: dict[str, Any] = {"required": ["a"], "properties": {"a": child, "b": child}}
        definitions[f"n{depth}"] = {"anyOf": [node, {"type": "array", "items": child}]} if union else node
    return {"$ref": "#/$defs/n0", "$defs": definitions}


def nested(depth: int, key: str, innermost: Any) -> dict[str, Any]:
    """A schema in a schema, `depth` times."""
    for _ in range(depth):
        innermost = {key: [innermost] if key.endswith("Of") else innermost}
    return {"type": "array", **innermost}


def test_a_schema_that_is_nested_too_deeply_cannot_be_compared() -> None:
    """The comparison is reported as impossible, since there may be a breaking change."""
    old, new = (nested(150, "items", {"type": name}) for name in ("string", "integer"))
    assert ["input: cannot be compared"] == input_changes(old, new)


def test_the_number_and_length_of_changes_are_bounded() -> None:
    """Two contracts with nothing in common have at most 20 changes of at most 200 characters."""
    old, new = (
        {"properties": {f"{'n' * 500}{i}": {"type": name} for i in range(500)}} for name in ("string", "null")
    )
    found = breaking_changes(contract(old, old), contract(new, new))
    assert MAX_CHANGES == len(found)
    assert all(len(str(change)) < 200 for change in found)


HOSTILE: list[tuple[Any, Any]] = [
    (branching(STRING, union=False), branching(STRING | {"title": "x"}, union=False)),
    (branching(STRING, union=True), branching({"type": "integer"}, union=True)),
    (nested(20_000, "items", STRING), nested(20_001, "items", STRING)),
    (nested(20_000, "anyOf", STRING), {}),
    ({}, nested(20_000, "allOf", STRING)),
    ({"allOf": [{"anyOf": [{"minLength": i} for i in range(10)]}] * 10}, STRING),
    ({"enum": list(range(100_000))}, {"anyOf": [{"const": i} for i in range(100_000)]}),
    ({"anyOf": [{"required": [f"{i}"]} for i in range(5000)]}, {"anyOf": [{"required": ["x"]}] * 5000}),
    ({"enum": ["x" * 1_000_000]}, {"enum": ["y" * 1_000_000]}),
    ({"$ref": "#" + "/x" * 500_000}, STRING),
    ({"type": "integer"}, {"type": "integer", "minimum": 10**5000}),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_a_hostile_schema_is_compared_in_bounded_time(old: Any, new: Any) -> None:
    """A comparison that would take too long is abandoned and reported as a change."""
    start = time.perf_counter()
    found = input_changes(old, new) + input_changes(new, old)
    assert time.perf_counter() - start < 5
    assert all("cannot be compared" in change or "became" in change for change in found)


@pytest.mark.parametrize("malformed", [[], [STRING], "x", {"$ref": "#/x"}, {"$ref": 5}, {"properties": [1]}])
def test_a_malformed_schema_accepts_any_value(malformed: Any) -> None:
    """It breaks no caller, whether it is the schema of the input or of the output."""
    schema = {"type": "object", "properties": {"value": malformed}}
    assert [] == input_changes(Tree, schema)
    assert [] == output_changes(
        {"properties": {"value": malformed}}, {"properties": {"value": malformed}, "x": 1}
    )


@given(JSON, JSON)
@example(
    {"type": ["a", []], "enum": [[{}], {}], "required": [[], {}]},
    {"maximum": True, "minLength": float("nan")},
)
def test_any_json_can_be_compared(old: Any, new: Any) -> None:
    """Any two JSON values have a bounded number of printable changes; equal ones have none."""
    before, after = (
        contract().model_copy(update={"input_schema": schema, "output_schema": schema})
        for schema in (old, new)
    )
    found = breaking_changes(before, after)
    assert len(found) <= MAX_CHANGES
    assert all(str(change).isprintable() for change in found)
    assert [] == breaking_changes(before, before) + breaking_changes(after, after)
