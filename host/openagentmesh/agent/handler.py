"""An author's function: its shape, and the types of what goes in and comes out (protocol §5)."""

import inspect
import re
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable
from contextlib import aclosing
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, to_json

from openagentmesh.agent.call import Call, Endpoint
from openagentmesh.agent.threads import pool
from openagentmesh.protocol.errors import HandlerError, InvalidAgent, InvalidInput, validation_problems
from openagentmesh.protocol.messages import KVEntry, MeshMessage

Shape = Literal["responder", "streamer", "trigger", "publisher", "watcher", "driven"]
# What a source-driven handler takes around the data: nothing, a KVEntry or a MeshMessage.
Envelope = Literal["", "entry", "message"]
_ITERATORS: Final = (AsyncIterator, AsyncGenerator, AsyncIterable)
_NOTHING: Final = b"{}"
# How pydantic's warning begins when an object holds what its class does not declare.
_MISMATCH: Final = "Pydantic serializer warnings"
_ENVELOPES: Final[dict[Any, Envelope]] = {KVEntry: "entry", MeshMessage: "message"}


class Type:
    """One type an author declares: what validates and dumps it, and its JSON Schema."""

    def __init__(self, hint: Any) -> None:  # noqa: ANN401 - whatever an author writes
        self.hint = hint
        self.adapter: TypeAdapter[Any] = TypeAdapter(hint)
        # Again for each: authors' modules put filters of their own before it.
        warnings.filterwarnings("error", _MISMATCH, UserWarning, re.escape(__name__))

    def dump(self, value: object) -> bytes:
        """A value of this type as JSON.

        Raises:
            ValueError: it is of another type and cannot be made into it.

        """
        adapter = self.adapter  # past its own methods, as `Handler.read`
        try:
            # With its argument warnings="error" it takes four times as long.
            return adapter.serializer.to_json(adapter.validator.validate_python(value))
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is text or bytes, or None beside one of them."""
        return set(get_args(self.hint) or [self.hint]) - {type(None)} in ({str}, {bytes})

    @cached_property
    def takes_none(self) -> bool:
        """Whether None is one of its values."""
        try:
            self.adapter.validate_python(None)
        except Exception:  # noqa: BLE001 - an author's validator may raise anything: that is a no
            return False
        return True

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The type's JSON Schema, as contracts carry it."""
        return self.adapter.json_schema(mode="validation")


class Types:
    """The types of one mesh's agents, each made once: making one takes half a millisecond."""

    def __init__(self) -> None:
        self._made: dict[Any, Type] = {}

    def get(self, hint: Any) -> Type:  # noqa: ANN401 - whatever an author writes
        """The type for a hint.

        Raises:
            PydanticUserError, NameError, TypeError: pydantic cannot use it.

        """
        try:
            made = self._made.get(hint)
        except TypeError:  # it has no hash, such as Annotated with a list in it
            return Type(hint)
        if made is None:
            made = self._made[hint] = Type(hint)
        return made


