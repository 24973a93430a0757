"""Which changes from one contract to another callers notice, and how they are told."""

import copy
import time
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Annotated, Any, Literal

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from openagentmesh import AgentContract, AgentSpec
from openagentmesh.protocol.schema_diff import Change, breaking_changes
from pydantic import BaseModel, ConfigDict, Field, JsonValue, SecretStr, TypeAdapter, create_model

ABSENT: Any = object()
MOST_CHANGES = 20


def schema_of(of: Any) -> Any:
    """A schema from what an author would annotate; a schema or junk stands for itself."""
    return (
        None if of is ABSENT else of if isinstance(of, list | dict | str) else TypeAdapter(of).json_schema()
    )


def contract(
    takes: Any = ABSENT,
    gives: Any = ABSENT,
    chunk: Any = ABSENT,
    *,
    invocable: bool = True,
    streaming: bool = False,
) -> AgentContract:
    return AgentContract.declare(
        AgentSpec(name="a"),
        invocable=invocable,
        streaming=streaming,
        input_schema=schema_of(takes),
        output_schema=schema_of(gives),
        chunk_schema=schema_of(chunk),
    )


def model(*, extra: Literal["allow", "forbid", "ignore"] | None = None, **fields: Any) -> Any:
    """A model with these fields; a tuple is an annotation and a default."""
    found: Any = {key: of if isinstance(of, tuple) else (of, ...) for key, of in fields.items()}
    config = ConfigDict(extra=extra) if extra else None
    made: Any = create_model("M", __config__=config, **found)
    return made


def input_changes(old: Any, new: Any) -> list[str]:
    return [str(change) for change in breaking_changes(contract(takes=old), contract(takes=new))]


def output_changes(old: Any, new: Any) -> list[str]:
    """The changes of an output, which a chunk must have too."""
    found = breaking_changes(contract(gives=old), contract(gives=new))
    chunks = breaking_changes(contract(chunk=old, streaming=True), contract(chunk=new, streaming=True))
    assert [str(change) for change in chunks] == [
        str(change).replace("output", "chunk", 1) for change in found
    ]
    return [str(change) for change in found]


def at_least(length: int) -> Any:
    return Annotated[str, Field(min_length=length)]


class Cat(BaseModel):
    kind: Literal["cat"]
    lives: int


class TextCat(BaseModel):
    model_config = ConfigDict(title="Cat")
    kind: Literal["cat"]
    lives: str


class Dog(BaseModel):
    kind: Literal["dog"]


class Kennel(BaseModel):
    dogs: int


class TextKennel(BaseModel):
    dogs: str


Pet = Annotated[Cat | Dog, Field(discriminator="kind")]
TextPet = Annotated[TextCat | Dog, Field(discriminator="kind")]
StartsA = Annotated[str, Field(pattern="^a")]
StartsB = Annotated[str, Field(pattern="^b")]


class Tree(BaseModel):
    value: int
    children: list["Tree"] = []


class TextTree(BaseModel):
    value: str
    children: list["TextTree"] = []


# What is narrower, what is wider, how narrowing is told, and how widening is told when it breaks.
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


def field(of: Any) -> dict[str, Any]:
    """An object with one required field `x`, its schema's definitions where they belong."""
    of = of if isinstance(of, bool) else schema_of(of)
    definitions = {"$defs": of.pop("$defs")} if isinstance(of, dict) and "$defs" in of else {}
    return {"type": "object", "title": "M", "properties": {"x": of}, "required": ["x"], **definitions}


@pytest.mark.parametrize(("narrow", "wide", "narrowed", "widened"), NARROWER)
def test_an_input_may_widen_and_an_output_may_narrow(
    narrow: Any, wide: Any, narrowed: str, widened: str
) -> None:
    """What every old caller sends stays valid, and so does what it gets: the other way round breaks it."""
    narrow, wide = field(copy.deepcopy(narrow)), field(copy.deepcopy(wide))
    assert [] == input_changes(narrow, wide)
    assert [f"input {narrowed}"] == input_changes(wide, narrow)
    assert [] == output_changes(wide, narrow)
    assert [f"output {widened}"] == output_changes(narrow, wide)


