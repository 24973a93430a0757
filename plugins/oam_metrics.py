"""Metrics for Prometheus at `/metrics`: requests, durations, errors, reloads and the event loop's lag."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import wait
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Annotated, Any, Final

from openagentmesh import Agent, Call, Endpoint, Instance, MeshError, Middleware, NodeStatus, hookimpl
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# How often the event loop's lag is measured.
_LAG_PERIOD_S: Final = 0.5
# The worst of so many measurements is shown: those of a minute, so that no scrape misses one.
_LAG_COUNT: Final = 120
# Agents choose their error codes: further ones of an agent are counted together.
_MAX_CODES: Final = 50
_MAX_CODE: Final = 64
# How long a scrape waits for the event loop.
_SCRAPE_TIMEOUT_S: Final = 2.0


class Settings(BaseModel):
    """`[plugins.metrics]`: where `/metrics` is served; port 0 is any free one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 9464


class Metrics:
    """The plugin: counts requests, and serves the counts over HTTP while the mesh is connected.

    Args:
        settings: for `AgentMesh(plugins=[Metrics(Settings(...))])`; a host passes those of mesh.toml.

    Attributes:
        port: where `/metrics` is served; 0 while it is not.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.port = 0
        self._settings = settings or Settings()
        self.registry = registry = CollectorRegistry()
        labels = ["agent", "verb"]
        self._requests = Counter("oam_requests", "Requests answered.", labels, registry=registry)
        about = "The duration of requests."
        self._seconds = Histogram("oam_request_seconds", about, labels, buckets=_BUCKETS, registry=registry)
        self._errors = Counter(
            "oam_errors", "Requests answered by an error.", ["agent", "code"], registry=registry
        )
        self._chunks = Counter("oam_chunks", "Chunks of streams sent.", ["agent"], registry=registry)
        self._reloads = Counter("oam_reloads", "Reloads, done or refused.", ["result"], registry=registry)
        self._lag = Gauge(
            "oam_loop_lag_seconds",
            "How late the event loop was, at worst, in the last minute.",
            registry=registry,
        )
        self._codes: dict[str, set[str]] = {}
        # By agent and verb.
        self._series: dict[str, dict[str, tuple[Counter, Histogram]]] = {}

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """Where `/metrics` is served."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings) -> None:
        """Apply the settings; host and port cannot change while it serves."""
        if self.port and settings != self._settings:
            raise ValueError("another host or port for /metrics needs a restart")
        self._settings = settings

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """The middleware of one agent; the series of its verbs exist from the start."""
        name, streams = agent.name, agent.contract.streaming
        series = self._series.setdefault(name, {})
        if agent.contract.invocable:
            self._series_of(name, "stream" if streams else "call", series)
        if agent.sources:
            self._series_of(name, "source", series)
        chunks = self._chunks.labels(name) if streams else None
        self._codes.setdefault(name, set())

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def counted(call: Call) -> Any:  # noqa: ANN401 - the handler's result
                requests, seconds = series.get(call.verb) or self._series_of(name, call.verb, series)
                if chunks is not None:
                    send = call.send

                    async def send_counted(chunk: object) -> None:
                        await send(chunk)
                        chunks.inc()

                    call.send = send_counted
                call.add_done_callback(partial(self._count_error, call, streams))
                started = perf_counter()
                try:
                    return await endpoint(call)
                finally:
                    seconds.observe(perf_counter() - started)
                    requests.inc()

            return counted

        return middleware

    def _series_of(
        self, name: str, verb: str, series: dict[str, tuple[Counter, Histogram]]
    ) -> tuple[Counter, Histogram]:
        series[verb] = found = self._requests.labels(name, verb), self._seconds.labels(name, verb)
        return found

    def _count_error(self, call: Call, streams: bool, error: MeshError | None) -> None:  # noqa: FBT001 - bound to it
        codes = self._codes.get(call.agent)  # a removed agent has no series any more
        # That a caller stops reading a stream is no error.
        if error is None or codes is None or (streams and call.is_abandoned):
            return
        # Authors choose codes, of any length and content.
        code = error.code[:_MAX_CODE].encode("utf-8", "replace").decode()
        if code not in codes and len(codes) >= _MAX_CODES:
            code = "others"
        codes.add(code)
        self._errors.labels(call.agent, code).inc()

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Remove the series of an agent."""
        for verb in self._series.pop(name, ()):
            self._requests.remove(name, verb)
            self._seconds.remove(name, verb)
        self._chunks.remove(name)
        for code in self._codes.pop(name, ()):
            self._errors.remove(name, code)

    @hookimpl
    def mesh_reloaded(self) -> None:
        """Count a reload."""
        self._reloads.labels("done").inc()

    @hookimpl
    def mesh_reload_failed(self) -> None:
        """Count a refused reload."""
        self._reloads.labels("refused").inc()

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self, instance: Instance) -> AsyncIterator[None]:
        """Serve `/metrics`; OSError if the port is in use."""
        status = StatusCollector(instance, asyncio.get_running_loop())
        self.registry.register(status)
        settings = self._settings
        try:
            server, thread = start_http_server(settings.port, settings.host, self.registry)
        except OSError as exc:
            self.registry.unregister(status)
            address = f"{settings.host}:{settings.port}"
            raise OSError(f"/metrics cannot be served at {address}: {exc.strerror}") from exc
        self.port = server.server_port
        measuring = asyncio.create_task(self._measure_lag())
        try:
            yield
        finally:
            measuring.cancel()
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
            self.registry.unregister(status)
            self.port = 0

    async def _measure_lag(self) -> None:
        loop = asyncio.get_running_loop()
        lags: deque[float] = deque(maxlen=_LAG_COUNT)
        while True:
            started = loop.time()
            await asyncio.sleep(_LAG_PERIOD_S)
            lags.append(max(0.0, loop.time() - started - _LAG_PERIOD_S))
            self._lag.set(max(lags))


class StatusCollector(Collector):
    """The node's own counts: read on its event loop, served in the server's thread."""

    def __init__(self, instance: Instance, loop: asyncio.AbstractEventLoop) -> None:
        self._instance, self._loop, self._status = instance, loop, NodeStatus(instance_id="")

    async def _read(self) -> None:
        self._status = self._instance.status()

    def _update(self) -> None:
        """Read the status; while the loop is blocked, the last one stays."""
        reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
        if not wait([reading], _SCRAPE_TIMEOUT_S).done:
            reading.cancel()
        elif exc := reading.exception():
            log.error("metrics: reading the status failed, the last one is served", exc_info=exc)

    def collect(self) -> Iterator[Metric]:
        """The metrics of the node's status."""
        self._update()
        in_flight = GaugeMetricFamily("oam_in_flight", "Requests in flight.", labels=["agent"])
        waiting = GaugeMetricFamily("oam_waiting", "Requests that wait for a slot.", labels=["agent"])
        overloaded = CounterMetricFamily("oam_overloaded", "Requests above the limits.", labels=["agent"])
        restarts = CounterMetricFamily(
            "oam_restarts", "Restarts of publishers and watchers.", labels=["agent"]
        )
        for agent in self._status.agents:
            name = [agent.name]
            in_flight.add_metric(name, agent.in_flight)
            waiting.add_metric(name, agent.waiting)
            overloaded.add_metric(name, agent.overloaded)
            if agent.background:
                restarts.add_metric(name, agent.background.restarts)
        yield from (in_flight, waiting, overloaded, restarts)
        connection = self._status.connection
        yield GaugeMetricFamily("oam_connected", "1 while connected to NATS.", connection.connected)
        yield CounterMetricFamily(
            "oam_reconnects", "How often the connection was restored.", connection.reconnects
        )