@dataclass(slots=True, frozen=True)
class Handler:
    """A function with its shape and types.

    `output` is the type of a streamer's chunks and of a publisher's events, `envelope` what a
    source-driven handler takes its input in, `blocks` whether it is a `def`, which runs in a thread.
    """

    function: Callable[..., Any]
    shape: Shape
    input: Type | None
    output: Type | None
    input_optional: bool
    envelope: Envelope = ""
    blocks: bool = False

    def read(self, agent: str, body: bytes) -> Any:  # noqa: ANN401 - of the author's type
        """A request's body as the handler's input.

        Raises:
            InvalidInput: with pydantic's list of what is wrong under `errors`.

        """
        if self.input is None or (not body and self.input_optional):
            return None
        try:
            if not body:
                return self.input.adapter.validate_python(None)
            # Past the adapter, whose own methods take as long again.
            return self.input.adapter.validator.validate_json(body)
        except ValidationError as exc:
            errors = _NO_BODY if not body else validation_problems(exc)
            raise _invalid_input(agent, errors) from exc

    def read_plain(self, agent: str, body: bytes) -> Any:  # noqa: ANN401 - of the author's type
        """A stored or published value as the handler's input: texts and bytes stand for themselves.

        Raises:
            InvalidInput: as `read`.

        """
        if self.input is None:
            return None
        if self.input.is_plain:
            if bytes in (get_args(self.input.hint) or [self.input.hint]):
                return body
            try:
                return body.decode()
            except UnicodeDecodeError as exc:
                problem: dict[str, Any] = {
                    "type": "string_unicode",
                    "loc": [],
                    "msg": str(exc),
                    "input": None,
                }
                raise _invalid_input(agent, [problem]) from exc
        try:
            return self.read(agent, body)
        except InvalidInput:
            # No JSON of this type; a text may be one all the same, as `Any` or a word of a Literal.
            try:
                return self.input.adapter.validate_python(body.decode())
            except ValueError:
                pass
            raise

    def dump(self, value: object) -> bytes:
        """What the handler gave back, as the JSON of its declared type.

        Raises:
            HandlerError: it is of another type and cannot be made into it.

        """
        if value is None:
            return _NOTHING
        try:
            if self.output is None:
                return to_json(value, inf_nan_mode="null")
            # An instance of the declared model passes as it is; anything else is made into one.
            return self.output.dump(value)
        except (PydanticSerializationError, ValueError, RecursionError) as exc:
            raise HandlerError(f"The handler gave back what it does not declare: {exc}") from exc

    def endpoint(self) -> Endpoint:
        """The innermost endpoint: the call's input into the function."""
        function = self.function
        if self.shape == "streamer":

            async def stream(call: Call) -> None:
                async with aclosing(_invoke(function, self, call)) as chunks:
                    async for chunk in chunks:
                        await call.send(chunk)

            return stream

        async def respond(call: Call) -> object:
            return await _invoke(function, self, call)

        async def respond_in_thread(call: Call) -> object:
            return await pool.run(call.agent, partial(_invoke_blocking, function, self, call))

        return respond_in_thread if self.blocks else respond


_NO_BODY: Final[list[dict[str, Any]]] = [
    {"type": "missing", "loc": [], "msg": "Field required: the body is empty", "input": None}
]


def _invalid_input(agent: str, errors: list[dict[str, Any]]) -> InvalidInput:
    return InvalidInput(f"Input failed validation for agent '{agent}'", details={"errors": errors})


def _invoke(function: Callable[..., Any], handler: Handler, call: Call) -> Any:  # noqa: ANN401 - coroutine or generator
    if handler.input is None or (not call.request.body and handler.input_optional and not handler.envelope):
        return function()
    return function(call.input)


def _invoke_blocking(function: Callable[..., Any], handler: Handler, call: Call) -> object:
    result = _invoke(function, handler, call)
    if inspect.iscoroutine(result):
        result.close()
        raise HandlerError("The handler is a `def` that gave back a coroutine; it must be an `async def`.")
    return result


def inspect_handler(
    function: Callable[..., Any], agent: str, types: Types, *, driven: bool = False, thread: bool = False
) -> Handler:
    """Take a function's shape and types from its signature.

    `driven`: it has sources; `thread`: it must run in a thread.

    Raises:
        InvalidAgent: it is no function, is async and must not be or the other way round, takes more
            than one parameter, or a type is missing, unknown or nothing that pydantic can validate.

    """
    streaming = inspect.isasyncgenfunction(_plain(function))
    blocks = not streaming and not inspect.iscoroutinefunction(_plain(function))
    if thread and not blocks:
        raise _invalid(agent, function, "an `async def` runs on the event loop; thread=True is for a `def`")
    if blocks and (why := _never_in_a_thread(_plain(function))):
        raise _invalid(agent, function, why)
    parameter, hints = _parameter(function, agent), _hints(function, agent)
    takes, envelope = _taken(parameter, hints, agent, function)
    returns = hints.get("return", type(None))
    if streaming and get_origin(returns) in _ITERATORS:
        returns = get_args(returns)[0]
    shape: Shape
    if envelope or (driven and parameter is None and returns is type(None)):
        shape = "driven"
    elif parameter is not None:
        shape = "streamer" if streaming else "responder"
    elif streaming:
        shape = "publisher"
    else:
        shape = "watcher" if returns is type(None) else "trigger"
    if blocks and shape == "watcher":
        raise _invalid(
            agent, function, "it takes and returns nothing, so it runs by itself and must be an `async def`"
        )
    if streaming and (driven or envelope):
        raise _invalid(agent, function, "it has sources and yields; nobody would read that, so let it return")
    if envelope and not driven:
        raise _invalid(agent, function, "it takes what comes from a source, but has none: `sources=[...]`")
    return Handler(
        function,
        shape,
        None if takes is None else _type(takes, types, agent, function),
        None if returns is type(None) else _type(returns, types, agent, function),
        input_optional=parameter is not None and parameter.default is not parameter.empty,
        envelope=envelope,
        blocks=blocks,
    )


