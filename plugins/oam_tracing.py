"""Tracing: OpenTelemetry spans of all requests and events, in one trace across hosts.

Calls and streams have spans of kind CLIENT and SERVER, sends and events of kind PRODUCER and CONSUMER.
The context travels in W3C headers. Spans are exported according to the environment, `OTEL_…`, or to the
program's own set-up of OpenTelemetry.
"""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncIterator, Callable, Iterable, Mapping
from contextlib import asynccontextmanager
from functools import partial
from importlib.metadata import entry_points, version
from typing import Any, Final

from openagentmesh import (
    Agent,
    Call,
    ClientMiddleware,
    ClientOperation,
    Endpoint,
    Instance,
    MeshError,
    Middleware,
    hookimpl,
)
from opentelemetry import trace
from opentelemetry.context import Context, attach, detach, get_current
from opentelemetry.propagate import extract, get_global_textmap, inject
from opentelemetry.propagators.textmap import Getter
from opentelemetry.trace import Span, SpanKind, StatusCode, TracerProvider

log = logging.getLogger(__name__)

_NAME: Final = "openagentmesh"
# How long the export of the last spans may take at the end.
_FLUSH_TIMEOUT_S: Final = 3.0
_EXPORTERS: Final = "opentelemetry_traces_exporter"
_RPC: Final = {"rpc.system.name": _NAME}
_MESSAGING: Final = {"messaging.system": "nats"}
# The conventions treat these as remote procedure calls, the other verbs as messages.
_CALLS: Final = {"call", "stream"}
# Prefix of the name, kind and attributes of each verb's spans, for senders and for agents.
_SENDER_SPANS: Final = {
    "call": ("", SpanKind.CLIENT, _RPC),
    "stream": ("", SpanKind.CLIENT, _RPC),
    "send": ("send ", SpanKind.PRODUCER, _MESSAGING | {"messaging.operation.type": "send"}),
    "publish": ("publish ", SpanKind.PRODUCER, _MESSAGING | {"messaging.operation.type": "send"}),
    "receive": ("receive ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "receive"}),
}
_AGENT_SPANS: Final = {
    "call": ("", SpanKind.SERVER, _RPC),
    "stream": ("", SpanKind.SERVER, _RPC),
    "send": ("process ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "process"}),
    "source": ("process ", SpanKind.CONSUMER, _MESSAGING | {"messaging.operation.type": "process"}),
}


class _Headers(Getter[Mapping[str, str]]):
    """Reads the propagators' headers; peers in other languages capitalise them."""

    def get(self, carrier: Mapping[str, str], key: str) -> list[str] | None:
        """The values of a header."""
        value = carrier.get(key) or carrier.get(key.title())
        return None if value is None else [value]

    def keys(self, carrier: Mapping[str, str]) -> list[str]:
        """The names of all headers."""
        return list(carrier)


_HEADERS: Final = _Headers()


class Tracing:
    """The plugin.

    Args:
        provider: creates the spans; None for OpenTelemetry's global provider, which is set up from the
            environment at the start if it is not set.
    """

    def __init__(self, provider: TracerProvider | None = None) -> None:
        self._provider = provider
        self._tracer = trace.get_tracer(_NAME, version(_NAME), provider)

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """The middleware of one agent: a span for each request."""
        templates = {verb: _template_of(agent, verb) for verb in _AGENT_SPANS}
        tracer, streams = self._tracer, agent.contract.streaming

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def traced(call: Call) -> Any:  # noqa: ANN401 - the handler's result
                # An empty context: the span that was current when the mesh started is no parent.
                parent = extract(call.headers, Context(), _HEADERS)
                span_name, kind, attributes = templates[call.verb]
                span = tracer.start_span(span_name, parent, kind, attributes)
                chunks = _count_chunks(call) if streams else None
                call.add_done_callback(partial(_end, span, call, chunks))
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
        """A span for each request and event that is sent, and for each event received."""
        return self._client_span

    @asynccontextmanager
    async def _client_span(self, operation: ClientOperation) -> AsyncIterator[None]:
        """A span that is never the current one: a stream shares its context with the code that reads it."""
        parent = _parent_of(operation)
        name, kind, attributes = _SENDER_SPANS[operation.verb]
        span = self._tracer.start_span(
            name + operation.target, parent, kind, _attributes_of(operation, attributes)
        )
        if operation.verb != "receive":
            _remove_context(operation.headers)  # it is in `parent` now
            inject(operation.headers, trace.set_span_in_context(span, parent))
        try:
            yield
        except GeneratorExit:  # the caller stopped reading the stream
            raise
        except asyncio.CancelledError:
            _set_error(span, "cancelled", "")
            raise
        except MeshError as exc:
            _set_error_reply(span, operation.verb, exc)
            raise
        except Exception as exc:
            span.record_exception(exc)
            _set_error(span, type(exc).__qualname__, str(exc))
            raise
        finally:
            if operation.verb == "stream":
                span.set_attribute("openagentmesh.chunks", operation.chunks)
            span.end()

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self, instance: Instance) -> AsyncIterator[None]:
        """Set up OpenTelemetry if it is not set up, and export the last spans at the end.

        ValueError if the environment names an exporter that is not installed.
        """
        is_set_up = not isinstance(trace.get_tracer_provider(), trace.ProxyTracerProvider)
        # Without exporters the API alone passes the context on, which costs less.
        if self._provider is None and not is_set_up and (exporters := _exporters_of_environment()):
            trace.set_tracer_provider(_provider(instance.instance_id, exporters))
        try:
            yield
        finally:
            await _flush(self._provider or trace.get_tracer_provider())


def _template_of(agent: Agent, verb: str) -> tuple[str, SpanKind, dict[str, str]]:
    """Name, kind and attributes of all spans of one verb of an agent."""
    prefix, kind, common = _AGENT_SPANS[verb]
    attributes = common | {"openagentmesh.agent.version": agent.contract.version}
    if kind is SpanKind.SERVER:
        attributes |= {"rpc.method": agent.name}
    else:
        attributes |= {"messaging.operation.name": prefix.strip()}
        if verb == "send":
            attributes |= {"messaging.consumer.group.name": f"q.{agent.name}"}
    return prefix + agent.name, kind, attributes


def _attributes_of(operation: ClientOperation, common: Mapping[str, str]) -> dict[str, str]:
    own = {"openagentmesh.request_id": operation.request_id} if operation.request_id else {}
    if operation.verb in _CALLS:
        return {**common, "rpc.method": operation.target, **own}
    named = {"messaging.operation.name": operation.verb, "messaging.destination.name": operation.subject}
    return {**common, **named, **own}


def _parent_of(operation: ClientOperation) -> Context:
    """The running span's context, otherwise that of the headers."""
    if operation.verb == "receive":
        return extract(operation.headers, Context(), _HEADERS)
    current = get_current()
    if trace.get_current_span(current).get_span_context().is_valid:
        return current
    return extract(operation.headers, current, _HEADERS)


def _remove_context(headers: dict[str, str]) -> None:
    fields = get_global_textmap().fields
    for name in [name for name in headers if name.lower() in fields]:
        del headers[name]


def _count_chunks(call: Call) -> list[int]:
    """A list of one number: how many chunks the call has sent."""
    count, send = [0], call.send

    async def send_counted(chunk: object) -> None:
        await send(chunk)
        count[0] += 1

    call.send = send_counted
    return count


def _end(span: Span, call: Call, chunks: list[int] | None, error: MeshError | None) -> None:
    """End the span of an answered request; a caller that stops reading a stream is no error."""
    if error is not None and (chunks is None or not call.is_abandoned):
        _set_error_reply(span, call.verb, error)
    if span.is_recording():
        attributes: dict[str, str | float | None] = {
            "openagentmesh.request_id": call.request_id or None,
            "messaging.destination.name": call.subject if call.verb in {"send", "source"} else None,
            "openagentmesh.chunks": chunks[0] if chunks is not None else None,
        }
        if (usage := call.usage) is not None:
            attributes |= {
                "gen_ai.usage.input_tokens": usage.input_tokens,
                "gen_ai.usage.output_tokens": usage.output_tokens,
                "gen_ai.response.model": usage.model,
                "openagentmesh.usage.cost_usd": usage.estimated_cost_usd,
            }
        span.set_attributes({key: value for key, value in attributes.items() if value is not None})
    span.end()


def _set_error_reply(span: Span, verb: str, error: MeshError) -> None:
    _set_error(span, error.code, str(error))
    if verb in _CALLS:
        span.set_attribute("rpc.response.status_code", error.code)


def _set_error(span: Span, code: str, message: str) -> None:
    span.set_attribute("error.type", code)
    span.set_status(StatusCode.ERROR, message or code)


def _exporters_of_environment() -> list[Callable[[], Any]]:
    """Factories of the installed exporters that `OTEL_TRACES_EXPORTER` names."""
    known = {entry.name: entry for entry in entry_points(group=_EXPORTERS)}
    setting = os.environ.get("OTEL_TRACES_EXPORTER") or "otlp"
    names = [name.strip() for name in setting.split(",") if name.strip() != "none"]
    names = [f"otlp_proto_{_otlp_protocol()}" if name == "otlp" else name for name in names]
    for name in names:
        if name not in known:
            installed = ", ".join(sorted(known)) or "none"
            raise ValueError(
                f"the exporter '{name}' of OTEL_TRACES_EXPORTER is not installed; installed: {installed}. "
                "OTEL_TRACES_EXPORTER=none exports nothing"
            )
    return [known[name].load() for name in names]


def _otlp_protocol() -> str:
    of_traces = os.environ.get("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL")
    return (of_traces or os.environ.get("OTEL_EXPORTER_OTLP_PROTOCOL") or "http/protobuf").partition("/")[0]


def _provider(instance_id: str, exporters: Iterable[Callable[[], Any]]) -> TracerProvider:
    """The SDK's provider, with the sampler, limits and resource of the environment."""
    # Only here: with a provider of the program's own, no SDK is needed.
    from opentelemetry.sdk.resources import OTELResourceDetector, Resource  # noqa: PLC0415
    from opentelemetry.sdk.trace import TracerProvider as SdkProvider  # noqa: PLC0415
    from opentelemetry.sdk.trace.export import BatchSpanProcessor  # noqa: PLC0415

    defaults = {"service.name": _NAME, "service.instance.id": instance_id}
    resource = Resource.create({**defaults, **OTELResourceDetector().detect().attributes})
    # At exit the SDK would wait for a collector that is down; `_flush` exports the last spans instead.
    provider = SdkProvider(resource=resource, shutdown_on_exit=False)
    for exporter in exporters:
        provider.add_span_processor(BatchSpanProcessor(exporter()))
    return provider


async def _flush(provider: TracerProvider) -> None:
    """Export the last spans, for a limited time; in a daemon thread, so that it cannot delay the exit."""
    flush = getattr(provider, "force_flush", None)
    if flush is None:  # the API alone has nothing to send
        return
    loop, done = asyncio.get_running_loop(), asyncio.Event()

    def run() -> None:
        flush()
        # After the timeout the loop may be closed.
        if not loop.is_closed():
            loop.call_soon_threadsafe(done.set)

    threading.Thread(target=run, name="oam-tracing-flush", daemon=True).start()
    try:
        async with asyncio.timeout(_FLUSH_TIMEOUT_S):
            await done.wait()
    except TimeoutError:
        log.warning("tracing: the last spans could not be exported within %gs and are lost", _FLUSH_TIMEOUT_S)
