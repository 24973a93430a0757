"""Spans of the plugin `tracing`."""

import asyncio
from collections.abc import Sequence
from itertools import pairwise

from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor, SpanExportResult
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind

# A `traceparent` header.
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
        """The only span with this name and kind."""
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


def parent(span: ReadableSpan) -> int:
    """The id of the parent of a span, or 0."""
    return span.parent.span_id if span.parent else 0


def assert_chain(*spans: ReadableSpan) -> None:
    """Check that each span is the parent of the next one, in one trace."""
    for outer, inner in pairwise(spans):
        assert outer.context.span_id == parent(inner)
        assert outer.context.trace_id == inner.context.trace_id
