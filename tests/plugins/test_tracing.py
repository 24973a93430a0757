"""The tracing plugin: spans of requests and events, in one trace with the correct parents."""

import asyncio
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import aclosing, suppress
from itertools import pairwise
from typing import Any

import pytest
from oam_tracing import Tracing
from openagentmesh import (
    AgentMesh,
    AgentSpec,
    MeshError,
    PermissionDenied,
    PluginFailed,
    Usage,
    current_call,
    report_usage,
)
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.meshes import Publisher, start_reading
from tests.support.waiting import until

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans(InMemorySpanExporter):
    """All spans that have ended."""

    def __init__(self) -> None:
        super().__init__()
        self._exported = asyncio.Event()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self))

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._exported.set()
        return super().export(spans)

    def named(self, name: str, kind: SpanKind) -> ReadableSpan:
        (found,) = [span for span in self.get_finished_spans() if (span.name, span.kind) == (name, kind)]
        return found

    async def wait_for(self, count: int) -> tuple[ReadableSpan, ...]:
        """All spans, of which there must be `count`: an agent's span ends after its answer was sent."""
        async with asyncio.timeout(10):
            while len(found := self.get_finished_spans()) < count:
                self._exported.clear()
                await self._exported.wait()
        assert count == len(found), [span.name for span in found]
        return found


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def traced(url: str, name: str, spans: Spans) -> AsyncIterator[AgentMesh]:
    """A mesh with the plugin and with agents of several kinds, some of which call another one."""
    mesh = AgentMesh(url, plugins=[Tracing(spans.provider)])

    @mesh.agent(AgentSpec(name=f"{name}.responder", version="1.2.3"))
    async def responder(text: str) -> str:
        if text == "refuse":
            raise PermissionDenied("refused")
        if text == "fail":
            raise ValueError("no")
        if text == "hang":
            await asyncio.sleep(30)
        report_usage(Usage(input_tokens=3, output_tokens=5, model="m"))
        return text

    @mesh.agent(AgentSpec(name=f"{name}.nested"))
    async def nested(text: str) -> str:
        return str(await mesh.call(f"{name}.responder", text))

    @mesh.agent(AgentSpec(name=f"{name}.streamer"))
    async def streamer(number: int) -> AsyncIterator[str]:
        for each in range(number):
            yield await mesh.call(f"{name}.responder", str(each))

    @mesh.agent(AgentSpec(name=f"{name}.threaded"))
    def threaded(text: str) -> str:
        return format(trace.get_current_span().get_span_context().trace_id, "032x")

    @mesh.agent(AgentSpec(name=f"{name}.messages"), sources=[mesh.subject_source(f"{name}.news")])
    async def messages(text: str) -> None:
        await mesh.call(f"{name}.responder", text)

    async with mesh:
        yield mesh


def parent(span: ReadableSpan) -> int:
    return span.parent.span_id if span.parent else 0


def assert_chain(*spans: ReadableSpan) -> None:
    """Check that each span is the parent of the next one, in one trace."""
    for outer, inner in pairwise(spans):
        assert outer.context.span_id == parent(inner)
        assert outer.context.trace_id == inner.context.trace_id


async def test_nested_calls_are_one_trace(traced: AgentMesh, name: str, spans: Spans) -> None:
    """The caller's span is the parent of the agent's, also for a call that this agent makes."""
    assert "hi" == await traced.call(f"{name}.nested", "hi")
    await spans.wait_for(4)
    outer, inner = f"{name}.nested", f"{name}.responder"
    trace_ = [spans.named(n, kind) for n in (outer, inner) for kind in (SpanKind.CLIENT, SpanKind.SERVER)]
    assert_chain(*trace_)
    assert 0 == parent(trace_[0])
    assert StatusCode.UNSET == trace_[-1].status.status_code
    attributes = trace_[-1].attributes or {}
    assert ("openagentmesh", inner, "1.2.3") == tuple(
        attributes[key] for key in ("rpc.system.name", "rpc.method", "openagentmesh.agent.version")
    )
    assert (3, 5, "m") == tuple(
        attributes[f"gen_ai.{key}"] for key in ("usage.input_tokens", "usage.output_tokens", "response.model")
    )
    request_id = (trace_[-2].attributes or {})["openagentmesh.request_id"]
    assert request_id == attributes["openagentmesh.request_id"]


