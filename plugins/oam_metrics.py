"""Metrics: what agents do and how they fare, for Prometheus, at `/metrics`."""

import asyncio
import logging
from collections import deque
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import wait
from contextlib import asynccontextmanager
from functools import partial
from time import perf_counter
from typing import Annotated, Any, Final

from openagentmesh import Agent, Call, Endpoint, Instance, MeshError, Middleware, hookimpl
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)

_BUCKETS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# How often the event loop's lag is measured, in seconds.
_BEAT: Final = 0.5
# Of so many measurements the worst is shown: a minute's, so that no scrape misses one.
_BEATS: Final = 120
# More kinds of errors of one agent than this are counted together, for agents name their own.
_MOST_CODES: Final = 50
_LONGEST_CODE: Final = 64
# How long a scrape waits for the event loop, in seconds.
_PATIENCE: Final = 2.0


class Settings(BaseModel):
    """`[plugins.metrics]`: where `/metrics` is served; port 0 is any free one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65_535)] = 9464


class Metrics:
    """The plugin: counts what passes, and serves the counts over HTTP while the mesh is up.

    Args:
        settings: for `AgentMesh(plugins=[Metrics(Settings(...))])`; a host gives those of mesh.toml.

    Attributes:
        port: where `/metrics` is served; 0 while it is not.

    """

    def __init__(self, settings: Settings | None = None) -> None:
        self.port = 0
        self._settings = settings or Settings()
        self.registry = registry = CollectorRegistry()
        labels = ["agent", "verb"]
        self._requests = Counter("oam_requests", "Requests answered.", labels, registry=registry)
        about = "From a request to its answer."
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
        """Take the settings; while it serves, it stays where it is."""
        if self.port and settings != self._settings:
            raise ValueError("another host or port for /metrics needs a restart")
        self._settings = settings

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """What counts one agent's requests; the series of what it is made for is there from the start."""
        name, streams = agent.name, agent.contract.streaming
        series = self._series.setdefault(name, {})
        if agent.contract.invocable:
            self._series_of(name, "stream" if streams else "call", series)
        if agent.sources:
            self._series_of(name, "source", series)
        chunks = self._chunks.labels(name) if streams else None
        self._codes.setdefault(name, set())

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def counted(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
                requests, seconds = series.get(call.verb) or self._series_of(name, call.verb, series)
                if chunks is not None:
                    send = call.send

                    async def counting(chunk: object) -> None:
                        await send(chunk)
                        chunks.inc()

                    call.send = counting
                call.when_over(partial(self._count_error, call, streams))
                began = perf_counter()
                try:
                    return await endpoint(call)
                finally:
                    seconds.observe(perf_counter() - began)
                    requests.inc()

            return counted

        return middleware

    def _series_of(
        self, name: str, verb: str, series: dict[str, tuple[Counter, Histogram]]
    ) -> tuple[Counter, Histogram]:
        series[verb] = made = self._requests.labels(name, verb), self._seconds.labels(name, verb)
        return made

    def _count_error(self, call: Call, streams: bool, error: MeshError | None) -> None:  # noqa: FBT001 - bound to it
        codes = self._codes.get(call.agent)  # an agent that is gone has no series any more
        # Who stops to read a stream makes no error.
        if error is None or codes is None or (streams and call.abandoned):
            return
        # Its author's word, or a peer's, may hold anything, and be as long as anything.
        code = error.code[:_LONGEST_CODE].encode("utf-8", "replace").decode()
        if code in codes or len(codes) < _MOST_CODES:
            codes.add(code)
            self._errors.labels(call.agent, code).inc()
        else:
            self._errors.labels(call.agent, "others").inc()

    @hookimpl
    def mesh_agent_unloaded(self, name: str) -> None:
        """Forget the series of an agent."""
        for verb in self._series.pop(name, ()):
            self._requests.remove(name, verb)
            self._seconds.remove(name, verb)
        self._chunks.remove(name)
        for code in {*self._codes.pop(name, ()), "others"}:
            self._errors.remove(name, code)

    @hookimpl
    def mesh_reloaded(self) -> None:
        """Count a reload."""
        self._reloads.labels("done").inc()

    @hookimpl
    def mesh_reload_failed(self) -> None:
        """Count a reload that was refused."""
        self._reloads.labels("refused").inc()

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self, instance: Instance) -> AsyncIterator[None]:
        """Serve `/metrics`.

        Raises:
            OSError: the port is taken.

        """
        described = Described(instance, asyncio.get_running_loop())
        self.registry.register(described)
        where = self._settings
        try:
            server, thread = start_http_server(where.port, where.host, self.registry)
        except OSError as exc:
            self.registry.unregister(described)
            raise OSError(f"/metrics cannot be served at {where.host}:{where.port}: {exc.strerror}") from exc
        self.port = server.server_port
        beating = asyncio.create_task(self._beat())
        try:
            yield
        finally:
            beating.cancel()
            await asyncio.to_thread(server.shutdown)
            server.server_close()
            await asyncio.to_thread(thread.join)
            self.registry.unregister(described)
            self.port = 0

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        lags: deque[float] = deque(maxlen=_BEATS)
        while True:
            began = loop.time()
            await asyncio.sleep(_BEAT)
            lags.append(max(0.0, loop.time() - began - _BEAT))
            self._lag.set(max(lags))


class Described(Collector):
    """What the host counts itself: looked at on its event loop, told in the server's thread."""

    def __init__(self, instance: Instance, loop: asyncio.AbstractEventLoop) -> None:
        self._instance = instance
        self._loop = loop
        self._seen: dict[str, Any] = {}

    async def _look(self) -> None:
        self._seen = self._instance.describe()

    def _see(self) -> None:
        """See how everything is now; while the loop is blocked, how it was."""
        looking = asyncio.run_coroutine_threadsafe(self._look(), self._loop)
        if not wait([looking], _PATIENCE).done:
            looking.cancel()
        elif exc := looking.exception():
            log.error("metrics: what is told of the host is from before", exc_info=exc)

    def collect(self) -> Iterator[Metric]:
        """Give what the host counts."""
        self._see()
        agents = self._seen.get("agents", [])
        in_flight = GaugeMetricFamily("oam_in_flight", "Requests under way.", labels=["agent"])
        waiting = GaugeMetricFamily("oam_waiting", "Requests that wait for their turn.", labels=["agent"])
        refused = CounterMetricFamily("oam_overloaded", "Requests answered by overloaded.", labels=["agent"])
        restarts = CounterMetricFamily("oam_restarts", "Restarts of what runs by itself.", labels=["agent"])
        for agent in agents:
            name = [agent["name"]]
            in_flight.add_metric(name, agent["in_flight"])
            waiting.add_metric(name, agent["waiting"])
            refused.add_metric(name, agent["refused"])
            if background := agent["background"]:
                restarts.add_metric(name, background["restarts"])
        yield from (in_flight, waiting, refused, restarts)
        connection = self._seen.get("connection", {})
        connected = GaugeMetricFamily("oam_connected", "1 while there is a connection to NATS.")
        connected.add_metric([], connection.get("connected", 0))
        reconnects = CounterMetricFamily("oam_reconnects", "How often it came back.")
        reconnects.add_metric([], connection.get("reconnects", 0))
        yield from (connected, reconnects)