@pytest.mark.parametrize(
    ("one", "other", "said"),
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
def test_another_type_breaks_both_ways(one: Any, other: Any, said: str) -> None:
    """What is neither narrower nor wider breaks whoever sends it and whoever gets it."""
    one, other = field(one), field(other)
    assert [f"input {said}"] == input_changes(one, other)
    assert [f"output {said}"] == output_changes(one, other)


ITSELF = {"$ref": "#/$defs/a", "$defs": {"a": {"anyOf": [{"$ref": "#/$defs/a"}, {"type": "integer"}]}}}


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
        (ITSELF, int),
        (Annotated[int, Field(title="T", description="d", examples=[1])], int),
        ({"enum": ["a", "b"]}, {"oneOf": [{"const": "a"}, {"const": "b", "type": "string"}]}),
        ({"$ref": "#/$defs/a", "$defs": {"a": {"type": "string"}}}, {"allOf": [{"type": "string"}]}),
        ({"$ref": "https://elsewhere/a"}, {"$ref": "https://elsewhere/b"}),
    ],
)
def test_what_only_looks_different_breaks_nobody(one: Any, other: Any) -> None:
    """Order, words, and another way to write the same are no change."""
    one, other = field(one), field(other)
    assert [] == input_changes(one, other) + input_changes(other, one)
    assert [] == output_changes(one, other) + output_changes(other, one)


BOTH = {
    "allOf": [
        {"properties": {"a": {"type": "number"}}, "required": ["a"]},
        {"properties": {"a": {"type": "integer"}, "b": {}}, "required": ["b"]},
    ]
}
A_AND_B = {"properties": {"a": {"type": "integer"}, "b": True}, "required": ["a", "b"]}


@pytest.mark.parametrize(
    ("old", "new", "takes", "gives"),
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
        (BOTH, A_AND_B, None, None),
        (A_AND_B, BOTH, None, None),
        (BOTH, A_AND_B | {"required": ["a"]}, None, "'b': required any became optional any"),
    ],
)  # fmt: skip
def test_fields_that_come_and_go(old: Any, new: Any, takes: str | None, gives: str | None) -> None:
    """An input may lose fields and gain optional ones; an output may gain fields and lose none."""
    assert [f"input {takes}"] * bool(takes) == input_changes(old, new)
    assert [f"output {gives}"] * bool(gives) == output_changes(old, new)


def test_a_tuple_is_a_list() -> None:
    """No more items than it has are looked at; a list is no tuple, for it may have any number of them."""
    assert [] == input_changes(tuple[int, int], list[int])
    assert ["input: minItems 2 was added", "input: maxItems 2 was added"] == input_changes(
        list[int], tuple[int, int]
    )


def test_any_alternative_will_do() -> None:
    """What another takes in its place is still taken, whatever became of the one with its name."""
    renamed = {
        "anyOf": [{**schema_of(TextKennel), "title": "Kennel"}, {**schema_of(Kennel), "title": "Other"}]
    }
    assert [] == input_changes(Kennel, renamed)


@pytest.mark.parametrize(
    ("old", "new", "said"),
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
def test_an_input_that_comes_or_goes(old: Any, new: Any, said: list[str]) -> None:
    """Who sent nothing, or did not say what, can go on when an empty object will do."""
    assert said == input_changes(old, new)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        (ABSENT, str, []),
        (str, ABSENT, ["output: str became nothing"]),
        (model(a=str), ABSENT, ["output 'a': required str was removed"]),
        (model(a=(str, "")), ABSENT, ["output 'a': optional str was removed"]),
        (ABSENT, ABSENT, []),
    ],
)
def test_an_output_that_comes_or_goes(old: Any, new: Any, said: list[str]) -> None:
    """Nobody counts on an output that was not promised; one that is gone is missed."""
    assert said == output_changes(old, new)


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ((True, False), (True, True), "kind: responder became streamer"),
        ((True, False), (False, True), "kind: responder became publisher"),
        ((False, True), (False, False), "kind: publisher became background task"),
    ],
)
def test_another_kind_of_agent_is_the_one_change(
    old: tuple[bool, bool], new: tuple[bool, bool], said: str
) -> None:
    """Nothing that a caller does with one kind works with another, so nothing else is told."""
    before = contract(str, str, invocable=old[0], streaming=old[1])
    after = contract(int, int, invocable=new[0], streaming=new[1])
    assert [said] == [str(change) for change in breaking_changes(before, after)]


def test_a_recursive_model_is_compared_once_around() -> None:
    """A schema that refers to itself ends, and its changes are found in it and below."""
    found = input_changes(Tree, TextTree)
    assert ["input 'value': int became str", "input 'children[].value': int became str"] == found
    assert [] == input_changes(Tree, {**schema_of(Tree), "description": "new"})


