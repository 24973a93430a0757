"""Tracing across hosts: processes that export their spans to a collector."""

import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Self

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span

from tests.support.commands import Up, free_port
from tests.support.modules import MESH, write

TOML = """
host.plugins = ["tracing"]
host.entry_points = false
"""
OWN_SERVER = """
[server]
port = 0
store = ""
"""


def agent(name: str, callee: str = "") -> str:
    """An agent that calls another one, and appends its own name to the answer."""
    result = f"await mesh.call({callee!r}, req)" if callee else "req"
    return f"""
@mesh.agent(AgentSpec(name={name!r}))
async def agent_{name}(req: str) -> str:
    return {result} + " {name}"
"""


class Collector(ThreadingHTTPServer):
    """Receives spans as OTLP over HTTP; `spans` has them with the names of their services."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Post)
        self.spans: list[tuple[str, Span]] = []
        self._serving = threading.Thread(target=self.serve_forever)

    def __enter__(self) -> Self:
        self._serving.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self._serving.join()
        self.server_close()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Post(BaseHTTPRequestHandler):
    server: Collector

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            attributes = {pair.key: pair.value.string_value for pair in resource.resource.attributes}
            for scope in resource.scope_spans:
                self.server.spans += [(attributes["service.name"], span) for span in scope.spans]
        self.send_response(200)
        self.end_headers()

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the name of the standard library
        pass


@pytest.fixture
def collector() -> Iterator[Collector]:
    with Collector() as running:
        yield running


def test_nested_calls_across_two_hosts_are_one_trace(tmp_path: Path, collector: Collector) -> None:
    """Calls through three agents on two hosts are one trace, with the name of each host's service."""
    first, second = tmp_path / "first", tmp_path / "second"
    write(
        first,
        {"mesh.toml": TOML + OWN_SERVER, "agents/ends.py": MESH + agent("front", "middle") + agent("back")},
    )
    env = {"OTEL_EXPORTER_OTLP_ENDPOINT": collector.endpoint}
    with Up(first, env=env) as one:
        write(
            second,
            {"mesh.toml": f'mesh.url = "{one.url}"' + TOML, "agents/m.py": MESH + agent("middle", "back")},
        )
        with Up(second, env=env | {"OTEL_SERVICE_NAME": "second"}) as two:
            assert '"hi back middle front"' == one.run("agent", "call", "front", '"hi"').out.strip()
            two.signal(signal.SIGTERM)
            assert 0 == two.finish().code
        one.signal(signal.SIGTERM)
        assert 0 == one.finish().code
    by_id = {span.span_id: (service, span) for service, span in collector.spans}
    service, span = next(each for each in collector.spans if each[1].name == "back" and each[1].kind == 2)
    path = [(service, span.name, span.kind)]
    while span.parent_span_id:
        service, span = by_id[span.parent_span_id]
        path.insert(0, (service, span.name, span.kind))
    default, server, client = "openagentmesh", Span.SPAN_KIND_SERVER, Span.SPAN_KIND_CLIENT
    assert [
        (default, "front", server),
        (default, "middle", client),
        ("second", "middle", server),
        ("second", "back", client),
        (default, "back", server),
    ] == path
    assert (5, 1) == (len(collector.spans), len({span.trace_id for _, span in collector.spans}))


def test_an_unreachable_collector_delays_nothing(tmp_path: Path) -> None:
    """Requests are answered, and the host stops within seconds and logs that spans are lost."""
    write(tmp_path, {"mesh.toml": TOML + OWN_SERVER, "agents/a.py": MESH + agent("a")})
    with Up(tmp_path, env={"OTEL_EXPORTER_OTLP_ENDPOINT": f"http://127.0.0.1:{free_port()}"}) as up:
        assert '"hi a"' == up.run("agent", "call", "a", '"hi"').out.strip()
        up.signal(signal.SIGTERM)
        result = up.finish(10)
    assert 0 == result.code
    assert "spans could not be exported" in result.out + result.err
