"""The tracing plugin: one trace of all that belongs together, with the right parents and nothing else."""

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

PARENT = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"


class Spans(InMemorySpanExporter):
    """All spans that have ended, whoever made them."""

    def __init__(self) -> None:
        super().__init__()
        self._more = asyncio.Event()
        self.provider = TracerProvider(shutdown_on_exit=False)
        self.provider.add_span_processor(SimpleSpanProcessor(self))

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        self._more.set()
        return super().export(spans)

    def named(self, name: str, kind: SpanKind) -> ReadableSpan:
        (found,) = [span for span in self.get_finished_spans() if (span.name, span.kind) == (name, kind)]
        return found

    async def have(self, number: int) -> tuple[ReadableSpan, ...]:
        """As many spans as there are to be: those of who answers end after the answer."""
        async with asyncio.timeout(10):
            while len(found := self.get_finished_spans()) < number:
                self._more.clear()
                await self._more.wait()
        assert number == len(found), [span.name for span in found]
        return found


@pytest.fixture
def spans() -> Spans:
    return Spans()


@pytest.fixture
async def traced(url: str, name: str, spans: Spans) -> AsyncIterator[AgentMesh]:
    """A mesh with the plugin: one agent of each kind, one of which asks another one."""
    mesh = AgentMesh(url, plugins=[Tracing(spans.provider)])

    @mesh.agent(AgentSpec(name=f"{name}.asked", version="1.2.3"))
    async def asked(what: str) -> str:
        if what == "refuse":
            raise PermissionDenied("not you")
        if what == "fail":
            raise ValueError("no")
        if what == "hang":
            await asyncio.sleep(30)
        report_usage(Usage(input_tokens=3, output_tokens=5, model="m"))
        return what

    @mesh.agent(AgentSpec(name=f"{name}.asks"))
    async def asks(what: str) -> str:
        return str(await mesh.call(f"{name}.asked", what))

    @mesh.agent(AgentSpec(name=f"{name}.counts"))
    async def counts(number: int) -> AsyncIterator[str]:
        for each in range(number):
            yield await mesh.call(f"{name}.asked", str(each))

    @mesh.agent(AgentSpec(name=f"{name}.plain"))
    def plain(what: str) -> str:
        return format(trace.get_current_span().get_span_context().trace_id, "032x")

    @mesh.agent(AgentSpec(name=f"{name}.reads"), sources=[mesh.subject_source(f"{name}.news")])
    async def reads(what: str) -> None:
        await mesh.call(f"{name}.asked", what)

    async with mesh:
        yield mesh


def parent(span: ReadableSpan) -> int:
    return span.parent.span_id if span.parent else 0


def chain(*spans: ReadableSpan) -> None:
    """Each span is the parent of the next one, in one trace."""
    for above, below in pairwise(spans):
        assert above.context.span_id == parent(below)
        assert above.context.trace_id == below.context.trace_id


async def test_nested_calls_are_one_trace(traced: AgentMesh, name: str, spans: Spans) -> None:
    """Who asks is the parent of who answers, through an agent that asks another one."""
    assert "hi" == await traced.call(f"{name}.asks", "hi")
    await spans.have(4)
    outer, inner = f"{name}.asks", f"{name}.asked"
    way = [spans.named(n, kind) for n in (outer, inner) for kind in (SpanKind.CLIENT, SpanKind.SERVER)]
    chain(*way)
    assert 0 == parent(way[0])
    assert StatusCode.UNSET == way[-1].status.status_code
    told = way[-1].attributes or {}
    assert ("openagentmesh", inner, "1.2.3") == tuple(
        told[key] for key in ("rpc.system.name", "rpc.method", "openagentmesh.agent.version")
    )
    assert (3, 5, "m") == tuple(
        told[f"gen_ai.{key}"] for key in ("usage.input_tokens", "usage.output_tokens", "response.model")
    )
    asked_with = (way[-2].attributes or {})["openagentmesh.request_id"]
    assert asked_with == told["openagentmesh.request_id"]


