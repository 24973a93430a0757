"""The loads, the same for all candidates. Each returns one number."""

import asyncio
import os
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from statistics import median
from time import monotonic, perf_counter
from typing import Any, Final, Protocol

SHORTEN: Final = "bench.shorten"
NAP: Final = "bench.nap"
COUNT: Final = "bench.count"
NAP_SECONDS: Final = 0.05
# A publisher, and the agent that lets it emit a number of events.
TICKS: Final = "bench.ticks"
GO: Final = "bench.go"
# An agent that waits until it is cancelled, and one that returns when that was.
HANG: Final = "bench.hang"
STOPPED: Final = "bench.stopped"
KEY: Final = "bench.key"

_SUBSCRIBERS: Final = 10
_TAKEN: Final = 500

_WORKERS: Final = 64
_WARM_UP: Final = 300
_LENGTH: Final = 40
_TEXT: Final = {
    "text": "All happy families are alike; each unhappy family is unhappy in its own way.",
    "length": 40,
}
_MAX_S: Final = 60.0


class Client(Protocol):
    """A candidate, as its caller sees it."""

    async def call(self, name: str, payload: dict[str, object]) -> Any:
        """Call an agent and return its answer."""

    def stream(self, name: str, payload: dict[str, object]) -> AsyncIterator[Any]:
        """Call an agent and yield its chunks."""

    def subscribe(self, *, agent: str) -> AsyncIterator[Any]:
        """Yield the events of a publisher."""

    @property
    def kv(self) -> "Store":
        """The shared state."""


class Store(Protocol):
    """The shared state, as a candidate offers it."""

    async def put(self, key: str, value: str) -> object:
        """Set a key."""

    async def get(self, key: str) -> str:
        """Get a key."""


async def latency(client: Client, count: int) -> float:
    """The median time of a call, one at a time, in µs."""
    await _warm_up(client)
    times = []
    for _ in range(count):
        began = perf_counter()
        await client.call(SHORTEN, _TEXT)
        times.append(perf_counter() - began)
    return median(times) * 1e6


async def rate(client: Client, count: int) -> float:
    """Calls a second, with 64 under way at any time."""
    await _warm_up(client)
    left = iter(range(count))

    async def worker() -> None:
        for _ in left:
            await client.call(SHORTEN, _TEXT)

    began = perf_counter()
    await asyncio.gather(*[worker() for _ in range(_WORKERS)])
    return count / (perf_counter() - began)


async def naps(client: Client, count: int) -> float:
    """How long `count` calls of a handler that sleeps 50 ms take when all come at once, in ms."""
    await _warm_up(client)
    await client.call(NAP, {"seconds": 0})
    began = perf_counter()
    await asyncio.gather(*[client.call(NAP, {"seconds": NAP_SECONDS}) for _ in range(count)])
    return (perf_counter() - began) * 1e3


async def chunks(client: Client, count: int) -> float:
    """Small chunks a second of one stream."""
    assert await _read(client, 100) == list(range(100))
    began = perf_counter()
    await _read(client, count)
    return count / (perf_counter() - began)


async def fanout(client: Client, count: int) -> float:
    """Events a second that ten subscribers of one publisher receive together."""
    subscribed = [asyncio.Event() for _ in range(_SUBSCRIBERS)]

    async def listen(received: asyncio.Event) -> None:
        async for event in client.subscribe(agent=TICKS):
            received.set()
            if event["number"] == count:
                return

    subscribers = [asyncio.create_task(listen(received)) for received in subscribed]
    while not all(received.is_set() for received in subscribed):  # until all are known to the server
        await client.call(GO, {"count": 1})
        await asyncio.sleep(0.05)
    began = perf_counter()
    await client.call(GO, {"count": count + 1})
    await asyncio.gather(*subscribers)
    return _SUBSCRIBERS * count / (perf_counter() - began)


async def kv(client: Client, count: int) -> float:
    """The median time to get a key of the shared state, one at a time, in µs."""
    await client.kv.put(KEY, "value")
    times = []
    for _ in range(count):
        began = perf_counter()
        assert await client.kv.get(KEY) == "value"
        times.append(perf_counter() - began)
    return median(times) * 1e6


async def stop(client: Client, count: int) -> float:
    """The longest time from when a caller gives up until its handler is stopped, in ms."""
    longest = 0.0
    for number in range(count):
        call = asyncio.create_task(client.call(HANG, {"seconds": 60}))
        await asyncio.sleep(0.005 * (number % 20))  # also before the host has said that it has it
        call.cancel()
        gave_up = monotonic()
        await asyncio.wait([call])
        while (stopped := (await client.call(STOPPED, {}))["seconds"]) < gave_up:
            if monotonic() - gave_up > _MAX_S:
                raise TimeoutError("the handler does not stop")
        longest = max(longest, stopped - gave_up)
    return longest * 1e3


async def slow(client: Client, _: int) -> float:
    """MiB by which both processes grow while a slow reader reads a stream without an end."""
    before = 0
    taken = 0
    stream = client.stream(COUNT, {"count": 10**9})
    async for _chunk in stream:
        await asyncio.sleep(0.002)
        taken += 1
        if taken == _TAKEN // 5:
            before = await _resident(client)
        if taken == _TAKEN:
            return (await _resident(client) - before) / 2**20
    raise AssertionError("the stream ended")


async def _resident(client: Client) -> int:
    provider = (await client.call(STOPPED, {}))["pid"]
    sizes = [Path(f"/proc/{pid}/statm").read_text().split()[1] for pid in (provider, os.getpid())]
    return sum(map(int, sizes)) * os.sysconf("SC_PAGE_SIZE")


async def _read(client: Client, count: int) -> list[int]:
    return [chunk["number"] async for chunk in client.stream(COUNT, {"count": count})]


async def _warm_up(client: Client) -> None:
    answer = await client.call(SHORTEN, _TEXT)
    assert answer == {"short": str(_TEXT["text"])[:_LENGTH]}, answer
    for _ in range(_WARM_UP):
        await client.call(SHORTEN, _TEXT)


def _bounded(measure: Callable[[Client, int], Awaitable[float]]) -> Callable[[Client, int], Awaitable[float]]:
    async def bounded(client: Client, count: int) -> float:
        async with asyncio.timeout(_MAX_S):
            return await measure(client, count)

    return bounded


MEASURES: Final = {
    measure.__name__: _bounded(measure) for measure in (latency, rate, naps, chunks, fanout, kv, stop, slow)
}
