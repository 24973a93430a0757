"""The loads, the same for all competitors. Each returns one number."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from statistics import median
from time import perf_counter
from typing import Any, Final, Protocol

SHORTEN: Final = "bench.shorten"
NAP: Final = "bench.nap"
COUNT: Final = "bench.count"
NAP_SECONDS: Final = 0.05

_WORKERS: Final = 64
_WARM_UP: Final = 300
_LENGTH: Final = 40
_TEXT: Final = {
    "text": "All happy families are alike; each unhappy family is unhappy in its own way.",
    "length": 40,
}
_LONGEST: Final = 60.0


class Client(Protocol):
    """A competitor, as its caller sees it."""

    async def call(self, name: str, payload: dict[str, object]) -> Any:
        """Ask an agent and return its answer."""

    def stream(self, name: str, payload: dict[str, object]) -> AsyncIterator[Any]:
        """Ask an agent and yield its chunks."""


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


async def _read(client: Client, count: int) -> list[int]:
    return [chunk["number"] async for chunk in client.stream(COUNT, {"count": count})]


async def _warm_up(client: Client) -> None:
    answer = await client.call(SHORTEN, _TEXT)
    assert answer == {"short": str(_TEXT["text"])[:_LENGTH]}, answer
    for _ in range(_WARM_UP):
        await client.call(SHORTEN, _TEXT)


def _bounded(measure: Callable[[Client, int], Awaitable[float]]) -> Callable[[Client, int], Awaitable[float]]:
    async def bounded(client: Client, count: int) -> float:
        async with asyncio.timeout(_LONGEST):
            return await measure(client, count)

    return bounded


MEASURES: Final = {measure.__name__: _bounded(measure) for measure in (latency, rate, naps, chunks)}
