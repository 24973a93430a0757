"""Tracing: spans for all that agents are asked and ask, as OpenTelemetry has them; one trace across hosts.

Calls and streams are spans of kind CLIENT and SERVER, what is sent and events are PRODUCER and CONSUMER.
The context travels in W3C headers. Where the spans go is said by the environment, `OTEL_…`, or by the
program that has set up OpenTelemetry itself.
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from importlib.metadata import entry_points, version
from typing import Any, Final

from openagentmesh import (
    Agent,
    Call,
    ClientMiddleware,
    Endpoint,
    Instance,
    MeshError,
    Middleware,
    Outgoing,
    Usage,
    hookimpl,
)
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider

log = logging.getLogger(__name__)

_NAME: Final = "openagentmesh"
# How long the last spans may take to leave when the mesh is left, in seconds.
_FLUSH: Final = 3.0
_EXPORTERS: Final = "opentelemetry_traces_exporter"
_RPC: Final = {"rpc.system.name": _NAME}
_MESSAGING: Final = {"messaging.system": "nats"}
# These are remote procedure calls to the conventions, the other verbs are messages.
_CALLS: Final = {"call", "stream"}
# What the spans of each verb are called and say: of those that ask, and of those that are asked.
_ASKING: Final = {
    "call": ("", SpanKind.CLIENT, _RPC),
    "stream": ("", SpanKind.CLIENT, _RPC),
    "send": ("send ", SpanKind.PRODUCER, _MESSAGING | {"messaging.operation.type": "send"}),
    "publish": ("publish ", SpanKind.PRODUCER, _MESSAGING | {"messaging.operation.type": "send"}),
    "receive": ("receive ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "receive"}),
}
_ASKED: Final = {
    "call": ("", SpanKind.SERVER, _RPC),
    "stream": ("", SpanKind.SERVER, _RPC),
    "send": ("process ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "process"}),
    "source": ("process ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "process"}),
}


class _Headers(Getter[Mapping[str, str]]):
    """Reads the propagators' headers, which peers in other languages capitalise."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        """Give what a header says."""
        value = carrier.get(key) or carrier.get(key.title())
        return None if value is None else [value]

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        """Give the names of all headers."""
        return list(carrier)


_HEADERS: Final = _Headers()


@dataclass(slots=True, frozen=True)
class _Kind:
    """What all spans of one verb of one agent have in common."""

    name: str
    kind: SpanKind
    attributes: dict[str, str]


class Tracing:
    """The plugin.

    Args:
        provider: where spans are made; else OpenTelemetry's global provider, which is set up
            from the environment at the start when nobody has done so.

    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = trace.get_tracer(_NAME, version(_NAME), provider)

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """What makes a span of each request to one agent."""
        kinds = {verb: _kind_of(agent, verb) for verb in _ASKED}
        tracer, streams = self._tracer, agent.contract.streaming

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def traced(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
                # An empty context: what was current when the mesh was started is nobody's parent.
                parent = extract(call.headers, Context(), _HEADERS)
                kind = kinds[call.verb]
                span = tracer.start_span(kind.name, parent, kind.kind, kind.attributes)
                chunks = _counting(call) if streams else None
                call.when_over(partial(_end, span, call, chunks))
                token = attach(trace.set_span_in_context(span, parent))
                try:
                    return await endpoint(call)
                except Exception as exc:
                    if not isinstance(exc, MeshError):
                        span.record_exception(exc)
                    raise
                finally:
                    detach(token)

            return traced

        return middleware

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        """What makes a span of each request and event that leaves."""
        return self._leaving

    @asynccontextmanager
    async def _leaving(self, outgoing: Outgoing) -> AsyncIterator[None]:
        """A span that is never the current one: what is pulled shares its context with who pulls."""
        parent = _parent_of(outgoing)
        name, kind, attributes = _ASKING[outgoing.verb]
        span = self._tracer.start_span(name + outgoing.target, parent, kind, _about(outgoing, attributes))
        if outgoing.verb != "receive":
            _drop_context(outgoing.headers)  # it is the parent's by now, in whatever capitals
            inject(outgoing.headers, trace.set_span_in_context(span, parent))
        try:
            yield
        except GeneratorExit:  # whoever pulled a stream has had enough of it
            raise
        except asyncio.CancelledError:
            _fail(span, "cancelled", "")
            raise
        except MeshError as exc:
            _answer_error(span, outgoing.verb, exc)
            raise
        except Exception as exc:
            span.record_exception(exc)
            _fail(span, type(exc).__qualname__, str(exc))
            raise
        finally:
            if outgoing.verb == "stream":
                span.set_attribute("openagentmesh.chunks", outgoing.chunks)
            span.end()

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self, instance: Instance) -> AsyncIterator[None]:
        """Set OpenTelemetry up when nobody has, and let the last spans leave at the end.

        Raises:
            ValueError: the environment names an exporter that is not installed.

        """
        is_set_up = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        # Without an exporter the API alone hands the context on, and that costs less.
        if self._provider is None and not is_set_up and (exporters := _exporters_of_environment()):
            trace.set_tracer_provider(_provider(instance.instance_id, exporters))
        try:
            yield
        finally:
            await _flush(self._provider or trace.get_tracer_provider())


def _kind_of(agent: Agent, verb: str) -> _Kind:
    prefix, kind, common = _ASKED[verb]
    attributes = common | {"openagentmesh.agent.version": agent.contract.version}
    if kind is SpanKind.SERVER:
        attributes |= {"rpc.method": agent.name}
    else:
        attributes |= {"messaging.operation.name": prefix.strip()}
        if verb == "send":
            attributes |= {"messaging.consumer.group.name": f"q.{agent.name}"}
    return _Kind(prefix + agent.name, kind, attributes)


def _about(outgoing: Outgoing, common: Mapping[str, str]) -> dict[str, str]:
    """The attributes of what leaves."""
    own = {"openagentmesh.request_id": outgoing.request_id} if outgoing.request_id else {}
    if outgoing.verb in _CALLS:
        return {**common, "rpc.method": outgoing.target, **own}
    named = {"messaging.operation.name": outgoing.verb, "messaging.destination.name": outgoing.subject}
    return {**common, **named, **own}


def _parent_of(outgoing: Outgoing) -> Context:
    """The running span's context, else what the headers say: an event's sender, a gateway's caller."""
    if outgoing.verb == "receive":
        return extract(outgoing.headers, Context(), _HEADERS)
    current = get_current()
    if trace.get_current_span(current).get_span_context().is_valid:
        return current
    return extract(outgoing.headers, current, _HEADERS)