async def test_a_stream_is_one_span_with_its_chunks(traced: AgentMesh, name: str, spans: Spans) -> None:
    """From the request to the last chunk, on both sides; what it asks for meanwhile is below it."""
    assert ["0", "1", "2"] == [chunk async for chunk in traced.stream(f"{name}.counts", 3)]
    await spans.have(8)
    ours, theirs = (spans.named(f"{name}.counts", kind) for kind in (SpanKind.CLIENT, SpanKind.SERVER))
    chain(ours, theirs)
    assert [3, 3] == [(span.attributes or {})["openagentmesh.chunks"] for span in (ours, theirs)]
    nested = [span for span in spans.get_finished_spans() if parent(span) == theirs.context.span_id]
    assert [f"{name}.asked"] * 3 == [span.name for span in nested]


async def test_what_is_sent_is_produced_and_consumed(traced: AgentMesh, name: str, spans: Spans) -> None:
    """`send` to an agent, and a message that drives one."""
    await traced.send(f"{name}.asks", "hi")
    await traced.publish(f"{name}.news", "news")
    await spans.have(8)
    chain(
        spans.named(f"send {name}.asks", SpanKind.PRODUCER),
        spans.named(f"process {name}.asks", SpanKind.CONSUMER),
    )
    published = spans.named(f"publish {name}.news", SpanKind.PRODUCER)
    chain(published, read := spans.named(f"process {name}.reads", SpanKind.CONSUMER))
    subjects = [(span.attributes or {})["messaging.destination.name"] for span in (published, read)]
    assert [f"{name}.news"] * 2 == subjects
    below = [span for span in spans.get_finished_spans() if parent(span) == read.context.span_id]
    assert [f"{name}.asked"] == [span.name for span in below]


async def test_events_are_produced_and_received(url: str, name: str, spans: Spans) -> None:
    """What a publisher emits and a subscriber gets are of one trace."""
    plugin = Tracing(spans.provider)
    async with AgentMesh(url, plugins=[plugin]) as emitting, AgentMesh(url, plugins=[plugin]) as hearing:
        publisher = Publisher(emitting, name)
        await emitting.catalog()
        feed = await start_reading(hearing, hearing.subscribe(agent=name), 1)
        publisher.emit(7)
        assert [7] == await feed
    await spans.have(2)
    (subject,) = {span.name.partition(" ")[2] for span in spans.get_finished_spans()}
    chain(
        spans.named(f"publish {subject}", SpanKind.PRODUCER),
        spans.named(f"receive {subject}", SpanKind.CONSUMER),
    )


@pytest.mark.parametrize(
    ("what", "code"), [("refuse", "permission_denied"), ("fail", "handler_error"), (7, "invalid_input")]
)
async def test_errors_stand_on_the_spans(
    traced: AgentMesh, name: str, spans: Spans, what: object, code: str
) -> None:
    """With the error's code, on both sides; an exception of the handler with its traceback."""
    with pytest.raises(MeshError):
        await traced.call(f"{name}.asked", what)
    for span in await spans.have(2):
        said = span.attributes or {}
        assert [code] * 2 == [said["error.type"], said["rpc.response.status_code"]]
        assert span.status.status_code is StatusCode.ERROR
    events = spans.named(f"{name}.asked", SpanKind.SERVER).events
    assert (["exception"] if what == "fail" else []) == [event.name for event in events]


async def test_a_request_out_of_time_says_so(traced: AgentMesh, name: str, spans: Spans) -> None:
    """Both sides say that time was up, and both spans end."""
    with pytest.raises(MeshError):
        await traced.call(f"{name}.asked", "hang", timeout=0.1)
    found = await spans.have(2)
    codes = {(span.attributes or {})["error.type"] for span in found}
    assert {"timeout"} == codes