def test_a_change_is_data_and_a_sentence() -> None:
    """A program sees what, where, from and to; a person reads one line, whatever a stranger named things."""
    old = contract({"properties": {"a\n\x1b": {"type": "integer"}}}, Kennel)
    new = contract({"properties": {"a\n\x1b": {"type": "string"}}}, TextKennel)
    assert [
        Change("input", r"a\n\x1b", "int", "str"),
        Change("output", "dogs", "int", "str"),
    ] == breaking_changes(old, new)
    assert "chunk: cannot be compared" == str(Change("chunk", "", "", ""))


def test_what_is_nested_too_deeply_is_given_up() -> None:
    """It is a change that says so, for it may be one."""
    old, new = (nested(150, "items", {"type": of}) for of in ("string", "integer"))
    assert ["input: cannot be compared"] == input_changes(old, new)


def test_the_changes_are_bounded() -> None:
    """Two contracts that have nothing in common do not fill a log."""
    old, new = (
        {"properties": {f"{'n' * 500}{i}": {"type": of} for i in range(500)}} for of in ("string", "null")
    )
    found = breaking_changes(contract(takes=old, gives=old), contract(takes=new, gives=new))
    assert MOST_CHANGES == len(found)
    assert all(len(str(change)) < 200 for change in found)


def branching(leaf: dict[str, Any], *, union: bool) -> dict[str, Any]:
    """A small document that stands for a tree of 2^60 nodes."""
    definitions: dict[str, Any] = {"n60": leaf}
    for at in range(60):
        below = {"$ref": f"#/$defs/n{at + 1}"}
        definitions[f"n{at}"] = {"required": ["a"], "properties": {"a": below, "b": below}}
        if union:
            definitions[f"n{at}"] = {"anyOf": [definitions[f"n{at}"], {"type": "array", "items": below}]}
    return {"$ref": "#/$defs/n0", "$defs": definitions}


def nested(depth: int, key: str, innermost: Any) -> dict[str, Any]:
    for _ in range(depth):
        innermost = {key: [innermost] if key.endswith("Of") else innermost}
    return {"type": "array", **innermost}


STRING: dict[str, Any] = {"type": "string"}
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
def test_a_hostile_schema_takes_no_time(old: Any, new: Any) -> None:
    """What would take for ever is given up, and that is told as a change."""
    began = time.perf_counter()
    found = input_changes(old, new) + input_changes(new, old)
    assert time.perf_counter() - began < 5
    assert all("cannot be compared" in change or "became" in change for change in found)


@pytest.mark.parametrize("broken", [[], [STRING], "x", {"$ref": "#/x"}, {"$ref": 5}, {"properties": [1]}])
def test_what_is_no_schema_is_any_value(broken: Any) -> None:
    """A stranger's broken schema takes everything that others send."""
    assert [] == input_changes(Tree, {"type": "object", "properties": {"value": broken}})
    assert [] == output_changes({"properties": {"value": broken}}, {"properties": {"value": broken}, "x": 1})


KEYS = st.sampled_from(
    [
        "$ref", "$defs", "a", "b", "type", "title", "enum", "const", "properties", "required", "items",
        "prefixItems", "additionalProperties", "patternProperties", "propertyNames", "anyOf", "oneOf",
        "allOf", "minLength", "maximum", "exclusiveMaximum", "maxItems", "pattern", "format", "uniqueItems",
    ]
)  # fmt: skip
WORDS = st.sampled_from(
    ["string", "object", "array", "integer", "number", "null", "a", "#/$defs/a", "#", "#/a"]
)
JSON: st.SearchStrategy[Any] = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | WORDS | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=25,
)


@given(JSON, JSON)
@example(
    {"type": ["a", []], "enum": [[{}], {}], "required": [[], {}]},
    {"maximum": True, "minLength": float("nan")},
)
def test_any_json_can_be_compared(old: Any, new: Any) -> None:
    """Whatever strangers publish as schemas, comparing them gives a few changes that can be printed."""
    before, after = (
        contract().model_copy(update={"input_schema": of, "output_schema": of}) for of in (old, new)
    )
    found = breaking_changes(before, after)
    assert len(found) <= MOST_CHANGES
    assert all(str(change).isprintable() for change in found)
    assert [] == breaking_changes(before, before) + breaking_changes(after, after)