def _drop_context(headers: dict[str, str]) -> None:
    fields = get_global_textmap().fields
    for name in [name for name in headers if name.lower() in fields]:
        del headers[name]


def _counting(call: Call) -> list[int]:
    """A list of one number: how many chunks the call has sent."""
    count, send = [0], call.send

    async def counting(chunk: object) -> None:
        await send(chunk)
        count[0] += 1

    call.send = counting
    return count


def _end(span: Span, call: Call, chunks: list[int] | None, error: MeshError | None) -> None:
    """End the span of a request that is answered; who stops to read a stream makes no error."""
    if error is not None and (chunks is None or not call.abandoned):
        _answer_error(span, call.verb, error)
    if span.is_recording():
        _tell(span, call, chunks)
    span.end()


def _tell(span: Span, call: Call, chunks: list[int] | None) -> None:
    """What is known of a request when it is over."""
    if call.request_id:
        span.set_attribute("openagentmesh.request_id", call.request_id)
    if call.verb in {"send", "source"}:
        span.set_attribute("messaging.destination.name", call.subject)
    if chunks is not None:
        span.set_attribute("openagentmesh.chunks", chunks[0])
    if call.usage is not None:
        span.set_attributes(_costs(call.usage))


def _costs(usage: Usage) -> dict[str, str | int | float]:
    told = {
        "gen_ai.usage.input_tokens": usage.input_tokens,
        "gen_ai.usage.output_tokens": usage.output_tokens,
        "gen_ai.response.model": usage.model,
        "openagentmesh.usage.cost_usd": usage.estimated_cost_usd,
    }
    return {key: value for key, value in told.items() if value is not None}


def _answer_error(span: Span, verb: str, error: MeshError) -> None:
    _fail(span, error.code, str(error))
    if verb in _CALLS:
        span.set_attribute("rpc.response.status_code", error.code)


def _fail(span: Span, code: str, why: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, why or code)


def _exporters_of_environment() -> list[Callable[[], Any]]:
    """What makes the exporters that `OTEL_TRACES_EXPORTER` names, as installed packages register them."""
    known = {entry.name: entry for entry in entry_points(group=_EXPORTERS)}
    wanted = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    names = [name.strip() for name in wanted.split(",") if name.strip() != "none"]
    names = [f"otlp_proto_{_otlp_protocol()}" if name == "otlp" else name for name in names]
    for name in names:
        if name not in known:
            there = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"the environment asks for the exporter '{name}', which is not there; installed: {there}. "
                "OTEL_TRACES_EXPORTER=none exports nothing"
            )
    return [known[name].load() for name in names]


def _otlp_protocol() -> str:
    of_traces = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    protocol = of_traces or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf"
    return protocol.partition("/")[0]


def _provider(instance_id: str, exporters: Iterable[Callable[[], Any]]) -> TracerProvider:
    """The SDK's provider; its sampler, limits and resource are those of the environment."""
    # Only here: who brings a provider needs no SDK.
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    ours = {"service.name": _NAME, "service.instance.id": instance_id}
    resource = Resource.create({**ours, **OTELResourceDetector().detect().attributes})
    # Not at exit, where the SDK waits for a collector that is not there: `_flush` lets them leave.
    provider = SdkProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider


async def _flush(provider: TracerProvider) -> None:
    """Let the last spans leave, for a while; in a thread that nobody waits for at exit."""
    flush = getattr(provider, "force_flush", None)
    if flush is None:  # the API alone has nothing to send
        return
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        flush()
        # Whoever has stopped waiting has no loop any more.
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="oam-tracing-flush", daemon=True).start()
    try:
        async with asyncio.timeout(_FLUSH):
            await done.wait()
    except TimeoutError:
        log.warning("the last spans could not be sent within %gs and are lost", _FLUSH)
