"""An author's function: its kind, and the types of its input and output (protocol §5)."""

import inspect
import re
import warnings
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Final, Literal, get_args, get_origin, get_type_hints

from pydantic import TypeAdapter, ValidationError
from pydantic.errors import PydanticUserError
from pydantic_core import PydanticSerializationError, to_json

from openagentmesh.agent.call import Call, Endpoint
from openagentmesh.agent.sources import KVSource, Source, SubjectSource
from openagentmesh.agent.threads import pool
from openagentmesh.protocol import codec
from openagentmesh.protocol.errors import HandlerError, InvalidAgent, InvalidInput, validation_problems
from openagentmesh.protocol.messages import KVEntry, MeshMessage

Kind = Literal["responder", "streamer", "trigger", "publisher", "watcher", "driven"]
# How a source-driven handler takes its data: as it is, in a KVEntry or in a MeshMessage.
Envelope = Literal["", "entry", "message"]
Function = Callable[..., Any]
_ITERATORS: Final = (AsyncIterator, AsyncGenerator, AsyncIterable)
_MAX_TYPES: Final = 1000
_EMPTY_BODY: Final = "Field required: the body is empty"
# The beginning of pydantic's warning about a value that its class does not declare.
_TYPE_MISMATCH: Final = "Pydantic serializer warnings"
_ENVELOPES: Final[dict[Any, Envelope]] = {KVEntry: "entry", MeshMessage: "message"}
_SOURCE_TYPES: Final = {"entry": KVSource, "message": SubjectSource, "": SubjectSource | KVSource}


class PayloadType:
    """A type that an author declares: it validates and encodes values, and has a JSON Schema."""

    def __init__(self, hint: Any) -> None:  # noqa: ANN401 - any annotation
        self.hint = hint
        self.adapter: TypeAdapter[Any] = TypeAdapter(hint)
        # Once per type: authors' modules may insert filters of their own before it.
        warnings.filterwarnings("error", _TYPE_MISMATCH, UserWarning, re.escape(__name__))

    def encode(self, value: object) -> bytes:
        """A value of this type as JSON.

        Raises:
            ValueError: it has another type and cannot be converted.
        """
        adapter = self.adapter  # not its own methods, which double the time
        try:
            # With its argument warnings="error" it takes four times as long.
            return adapter.serializer.to_json(adapter.validator.validate_python(value))
        except UserWarning as warning:
            raise ValueError(str(warning)) from warning

    @cached_property
    def is_plain(self) -> bool:
        """Whether it is text or bytes, possibly optional."""
        return set(get_args(self.hint) or [self.hint]) - {type(None)} in ({str}, {bytes})

    @cached_property
    def accepts_none(self) -> bool:
        """Whether None is a value of this type."""
        try:
            self.adapter.validate_python(None)
        except Exception:  # noqa: BLE001 - an author's validator may raise anything
            return False
        return True

    @cached_property
    def schema(self) -> dict[str, Any]:
        """The type's JSON Schema, as contracts contain it."""
        return self.adapter.json_schema(mode="validation")


class TypeCache:
    """The types of one mesh's agents: creating one takes half a millisecond."""

    def __init__(self) -> None:
        self._types: dict[Any, PayloadType] = {}

    def get(self, hint: Any) -> PayloadType:  # noqa: ANN401 - any annotation
        """The type of an annotation.

        Raises:
            PydanticUserError, NameError, TypeError: pydantic does not support it.
        """
        try:
            found = self._types.get(hint)
        except TypeError:  # it is not hashable, such as Annotated with a list in it
            return PayloadType(hint)
        if found is None:
            if len(self._types) >= _MAX_TYPES:
                self._types.clear()
            found = self._types[hint] = PayloadType(hint)
        return found


