"""The tracing plugin: spans of requests and events, in one trace with the correct parents."""

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from oam_tracing import Tracing
from openagentmesh import AgentMesh, AgentSpec, MeshError
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.meshes import Publisher, start_reading
from tests.support.tracing import Spans, assert_chain, parent
from tests.support.waiting import until


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
