"""The context of tracing: the current span, the parents of spans, and the headers of requests."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing, suppress
from typing import Any

import pytest
from oam_tracing import Tracing
from openagentmesh import AgentMesh, AgentSpec, MeshError, current_call
from opentelemetry import baggage, trace
from opentelemetry.context import attach, detach
from opentelemetry.trace import SpanKind, StatusCode

from tests.support.tracing import PARENT, Spans, parent


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