@dataclass(slots=True, frozen=True)
class Handler:
    """An author's function with its kind and types.

    Attributes:
        input: the type of its parameter; None when it has none.
        output: the type of its result; of a streamer's chunks and a publisher's events.
        input_optional: its parameter has a default.
        is_blocking: it is a `def`, which runs in a thread.
    """

    function: Function
    kind: Kind
    input: PayloadType | None
    output: PayloadType | None
    input_optional: bool
    envelope: Envelope = ""
    is_blocking: bool = False

    def decode(self, agent: str, body: bytes) -> Any:  # noqa: ANN401 - of the author's type
        """A request's body as the handler's input.

        Raises:
            InvalidInput: with pydantic's list of problems under `errors`.
        """
        if self.input is None or (not body and self.input_optional):
            return None
        try:
            if not body:
                return self.input.adapter.validate_python(None)
            # Not the adapter's own method, which doubles the time.
            return self.input.adapter.validator.validate_json(body)
        except ValidationError as exc:
            problems = validation_problems(exc) if body else [_problem("missing", _EMPTY_BODY)]
            raise _invalid_input(agent, problems) from exc

    def decode_plain(self, agent: str, body: bytes) -> Any:  # noqa: ANN401 - of the author's type
        """A stored or published value as the handler's input: text and bytes need not be JSON."""
        if self.input is None:
            return None
        if self.input.is_plain:
            if bytes in (get_args(self.input.hint) or [self.input.hint]):
                return body
            try:
                return body.decode()
            except UnicodeDecodeError as exc:
                raise _invalid_input(agent, [_problem("string_unicode", str(exc))]) from exc
        try:
            return self.decode(agent, body)
        except InvalidInput:
            # Not JSON of this type; it may be a valid text, as for `Any` or a Literal.
            with suppress(ValueError):
                return self.input.adapter.validate_python(body.decode())
            raise

    def encode(self, value: object) -> bytes:
        """The handler's result as JSON of its declared type.

        Raises:
            HandlerError: it has another type and cannot be converted.
        """
        if value is None:
            return codec.NO_RESULT
        try:
            if self.output is None:
                return to_json(value, inf_nan_mode="null")
            # An instance of the declared model is unchanged; anything else is converted.
            return self.output.encode(value)
        except (PydanticSerializationError, ValueError, RecursionError) as exc:
            raise HandlerError(f"The handler returned a value of another type than declared: {exc}") from exc

    def endpoint(self) -> Endpoint:
        """The innermost endpoint: calls the function with the call's input."""
        function = self.function
        if self.kind == "streamer":

            async def stream(call: Call) -> None:
                async with aclosing(_invoke(function, self, call)) as chunks:
                    async for chunk in chunks:
                        await call.send(chunk)

            return stream

        async def respond(call: Call) -> object:
            return await _invoke(function, self, call)

        async def respond_in_thread(call: Call) -> object:
            return await pool.run(call.agent, partial(_invoke_blocking, function, self, call))

        return respond_in_thread if self.is_blocking else respond


def _problem(kind: str, message: str) -> dict[str, object]:
    """A problem of a whole body, in pydantic's form."""
    return {"type": kind, "loc": [], "msg": message, "input": None}


def _invalid_input(agent: str, problems: Sequence[Mapping[str, Any]]) -> InvalidInput:
    return InvalidInput(f"Input failed validation for agent '{agent}'", details={"errors": problems})


def _invoke(function: Function, handler: Handler, call: Call) -> Any:  # noqa: ANN401 - coroutine or generator
    if handler.input is None or (not call.body and handler.input_optional and not handler.envelope):
        return function()
    return function(call.input)


def _invoke_blocking(function: Function, handler: Handler, call: Call) -> object:
    result = _invoke(function, handler, call)
    if inspect.iscoroutine(result):
        result.close()
        raise HandlerError("The handler is a `def` that returned a coroutine; it must be an `async def`.")
    return result


class _InvalidHandler(Exception):
    """A function cannot be a handler; the text says why."""


def inspect_handler(
    function: Function, agent: str, types: TypeCache, sources: Sequence[Source] = (), *, thread: bool = False
) -> Handler:
    """Derive a handler's kind and types from the function's signature; with `thread` it must be a `def`.

    Raises:
        InvalidAgent: it is not a function, is async and must not be or vice versa, takes more than one
            parameter, does not fit the sources, or a type is missing, unknown or not supported by pydantic.
    """
    try:
        return _inspect(function, types, sources, thread=thread)
    except _InvalidHandler as exc:
        name, where = getattr(_unwrapped(function), "__name__", repr(function)), source_location(function)
        message = f"The handler '{name}' of agent '{agent}' ({where}) cannot serve: {exc}."
        raise InvalidAgent(message, agent=agent) from exc.__cause__