async def test_a_stream_is_one_span_with_its_chunks(traced: AgentMesh, name: str, spans: Spans) -> None:
    """Caller and agent have one span each, with the number of chunks; nested calls are its children."""
    assert ["0", "1", "2"] == [chunk async for chunk in traced.stream(f"{name}.streamer", 3)]
    await spans.wait_for(8)
    client, server = (spans.named(f"{name}.streamer", kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
    assert_chain(client, server)
    assert [3, 3] == [(span.attributes or {})["openagentmesh.chunks"] for span in (client, server)]
    nested = [span for span in spans.get_finished_spans() if parent(span) == server.context.span_id]
    assert [f"{name}.responder"] * 3 == [span.name for span in nested]


async def test_sends_and_messages_have_producer_and_consumer_spans(
    traced: AgentMesh, name: str, spans: Spans
) -> None:
    """A `send`, and a message of a source, have a PRODUCER span and a CONSUMER span in one trace."""
    await traced.send(f"{name}.nested", "hi")
    await traced.publish(f"{name}.news", "news")
    await spans.wait_for(8)
    assert_chain(
        spans.named(f"send {name}.nested", SpanKind.PRODUCER),
        spans.named(f"process {name}.nested", SpanKind.CONSUMER),
    )
    published = spans.named(f"publish {name}.news", SpanKind.PRODUCER)
    assert_chain(published, read := spans.named(f"process {name}.messages", SpanKind.CONSUMER))
    subjects = [(span.attributes or {})["messaging.destination.name"] for span in (published, read)]
    assert [f"{name}.news"] * 2 == subjects
    children = [span for span in spans.get_finished_spans() if parent(span) == read.context.span_id]
    assert [f"{name}.responder"] == [span.name for span in children]


async def test_events_have_producer_and_consumer_spans(url: str, name: str, spans: Spans) -> None:
    """An event has a PRODUCER span and, at a subscriber, a CONSUMER span in one trace."""
    plugin = Tracing(spans.provider)
    async with AgentMesh(url, plugins=[plugin]) as mesh, AgentMesh(url, plugins=[plugin]) as subscriber:
        publisher = Publisher(mesh, name)
        await mesh.catalog()
        reading = await start_reading(subscriber, subscriber.subscribe(agent=name), 1)
        publisher.emit(7)
        assert [7] == await reading
    await spans.wait_for(2)
    (subject,) = {span.name.partition(" ")[2] for span in spans.get_finished_spans()}
    assert_chain(
        spans.named(f"publish {subject}", SpanKind.PRODUCER),
        spans.named(f"receive {subject}", SpanKind.CONSUMER),
    )


@pytest.mark.parametrize(
    ("value", "code"), [("refuse", "permission_denied"), ("fail", "handler_error"), (7, "invalid_input")]
)
async def test_errors_are_recorded_in_both_spans(
    traced: AgentMesh, name: str, spans: Spans, value: object, code: str
) -> None:
    """The spans of caller and agent have the error's code; the agent's has an exception of the handler."""
    with pytest.raises(MeshError):
        await traced.call(f"{name}.responder", value)
    for span in await spans.wait_for(2):
        attributes = span.attributes or {}
        assert [code] * 2 == [attributes["error.type"], attributes["rpc.response.status_code"]]
        assert span.status.status_code is StatusCode.ERROR
    events = spans.named(f"{name}.responder", SpanKind.SERVER).events
    assert (["exception"] if value == "fail" else []) == [event.name for event in events]


async def test_a_timeout_is_recorded_in_both_spans(traced: AgentMesh, name: str, spans: Spans) -> None:
    """The spans of caller and agent end with the code `timeout`."""
    with pytest.raises(MeshError):
        await traced.call(f"{name}.responder", "hang", timeout=0.1)
    found = await spans.wait_for(2)
    codes = {(span.attributes or {})["error.type"] for span in found}
    assert {"timeout"} == codes


async def test_the_callers_own_span_stays_the_current_one(traced: AgentMesh, name: str, spans: Spans) -> None:
    """Between and after chunks, errors and cancellations, the caller's own span is the current one."""
    tracer = spans.provider.get_tracer("test")
    with tracer.start_as_current_span("own") as own:
        async with aclosing(traced.stream(f"{name}.streamer", 1000)) as chunks:
            async for chunk in chunks:
                assert own is trace.get_current_span()
                if chunk == "2":
                    break
        assert own is trace.get_current_span()
        with pytest.raises(MeshError):
            await traced.call(f"{name}.responder", "fail")
        assert own is trace.get_current_span()
        hanging = asyncio.create_task(traced.call(f"{name}.responder", "hang"))
        await asyncio.sleep(0)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert own is trace.get_current_span()
    assert trace.INVALID_SPAN is trace.get_current_span()
    abandoned = spans.named(f"{name}.streamer", SpanKind.CLIENT)
    assert StatusCode.UNSET == abandoned.status.status_code
    assert own.get_span_context().span_id == parent(abandoned)


async def test_a_span_around_the_start_is_no_parent_of_requests(url: str, name: str, spans: Spans) -> None:
    """The span in which a mesh is started is not the parent of the requests that it answers."""
    mesh, tracer = AgentMesh(url, plugins=[Tracing(spans.provider)]), spans.provider.get_tracer("test")

    @mesh.agent(AgentSpec(name=name))
    async def responder(req: dict[str, Any]) -> str:
        return "ok"

    token = attach(baggage.set_baggage("of", "the start"))
    try:
        with tracer.start_as_current_span("start"):
            await mesh.__aenter__()
    finally:
        detach(token)
    async with AgentMesh(url) as untraced:
        await untraced.call(name, {})
    await mesh.__aexit__(None, None, None)
    assert 0 == parent(spans.named(name, SpanKind.SERVER))


async def test_events_of_publishers_have_no_parent(url: str, name: str, spans: Spans) -> None:
    """Neither the span in which its mesh was started, nor the request that declared it, is its parent."""
    mesh, tracer = AgentMesh(url, plugins=[Tracing(spans.provider)]), spans.provider.get_tracer("test")

    def declare_publisher(agent: str) -> None:
        @mesh.agent(AgentSpec(name=agent))
        async def publisher() -> AsyncIterator[str]:
            with suppress(RuntimeError):
                yield current_call().agent
            yield "no request"

    declare_publisher(f"{name}.first")

    @mesh.agent(AgentSpec(name=f"{name}.declaring"))
    async def declaring(req: dict[str, Any]) -> None:
        declare_publisher(f"{name}.second")

    with tracer.start_as_current_span("start"):
        await mesh.__aenter__()
    await mesh.call(f"{name}.declaring", {})
    await mesh.catalog()
    # The start, the call at caller and agent, and an event of each publisher.
    await spans.wait_for(5)
    await mesh.__aexit__(None, None, None)
    for agent in ("first", "second"):
        assert 0 == parent(spans.named(f"publish mesh.agent.{name}.{agent}.events", SpanKind.PRODUCER))


async def test_an_abandoned_stream_is_no_error(traced: AgentMesh, name: str, spans: Spans) -> None:
    """When a caller stops reading a stream, the spans of caller and agent have no error."""
    async with aclosing(traced.stream(f"{name}.streamer", 1_000_000)) as chunks:
        assert "0" == await anext(chunks)
    server = (f"{name}.streamer", SpanKind.SERVER)
    await until(lambda: server in [(span.name, span.kind) for span in spans.get_finished_spans()])
    for kind in (SpanKind.SERVER, SpanKind.CLIENT):
        assert StatusCode.UNSET == spans.named(f"{name}.streamer", kind).status.status_code


async def test_an_invalid_result_is_an_error(traced: AgentMesh, name: str, spans: Spans) -> None:
    """A result of another type than declared is an error in the spans of caller and agent."""

    @traced.agent(AgentSpec(name=f"{name}.invalid"))
    async def invalid(req: dict[str, Any]) -> int:
        return "no number"  # type: ignore[return-value] # an invalid result

    with pytest.raises(MeshError):
        await traced.call(f"{name}.invalid", {})
    for span in await spans.wait_for(2):
        assert "handler_error" == (span.attributes or {})["error.type"]


async def test_chunks_of_a_send_to_a_streamer_are_counted(traced: AgentMesh, name: str, spans: Spans) -> None:
    """The CONSUMER span of a `send` with `on_reply` to a streamer has the number of its chunks."""
    done = asyncio.Event()
    replies: list[object] = []

    def reply(value: object) -> None:
        replies.append(value)
        if len(replies) == 2:
            done.set()

    await traced.send(f"{name}.streamer", 2, on_reply=reply)
    await asyncio.wait_for(done.wait(), 10)
    await spans.wait_for(6)
    consumed = spans.named(f"process {name}.streamer", SpanKind.CONSUMER)
    assert 2 == (consumed.attributes or {})["openagentmesh.chunks"]


async def test_baggage_is_sent_without_a_current_span(traced: AgentMesh, name: str, url: str) -> None:
    """Baggage that a program has set without a span is in the headers of its requests."""
    received: list[str | None] = []
    async with AgentMesh(url) as untraced:

        @untraced.agent(AgentSpec(name=f"{name}.receiver"))
        async def receiver(req: dict[str, Any]) -> None:
            received.append(current_call().headers.get("baggage"))

        await untraced.catalog()
        token = attach(baggage.set_baggage("key", "value"))
        try:
            await traced.call(f"{name}.receiver", {})
        finally:
            detach(token)
    assert ["key=value"] == received


async def test_headers_of_a_caller_are_the_parent_without_a_span(
    traced: AgentMesh, name: str, spans: Spans
) -> None:
    """Without a current span, a caller's own `traceparent` is the parent, in any capitalization."""
    for header in ("traceparent", "Traceparent"):
        await traced.call(f"{name}.responder", "hi", headers={header: PARENT})
    for span in await spans.wait_for(4):
        assert PARENT.split("-")[1] == format(span.context.trace_id, "032x")


async def test_a_malformed_context_starts_a_new_trace(
    url: str, traced: AgentMesh, name: str, spans: Spans
) -> None:
    """A request with malformed headers of a context is answered, and starts a new trace."""
    async with AgentMesh(url) as untraced:
        for value in ("00-xyz", "-" * 500, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"):
            headers = {"traceparent": value, "tracestate": "=,=;" * 99, "baggage": "%%%,;=" * 50}
            assert "hi" == await untraced.call(f"{name}.responder", "hi", headers=headers)
    assert [0, 0, 0] == [parent(span) for span in await spans.wait_for(3)]


async def test_a_handler_in_a_thread_is_in_the_trace(traced: AgentMesh, name: str, spans: Spans) -> None:
    """In a plain `def`, the current span is that of its request."""
    trace_id = await traced.call(f"{name}.threaded", "hi")
    assert trace_id == format(spans.named(f"{name}.threaded", SpanKind.CLIENT).context.trace_id, "032x")


@pytest.fixture
def _untouched_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    yield
    assert trace._TRACER_PROVIDER is None


@pytest.mark.usefixtures("_untouched_provider")
async def test_an_exporter_that_is_not_installed_fails_the_start(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The error names the plugin, the exporter and the installed exporters."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jagger")
    with pytest.raises(PluginFailed, match=r"'tracing' cannot start: .*'jagger'.*console, otlp_proto_http"):
        async with AgentMesh(url, plugins=[Tracing()]):
            pass


@pytest.mark.usefixtures("_untouched_provider")
async def test_without_an_exporter_the_context_is_passed_on(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With `OTEL_TRACES_EXPORTER=none` no provider is set up, and nested calls have the caller's context."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    received: list[str] = []
    async with AgentMesh(url, plugins=[Tracing()]) as mesh, AgentMesh(url) as untraced:

        @mesh.agent(AgentSpec(name=f"{name}.nested"))
        async def nested(req: dict[str, Any]) -> None:
            await mesh.call(f"{name}.responder", {})

        @untraced.agent(AgentSpec(name=f"{name}.responder"))
        async def responder(req: dict[str, Any]) -> None:
            received.append(current_call().headers["traceparent"])

        await untraced.catalog()
        await mesh.call(f"{name}.nested", {}, headers={"traceparent": PARENT})
    assert [PARENT] == received


async def test_a_program_with_a_provider_needs_no_exporter(
    url: str, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a provider of the program's own, the exporter of the environment is ignored."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jagger")
    async with AgentMesh(url, plugins=[Tracing(spans.provider)]) as mesh:
        assert mesh.instance_id