async def test_nothing_is_left_in_the_callers_context(traced: AgentMesh, name: str, spans: Spans) -> None:
    """Between and after chunks, errors and cancellations, the caller's own span is the current one."""
    tracer = spans.provider.get_tracer("test")
    with tracer.start_as_current_span("mine") as mine:
        async with aclosing(traced.stream(f"{name}.counts", 1000)) as chunks:
            async for chunk in chunks:
                assert mine is trace.get_current_span()
                if chunk == "2":
                    break
        assert mine is trace.get_current_span()
        with pytest.raises(MeshError):
            await traced.call(f"{name}.asked", "fail")
        assert mine is trace.get_current_span()
        hanging = asyncio.create_task(traced.call(f"{name}.asked", "hang"))
        await asyncio.sleep(0)
        hanging.cancel()
        await asyncio.gather(hanging, return_exceptions=True)
        assert mine is trace.get_current_span()
    assert trace.INVALID_SPAN is trace.get_current_span()
    abandoned = spans.named(f"{name}.counts", SpanKind.CLIENT)
    assert StatusCode.UNSET == abandoned.status.status_code
    assert mine.get_span_context().span_id == parent(abandoned)


async def test_a_span_around_the_start_is_nobodys_parent(url: str, name: str, spans: Spans) -> None:
    """A mesh that is started within a span answers requests of others in their traces, not in that one."""
    mesh, tracer = AgentMesh(url, plugins=[Tracing(spans.provider)]), spans.provider.get_tracer("test")

    @mesh.agent(AgentSpec(name=name))
    async def asked(req: dict[str, Any]) -> str:
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


async def test_what_runs_by_itself_has_no_parent(url: str, name: str, spans: Spans) -> None:
    """A publisher belongs neither to the span in which its mesh was started, nor to who declared it."""
    mesh, tracer = AgentMesh(url, plugins=[Tracing(spans.provider)]), spans.provider.get_tracer("test")

    def publisher(agent: str) -> None:
        @mesh.agent(AgentSpec(name=agent))
        async def ticks() -> AsyncIterator[str]:
            with suppress(RuntimeError):
                yield current_call().agent
            yield "nobody's request"

    publisher(f"{name}.first")

    @mesh.agent(AgentSpec(name=f"{name}.maker"))
    async def maker(req: dict[str, Any]) -> None:
        publisher(f"{name}.second")

    with tracer.start_as_current_span("start"):
        await mesh.__aenter__()
    await mesh.call(f"{name}.maker", {})
    await mesh.catalog()
    # The start, the call on both sides, and an event of each publisher.
    await spans.have(5)
    await mesh.__aexit__(None, None, None)
    for agent in ("first", "second"):
        assert 0 == parent(spans.named(f"publish mesh.agent.{name}.{agent}.events", SpanKind.PRODUCER))


async def test_who_stops_to_read_makes_no_error(traced: AgentMesh, name: str, spans: Spans) -> None:
    """A stream that is left after a chunk is a success on both sides."""
    async with aclosing(traced.stream(f"{name}.counts", 1_000_000)) as chunks:
        assert "0" == await anext(chunks)
    async with asyncio.timeout(10):
        while not any(
            s.name == f"{name}.counts" and s.kind == SpanKind.SERVER for s in spans.get_finished_spans()
        ):
            await asyncio.sleep(0.01)
    for kind in (SpanKind.SERVER, SpanKind.CLIENT):
        assert StatusCode.UNSET == spans.named(f"{name}.counts", kind).status.status_code


async def test_what_fails_after_the_handler_is_an_error(traced: AgentMesh, name: str, spans: Spans) -> None:
    """A result of another type than declared, which the caller is told of as an error."""

    @traced.agent(AgentSpec(name=f"{name}.wrong"))
    async def wrong(req: dict[str, Any]) -> int:
        return "no number"  # type: ignore[return-value] # what is tested

    with pytest.raises(MeshError):
        await traced.call(f"{name}.wrong", {})
    for span in await spans.have(2):
        assert "handler_error" == (span.attributes or {})["error.type"]


async def test_chunks_of_what_was_sent_are_counted(traced: AgentMesh, name: str, spans: Spans) -> None:
    """A streamer that was sent something with `on_reply` streams, too."""
    done = asyncio.Event()
    replies: list[object] = []

    def reply(value: object) -> None:
        replies.append(value)
        if len(replies) == 2:
            done.set()

    await traced.send(f"{name}.counts", 2, on_reply=reply)
    await asyncio.wait_for(done.wait(), 10)
    await spans.have(6)
    consumed = spans.named(f"process {name}.counts", SpanKind.CONSUMER)
    assert 2 == (consumed.attributes or {})["openagentmesh.chunks"]