def _inspect(function: Function, types: TypeCache, sources: Sequence[Source], *, thread: bool) -> Handler:
    is_streaming = inspect.isasyncgenfunction(_unwrapped(function))
    is_blocking = not is_streaming and not inspect.iscoroutinefunction(_unwrapped(function))
    if is_blocking:
        _check_blocking(_unwrapped(function))
    elif thread:
        raise _InvalidHandler("an `async def` runs on the event loop; thread=True is for a `def`")
    parameter, hints = _parameter(function), _hints(function)
    input_hint, envelope = _input_hint(parameter, hints)
    output_hint = hints.get("return", type(None))
    if is_streaming and get_origin(output_hint) in _ITERATORS:
        output_hint = get_args(output_hint)[0]
    returns_nothing = output_hint is type(None)
    if envelope or (sources and parameter is None and returns_nothing):
        kind: Kind = "driven"
    else:
        kind = _kind(parameter, is_streaming=is_streaming, returns_nothing=returns_nothing)
    if is_blocking and kind == "watcher":
        raise _InvalidHandler(
            "it takes and returns nothing, so it runs in the background and must be an `async def`"
        )
    _check_sources(sources, envelope, is_streaming=is_streaming)
    return Handler(
        function,
        kind,
        None if input_hint is None else _type(input_hint, types),
        None if returns_nothing else _type(output_hint, types),
        input_optional=parameter is not None and parameter.default is not parameter.empty,
        envelope=envelope,
        is_blocking=is_blocking,
    )


def _kind(parameter: object, *, is_streaming: bool, returns_nothing: bool) -> Kind:
    """The kind by protocol §5."""
    if parameter is not None:
        return "streamer" if is_streaming else "responder"
    if is_streaming:
        return "publisher"
    return "watcher" if returns_nothing else "trigger"


def _check_blocking(function: Function) -> None:
    """Check that a function is a `def` that can run in a thread."""
    if not inspect.isroutine(function):
        raise _InvalidHandler("it must be a function, `async def` or `def`")
    if inspect.isgeneratorfunction(function):
        raise _InvalidHandler("it is a `def` that yields; only an `async def` may")
    inner = inspect.unwrap(function)
    if inspect.iscoroutinefunction(inner) or inspect.isasyncgenfunction(inner):
        raise _InvalidHandler("it is a `def` around an `async def`; it must be an `async def` itself")


def _check_sources(sources: Sequence[Source], envelope: Envelope, *, is_streaming: bool) -> None:
    if is_streaming and (sources or envelope):
        raise _InvalidHandler(
            "it has sources and yields, but what it yields is not sent anywhere; return a result instead"
        )
    if envelope and not sources:
        raise _InvalidHandler("it takes what a source delivers, but has none: `sources=[...]`")
    for source in sources:
        if not isinstance(source, _SOURCE_TYPES[envelope]):
            raise _InvalidHandler(f"it takes {envelope or 'data'} and cannot be driven by {source!r}")


def _input_hint(parameter: inspect.Parameter | None, hints: dict[str, Any]) -> tuple[Any, Envelope]:
    """The annotation of the input, without its envelope, and the envelope."""
    if parameter is None:
        return None, ""
    if parameter.name not in hints:
        raise _InvalidHandler(
            f"its parameter '{parameter.name}' has no type; write `{parameter.name}: MyInput`"
        )
    hint = hints[parameter.name]
    origin = get_origin(hint) or hint
    if origin not in _ENVELOPES:
        return hint, ""
    return (get_args(hint) or (Any,))[0], _ENVELOPES[origin]


def source_location(function: Function) -> str:
    """File and line of a function."""
    code = getattr(inspect.unwrap(_unwrapped(function)), "__code__", None)
    return f"{code.co_filename}:{code.co_firstlineno}" if code else repr(function)


def _unwrapped(function: Function) -> Function:
    while isinstance(function, partial):
        function = function.func
    return function


def _parameter(function: Function) -> inspect.Parameter | None:
    parameters = list(inspect.signature(function).parameters.values())
    if any(p.default is p.empty and p.kind not in {p.VAR_POSITIONAL, p.VAR_KEYWORD} for p in parameters[1:]):
        raise _InvalidHandler("it takes more than one parameter; use one pydantic model instead")
    if not parameters:
        return None
    first = parameters[0]
    if first.kind not in {first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD}:
        raise _InvalidHandler("its parameter must be positional, as in `req: MyInput`")
    return first


def _hints(function: Function) -> dict[str, Any]:
    try:
        return get_type_hints(_unwrapped(function), include_extras=True)
    except NameError as exc:
        problem = f"the type '{exc.name}' is unknown; define or import it at the top of the module"
        raise _InvalidHandler(problem) from exc
    except (TypeError, SyntaxError, AttributeError) as exc:
        raise _InvalidHandler(f"its annotations are invalid: {exc}") from exc


def _type(hint: Any, types: TypeCache) -> PayloadType:  # noqa: ANN401 - as above
    try:
        found = types.get(hint)
        assert found.schema is not None  # a type without a schema fails here, at its declaration
    except (PydanticUserError, NameError, TypeError) as exc:
        raise _InvalidHandler(f"pydantic does not support the type {hint!r}: {exc}") from exc
    return found
