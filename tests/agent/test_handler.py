"""Handlers: their kinds and types, and the functions that are rejected."""

from collections.abc import AsyncGenerator, AsyncIterator, Callable
from functools import partial, wraps
from typing import Annotated, Any, Literal

import pytest
from openagentmesh import AgentMesh, AgentSpec, InvalidAgent, KVEntry
from openagentmesh.agent.handler import TypeCache
from pydantic import Field, create_model

from tests.support.handlers import Handler, In, Out, declared


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


def test_the_cache_of_types_is_bounded() -> None:
    """Types that callers create for each call do not add up."""
    cache, models = TypeCache(), [create_model(f"Model{number}") for number in range(1001)]
    first = cache.get(models[0])
    assert first is cache.get(models[0])
    for model in models[1:]:
        cache.get(model)
    assert first is not cache.get(models[0])