def _never_in_a_thread(function: Callable[..., Any]) -> str:
    """Why something that is not async cannot be called in a thread; empty when it can."""
    if not inspect.isroutine(function):
        return "it must be a function, `async def` or `def`"
    if inspect.isgeneratorfunction(function):
        return "it is a `def` that yields; only an `async def` may"
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        return "it is a `def` around an `async def`; it must be an `async def` itself"
    return ""


def _taken(
    parameter: inspect.Parameter | None, hints: dict[str, Any], agent: str, function: Callable[..., Any]
) -> tuple[Any, Envelope]:
    """The type of the input, and what it comes in."""
    if parameter is None:
        return None, ""
    if parameter.name not in hints:
        why = f"its parameter '{parameter.name}' has no type; write `{parameter.name}: MyInput`"
        raise _invalid(agent, function, why)
    hint = hints[parameter.name]
    kind = get_origin(hint) or hint
    if kind not in _ENVELOPES:
        return hint, ""
    return (get_args(hint) or (Any,))[0], _ENVELOPES[kind]


def where(function: Callable[..., Any]) -> str:
    """File and line of a function, for messages."""
    code = getattr(inspect.unwrap(_plain(function)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _plain(function: Callable[..., Any]) -> Callable[..., Any]:
    while isinstance(function, partial):
        function = function.func
    return function


def _parameter(function: Callable[..., Any], agent: str) -> inspect.Parameter | None:
    parameters = list(inspect.signature(function).parameters.values())
    needed = [
        p for p in parameters[1:] if p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD}
    ]
    if needed:
        raise _invalid(
            agent, function, "it takes more than one parameter; put what it needs into one pydantic model"
        )
    if parameters and parameters[0].kind not in {
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
    }:
        raise _invalid(agent, function, "its parameter must be an ordinary one, as in `req: MyInput`")
    return parameters[0] if parameters else None


def _hints(function: Callable[..., Any], agent: str) -> dict[str, Any]:
    try:
        return get_type_hints(_plain(function), include_extras=True)
    except NameError as exc:
        raise _invalid(
            agent,
            function,
            f"the type '{exc.name}' is not known; define or import it at the top of the module",
        ) from exc
    except (TypeError, SyntaxError, AttributeError) as exc:
        raise _invalid(agent, function, f"its types cannot be understood: {exc}") from exc


def _type(hint: Any, types: Types, agent: str, function: Callable[..., Any]) -> Type:  # noqa: ANN401 - as above
    try:
        found = types.get(hint)
        assert found.schema is not None  # a type without a schema fails here, at its declaration
    except (PydanticUserError, NameError, TypeError) as exc:
        raise _invalid(agent, function, f"pydantic cannot use the type {hint!r}: {exc}") from exc
    return found


def _invalid(agent: str, function: Callable[..., Any], why: str) -> InvalidAgent:
    name = getattr(_plain(function), "__name__", repr(function))
    return InvalidAgent(
        f"The handler '{name}' of agent '{agent}' ({where(function)}) cannot serve: {why}.", agent=agent
    )
