"""Exporters of tracing: the one of the environment, none, and those of a program's own provider."""

from collections.abc import Iterator
from typing import Any

import pytest
from oam_tracing import Tracing
from openagentmesh import AgentMesh, AgentSpec, PluginFailed, current_call
from opentelemetry import trace

from tests.support.tracing import PARENT, Spans


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
