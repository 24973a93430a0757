"""Handlers: their kinds and types, and the encoding of inputs and results."""

import json
import math
import warnings
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial, wraps
from typing import Annotated, Any, Literal

import pytest
from openagentmesh import AgentMesh, AgentSpec, HandlerError, InvalidAgent, InvalidInput, KVEntry
from openagentmesh.agent.agent import AgentVersion, declare
from openagentmesh.agent.handler import TypeCache
from pydantic import BaseModel, Field, field_validator
from pydantic_core import PydanticCustomError


class In(BaseModel):
    text: str


class Out(BaseModel):
    length: int = 0


class Odd(BaseModel):
    n: int

    @field_validator("n")
    @classmethod
    def odd(cls, n: int) -> int:
        if n == 0:
            raise PydanticCustomError("zero", "is zero", {"what": object()})
        if n % 2 == 0:
            raise ValueError("is even")
        return n


Handler = Callable[..., Any]


def declared(function: Handler) -> AgentVersion:
    return declare(AgentSpec(name="a"), function, TypeCache())


async def responder(req: In) -> Out:
    return Out(length=len(req.text))


async def returns_none(req: In) -> None:
    assert req


async def without_annotation(req: In):  # type: ignore[no-untyped-def]  # noqa: ANN201 - what is tested
    assert req


async def trigger() -> Out:
    return Out(length=1)


async def chunks(req: In) -> Out:  # type: ignore[misc]
    for letter in req.text:
        yield Out(length=ord(letter))


async def iterator(req: In) -> AsyncIterator[Out]:
    for letter in req.text:
        yield Out(length=ord(letter))


async def generator(req: In) -> AsyncGenerator[Out, None]:
    for letter in req.text:
        yield Out(length=ord(letter))


class Service:
    async def method(self, req: In) -> Out:
        return Out(length=len(req.text))


async def with_prefix(prefix: str, req: In) -> Out:
    return Out(length=len(prefix + req.text))


def wrapped(function: Handler) -> Handler:
    @wraps(function)
    async def wrapper(*args: Any) -> Any:
        return await function(*args)

    return wrapper


IN, OUT = In.model_json_schema(), Out.model_json_schema()


@pytest.mark.parametrize(
    ("function", "streaming", "takes", "output", "chunk"),
    [
        (responder, False, IN, OUT, None),
        (returns_none, False, IN, None, None),
        (without_annotation, False, IN, None, None),
        (trigger, False, None, OUT, None),
        (chunks, True, IN, None, OUT),
        (iterator, True, IN, None, OUT),
        (generator, True, IN, None, OUT),
        (Service().method, False, IN, OUT, None),
        (partial(with_prefix, "p"), False, IN, OUT, None),
        (wrapped(responder), False, IN, OUT, None),
    ],
)
def test_the_contract_follows_from_the_signature(
    function: Handler,
    takes: dict[str, Any] | None,
    output: dict[str, Any] | None,
    chunk: dict[str, Any] | None,
    *,
    streaming: bool,
) -> None:
    """The contract has the kind and the types of the function (protocol §5)."""
    contract = declared(function).contract
    assert {"streaming": streaming, "invocable": True} == contract.capabilities
    assert (takes, output, chunk) == (contract.input_schema, contract.output_schema, contract.chunk_schema)


@pytest.mark.parametrize(
    ("hint", "schema"),
    [
        (str, {"type": "string"}),
        (list[int], {"items": {"type": "integer"}, "type": "array"}),
        (Literal["a", "b"], {"enum": ["a", "b"], "type": "string"}),
        (Annotated[str, Field(max_length=3)], {"maxLength": 3, "type": "string"}),
        (Annotated[int, ["unhashable"]], {"type": "integer"}),
        (dict[str, Any], {"additionalProperties": True, "type": "object"}),
        (Any, {}),
    ],
)
def test_schemas_are_published_unwrapped(hint: Any, schema: dict[str, Any]) -> None:
    """Any type that pydantic supports is published as its own schema, for input and output."""

    async def handler(req: Any) -> Any:
        return req

    handler.__annotations__ = {"req": hint, "return": hint}
    skill = declared(handler).contract.to_document()["skills"][0]
    assert (schema, schema) == (skill["inputSchema"], skill["outputSchema"])


CALLS: list[tuple[Handler, object, object]] = [
    (responder, {"text": "abc"}, {"length": 3}),
    (returns_none, {"text": "abc"}, {}),
    (without_annotation, {"text": "abc"}, {}),
    (trigger, None, {"length": 1}),
    (trigger, {"ignored": 1}, {"length": 1}),
    (trigger, b"not even JSON", {"length": 1}),
    (Service().method, {"text": "abc"}, {"length": 3}),
    (partial(with_prefix, "pre"), {"text": "abc"}, {"length": 6}),
    (wrapped(responder), {"text": "abc"}, {"length": 3}),
]