async def test_baggage_travels_without_a_span(traced: AgentMesh, name: str, url: str) -> None:
    """What a program has set with the API alone leaves with its requests."""
    seen: list[str | None] = []
    async with AgentMesh(url) as untraced:

        @untraced.agent(AgentSpec(name=f"{name}.sees"))
        async def sees(req: dict[str, Any]) -> None:
            seen.append(current_call().headers.get("baggage"))

        await untraced.catalog()
        token = attach(baggage.set_baggage("who", "me"))
        try:
            await traced.call(f"{name}.sees", {})
        finally:
            detach(token)
    assert ["who=me"] == seen


async def test_a_gateway_hands_its_callers_trace_on(traced: AgentMesh, name: str, spans: Spans) -> None:
    """The headers that a caller gives itself count where there is no span, whatever their capitals."""
    for header in ("traceparent", "Traceparent"):
        await traced.call(f"{name}.asked", "hi", headers={header: PARENT})
    for span in await spans.have(4):
        assert PARENT.split("-")[1] == format(span.context.trace_id, "032x")


async def test_a_broken_header_begins_a_new_trace(
    url: str, traced: AgentMesh, name: str, spans: Spans
) -> None:
    """What strangers send as a context never fails a request."""
    async with AgentMesh(url) as untraced:
        for value in ("00-xyz", "-" * 500, "00-" + "0" * 32 + "-" + "0" * 16 + "-01"):
            headers = {"traceparent": value, "tracestate": "=,=;" * 99, "baggage": "%%%,;=" * 50}
            assert "hi" == await untraced.call(f"{name}.asked", "hi", headers=headers)
    assert [0, 0, 0] == [parent(span) for span in await spans.have(3)]


async def test_a_handler_in_a_thread_is_in_the_trace(traced: AgentMesh, name: str, spans: Spans) -> None:
    """A plain `def` sees the span of its request."""
    seen = await traced.call(f"{name}.plain", "hi")
    assert seen == format(spans.named(f"{name}.plain", SpanKind.CLIENT).context.trace_id, "032x")


@pytest.fixture
def _untouched_provider(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(trace, "_TRACER_PROVIDER", None)
    yield
    assert trace._TRACER_PROVIDER is None


@pytest.mark.usefixtures("_untouched_provider")
async def test_an_exporter_that_is_not_there_stops_the_start(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the plugin's and the exporter's name, with those that there are."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jagger")
    with pytest.raises(PluginFailed, match=r"'tracing' cannot start: .*'jagger'.*console, otlp_proto_http"):
        async with AgentMesh(url, plugins=[Tracing()]):
            pass


@pytest.mark.usefixtures("_untouched_provider")
async def test_without_an_exporter_the_context_is_handed_on(
    url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`OTEL_TRACES_EXPORTER=none` sets nothing up; an agent still carries its caller's trace further."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "none")
    seen: list[str] = []
    async with AgentMesh(url, plugins=[Tracing()]) as mesh, AgentMesh(url) as untraced:

        @mesh.agent(AgentSpec(name=f"{name}.asks"))
        async def asks(req: dict[str, Any]) -> None:
            await mesh.call(f"{name}.asked", {})

        @untraced.agent(AgentSpec(name=f"{name}.asked"))
        async def asked(req: dict[str, Any]) -> None:
            seen.append(current_call().headers["traceparent"])

        await untraced.catalog()
        await mesh.call(f"{name}.asks", {}, headers={"traceparent": PARENT})
    assert [PARENT] == seen


async def test_a_program_with_a_provider_needs_no_exporter(
    url: str, spans: Spans, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the environment names is not looked at where spans go is known already."""
    monkeypatch.setenv("OTEL_TRACES_EXPORTER", "jagger")
    async with AgentMesh(url, plugins=[Tracing(spans.provider)]) as mesh:
        assert mesh.instance_id