WHOLE = st.integers(-5, 5)
TEXT = st.text("ab", max_size=3)
# Annotations with the JSON values that they take.
FIELDS: list[tuple[Any, st.SearchStrategy[Any]]] = [
    (str, TEXT),
    (int, WHOLE),
    (float, WHOLE | st.floats(-5, 5)),
    (bool, st.booleans()),
    (str | None, TEXT | st.none()),
    (int | str, WHOLE | TEXT),
    (Literal["a", "b"], st.sampled_from(["a", "b"])),
    (Literal["a", 1], st.sampled_from(["a", 1])),
    (at_least(2), st.text("ab", min_size=2, max_size=3)),
    (Annotated[str, Field(max_length=2, pattern="^a*$")], st.text("a", max_size=2)),
    (Annotated[int, Field(ge=0, lt=4)], st.integers(0, 3)),
    (Annotated[float, Field(gt=0)], st.floats(0.1, 5)),
    (date, st.dates().map(date.isoformat)),
    (datetime, st.datetimes(timezones=st.just(UTC)).map(datetime.isoformat)),
    (list[int], st.lists(WHOLE, max_size=3)),
    (Annotated[list[int | None], Field(min_length=1)], st.lists(WHOLE | st.none(), min_size=1, max_size=3)),
    (tuple[int, str], st.tuples(WHOLE, TEXT).map(list)),
    (dict[str, int], st.dictionaries(TEXT, WHOLE, max_size=2)),
    (dict[str, Any], st.dictionaries(TEXT, WHOLE | TEXT, max_size=2)),
    (JsonValue, JSON.filter(lambda found: found == found)),  # noqa: PLR0124 - NaN is no JSON
    (Cat, st.fixed_dictionaries({"kind": st.just("cat"), "lives": WHOLE})),
    (Pet, st.just({"kind": "dog"}) | st.fixed_dictionaries({"kind": st.just("cat"), "lives": WHOLE})),
    (model(a=(int, 0)), st.fixed_dictionaries({}, optional={"a": WHOLE})),
]
Shape = dict[str, tuple[int, bool]]
SHAPES: st.SearchStrategy[Shape] = st.dictionaries(
    st.sampled_from("xyz"), st.tuples(st.integers(0, len(FIELDS) - 1), st.booleans()), max_size=3
)
EXTRA = st.sampled_from(["forbid", "ignore", None])


def shaped(shape: Shape, extra: Any) -> Any:
    """A model of these fields, each required or not."""
    # A default that is not validated, for none fits all.
    annotations: dict[str, Any] = {
        name: (FIELDS[of][0], ... if required else None) for name, (of, required) in shape.items()
    }
    return model(extra=extra, **annotations)


def values(shape: Shape) -> st.SearchStrategy[Any]:
    needed = {name: FIELDS[of][1] for name, (of, required) in shape.items() if required}
    others = {name: FIELDS[of][1] for name, (of, required) in shape.items() if not required}
    return st.fixed_dictionaries(needed, optional=others)


@given(SHAPES, SHAPES, EXTRA, EXTRA, st.data())
def test_what_is_said_to_be_compatible_is(
    old: Shape, new: Shape, old_extra: Any, new_extra: Any, data: st.DataObject
) -> None:
    """Without a change, the new model validates every old input, and the old model every new output."""
    before, after = shaped(old, old_extra), shaped(new, new_extra)
    if not input_changes(before, after):
        after.model_validate(data.draw(values(old)))
    if not output_changes(before, after):
        before.model_validate(data.draw(values(new)))


@given(st.sampled_from(FIELDS), st.sampled_from(FIELDS), st.data())
def test_what_is_said_to_fit_fits(
    old: tuple[Any, st.SearchStrategy[Any]], new: tuple[Any, st.SearchStrategy[Any]], data: st.DataObject
) -> None:
    """The same of inputs that are no objects, so that more of the pairs are compatible."""
    if not input_changes(old[0], new[0]):
        TypeAdapter(new[0]).validate_python(data.draw(old[1]))


@given(SHAPES, EXTRA)
def test_no_contract_breaks_itself(shape: Shape, extra: Any) -> None:
    """Declared once more, an agent has changed for nobody."""
    first, again = (contract(*[shaped(shape, extra)] * 2) for _ in range(2))
    assert [] == breaking_changes(first, again)
    described = {**schema_of(shaped(shape, extra)), "description": "Reads better."}
    assert [] == breaking_changes(first, contract(described, described))