async def test_a_call_returns_the_result_of_the_function(mesh: AgentMesh, name: str) -> None:
    """Each form of responder replies the JSON of its type, `{}` for None."""
    for number, (function, _, _) in enumerate(CALLS):
        mesh.agent(AgentSpec(name=f"{name}.{number}"))(function)
    replies = [await mesh.call(f"{name}.{number}", payload) for number, (_, payload, _) in enumerate(CALLS)]
    assert [reply for _, _, reply in CALLS] == replies


async def test_a_stream_yields_the_chunks_of_the_function(mesh: AgentMesh, name: str) -> None:
    """The annotation is the type of the chunks, or an iterator of that type."""
    streamed = []
    for number, function in enumerate((chunks, iterator, generator)):
        mesh.agent(AgentSpec(name=f"{name}.{number}"))(function)
        streamed.append([chunk async for chunk in mesh.stream(f"{name}.{number}", {"text": "ab"})])
    assert [[{"length": 97}, {"length": 98}]] * 3 == streamed


async def test_an_optional_result_is_an_empty_object_for_none(mesh: AgentMesh, name: str) -> None:
    """`Out | None` replies `{}` for None and the model otherwise."""

    @mesh.agent(AgentSpec(name=name))
    async def maybe(req: In) -> Out | None:
        return Out(length=1) if req.text else None

    assert [{}, {"length": 1}] == [await mesh.call(name, {"text": text}) for text in ("", "x")]


async def test_an_empty_body_is_the_default_or_none(mesh: AgentMesh, name: str) -> None:
    """A parameter with a default, or one that may be None, makes the body optional."""

    @mesh.agent(AgentSpec(name=f"{name}.default"))
    async def default(req: In = In(text="default")) -> str:  # noqa: B008 - what is tested
        return req.text

    @mesh.agent(AgentSpec(name=f"{name}.none"))
    async def none(req: In | None) -> str:
        return "none" if req is None else req.text

    given: list[object] = [None, {"text": "given"}]
    assert ["default", "given"] == [await mesh.call(f"{name}.default", payload) for payload in given]
    assert ["none", "given"] == [await mesh.call(f"{name}.none", payload) for payload in given]


async def return_odd(req: Odd) -> Odd:
    return req


@pytest.mark.parametrize(
    ("body", "kind", "loc"),
    [
        (b"{}", "missing", ["n"]),
        (b'{"n":"x"}', "int_parsing", ["n"]),
        (b'{"n":2}', "value_error", ["n"]),
        (b'{"n":0}', "zero", ["n"]),
        (b'{"n":[{"deep":[1]}]}', "int_type", ["n"]),
        (b"", "missing", []),
        (b"{", "json_invalid", []),
        (b"[" * 2000, "json_invalid", []),
        (b'{"n":NaN}', "finite_number", ["n"]),
        (b'{"n":"\xff"}', "json_invalid", []),
        (b"\xff\xfe", "json_invalid", []),
    ],
)
def test_an_invalid_body_raises_invalid_input(body: bytes, kind: str, loc: list[str]) -> None:
    """For any malformed body the details are pydantic's list of problems as plain JSON, without URLs."""
    with pytest.raises(InvalidInput) as caught:
        declared(return_odd).handler.decode("a", body)
    assert "Input failed validation for agent 'a'" == caught.value.message
    (found,) = json.loads(json.dumps(caught.value.details["errors"]))
    assert (kind, loc) == (found["type"], found["loc"])
    assert "url" not in found


@pytest.mark.parametrize(
    "payload", [{"n": 2}, None, b'{"n":"\xff"}'], ids=["raising-validator", "empty", "invalid-utf8"]
)
async def test_the_caller_of_an_invalid_request_gets_invalid_input(
    mesh: AgentMesh, name: str, payload: object
) -> None:
    """A raising validator, an empty body and invalid UTF-8 are rejected; the next request is served."""
    mesh.agent(AgentSpec(name=name))(return_odd)
    with pytest.raises(InvalidInput) as caught:
        await mesh.call(name, payload)
    error = caught.value
    assert (f"Input failed validation for agent '{name}'", name) == (error.message, error.agent)
    assert 1 == len(error.details["errors"])
    assert {"n": 3} == await mesh.call(name, {"n": 3})


@pytest.mark.parametrize(
    ("hint", "result", "body"),
    [
        (Out, {"length": "5"}, {"length": 5}),
        (list[Out], [{"length": 5}, Out()], [{"length": 5}, {"length": 0}]),
        (int, "5", 5),
        (str, "text", "text"),
        (float, math.nan, None),
        (Any, {"a": [1, Out()]}, {"a": [1, {"length": 0}]}),
        (None, {"any": "json"}, {"any": "json"}),
        (None, Out(length=2), {"length": 2}),
        (None, {"x": math.nan}, {"x": None}),
        (Out, None, {}),
    ],
)
def test_a_result_is_encoded_as_its_declared_type(hint: Any, result: object, body: object) -> None:
    """Similar values are converted to the declared type; without one, NaN is encoded as null."""

    def reject_constant(constant: str) -> None:
        raise AssertionError(constant)

    assert body == json.loads(returning(hint).encode(result), parse_constant=reject_constant)


def returning(hint: Any) -> AgentVersion:
    async def handler(req: In) -> Any:
        return req

    handler.__annotations__ = {"req": In, "return": hint}
    return declared(handler)


@pytest.mark.parametrize(
    ("hint", "result"),
    [
        (Out, {"length": "x"}),
        (Out, 5),
        (Out, In(text="x")),
        (In, Out()),
        (list[In], [Out()]),
        (int, "x"),
        (list[Out], [5]),
        (int | str, []),
        (Any, object()),
        (None, object()),
        (str, "\ud800"),
        (bytes, b"\xff"),
    ],
)
def test_a_result_of_another_type_is_a_handler_error(hint: Any, result: object) -> None:
    """A result that cannot be converted to the declared type is not sent, but raises `HandlerError`."""
    with pytest.raises(HandlerError, match="another type than declared"):
        returning(hint).encode(result)


@pytest.mark.parametrize("hint", [Out, list[Out]], ids=["alone", "in a list"])
def test_a_model_with_a_value_of_another_type_is_a_handler_error(hint: Any) -> None:
    """Pydantic only warns about such a model; it is rejected even if the author's module ignores warnings."""
    broken = Out(length=1)
    broken.length = "x"  # type: ignore[assignment] # what is tested
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        agent = returning(hint)
        with pytest.raises(HandlerError, match="Expected `int`"):
            agent.encode(broken if hint is Out else [broken])


def synchronous_watcher() -> None:
    pass


@wraps(responder)
def around_async(*args: Any) -> Any:
    return responder(*args)


def synchronous_generator(req: In) -> Any:
    yield req


async def untyped(req) -> Out:  # type: ignore[no-untyped-def]  # noqa: ANN001 - what is tested
    return Out(length=len(req))


async def two_parameters(req: In, more: int) -> Out:
    return Out(length=len(req.text) + more)


async def keyword_only(*, req: In) -> Out:
    return Out(length=len(req.text))


async def variadic(*req: In) -> Out:
    return Out(length=len(req))


async def unknown_type(req: "Nowhere") -> Out:  # type: ignore[name-defined]  # noqa: F821 - what is tested
    return Out(length=len(req))


async def unknown_result(req: In) -> "Nowhere":  # type: ignore[name-defined]  # noqa: F821 - what is tested
    return req


async def unsupported_type(req: Service) -> Out:
    return Out(length=len(repr(req)))


async def type_without_schema(req: Callable[[int], int]) -> Out:
    return Out(length=req(1))


async def takes_an_entry(entry: KVEntry[str]) -> None:
    return


@pytest.mark.parametrize(
    ("function", "remedy"),
    [
        (synchronous_generator, "`async def`"),
        (synchronous_watcher, "`async def`"),
        (untyped, "write `req: MyInput`"),
        (two_parameters, "use one pydantic model instead"),
        (keyword_only, "must be positional, as in `req: MyInput`"),
        (variadic, "must be positional, as in `req: MyInput`"),
        (unknown_type, "'Nowhere' is unknown; define or import it at the top of the module"),
        (unknown_result, "'Nowhere' is unknown; define or import it at the top of the module"),
        (unsupported_type, "pydantic does not support the type"),
        (type_without_schema, "pydantic does not support the type"),
        (takes_an_entry, "it takes what a source delivers, but has none: `sources=[...]`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_an_unsuitable_function_is_rejected_at_its_declaration(function: Handler, remedy: str) -> None:
    """The message contains agent, function, file and line, and the remedy."""
    with pytest.raises(InvalidAgent) as caught:
        AgentMesh().agent(AgentSpec(name="a"))(function)
    message = caught.value.message
    location = f"{__file__}:{function.__code__.co_firstlineno}"
    assert f"The handler '{function.__name__}' of agent 'a' ({location}) cannot serve" in message
    assert remedy in message


@pytest.mark.parametrize(
    ("function", "remedy"), [(around_async, "it must be an `async def` itself"), (In, "must be a function")]
)
def test_a_def_around_an_async_def_and_a_class_are_rejected(
    function: Callable[..., Any], remedy: str
) -> None:
    """A `def` around an `async def` would return a coroutine, and a class is not a function."""
    with pytest.raises(InvalidAgent, match=remedy):
        AgentMesh().agent(AgentSpec(name="a"))(function)


@pytest.mark.parametrize("name", ["x.events", "global", "a b", "", "a..b"])
def test_an_invalid_agent_name_is_rejected_at_its_declaration(name: str) -> None:
    """The message contains the name and the function's file and line."""
    with pytest.raises(InvalidAgent) as caught:
        AgentMesh().agent(AgentSpec(name=name))(responder)
    assert f"{name!r} ({__file__}:{responder.__code__.co_firstlineno}) is invalid" in caught.value.message


def test_the_source_of_an_agent_is_the_location_of_its_function() -> None:
    """File and line are those of the function itself, through decorators and partials."""
    expected = [f"{__file__}:{f.__code__.co_firstlineno}" for f in (responder, with_prefix, responder)]
    found = (responder, partial(with_prefix, "p"), wrapped(responder))
    assert expected == [declared(function).source for function in found]
