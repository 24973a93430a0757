"""Callers of an agent that is edited: `KIND URL COUNT`; the kinds are `mesh` and `nats`.

It reports each version when that is first answered. After a line it stops and reports counts of all requests.
"""

import asyncio
import json
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from itertools import count
from time import monotonic
from typing import Any, Final

import nats
from nats.errors import Error as NatsError
from openagentmesh import (
    AgentDied,
    AgentMesh,
    ConnectionFailed,
    MeshError,
    MeshTimeout,
    NotAvailable,
    NotFound,
)

from tests.benchmarks.programs.process import next_line, report, run

_NAME: Final = "bench.edited"
_TIMEOUT: Final = 10.0
# Callers may all wait for a process that has exited; the poller of new versions does not.
_POLL_TIMEOUT: Final = 0.25
# Without a pause most requests would be lost ones, sent while no process is there.
_PAUSE: Final = 0.05

Request = Callable[[int, float], Awaitable[dict[str, Any]]]


class Lost(Exception):
    """A request without an answer."""


class Failed(Exception):
    """A request that was answered by an error."""


@asynccontextmanager
async def over_mesh(url: str) -> AsyncIterator[Request]:
    """Call with our SDK."""

    async def request(number: int, timeout: float) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await mesh.call(_NAME, {"number": number}, timeout=timeout)
        except (AgentDied, ConnectionFailed, MeshTimeout, NotAvailable, NotFound) as exc:
            raise Lost(exc.code) from exc
        except MeshError as exc:
            raise Failed(f"{exc.code}: {exc.message}"[:200]) from exc
        return found

    async with AgentMesh(url) as mesh:
        yield request


@asynccontextmanager
async def over_nats(url: str) -> AsyncIterator[Request]:
    """Call without an SDK."""

    async def request(number: int, timeout: float) -> dict[str, Any]:
        try:
            message = await client.request(_NAME, json.dumps({"number": number}).encode(), timeout=timeout)
        except (NatsError, TimeoutError) as exc:
            raise Lost(type(exc).__name__) from exc
        try:
            found: dict[str, Any] = json.loads(message.data)
        except ValueError as exc:
            raise Failed("a reply that is not JSON") from exc
        return found

    async with await nats.connect(url) as client:
        yield request


KINDS: Final[dict[str, Callable[[str], AbstractAsyncContextManager[Request]]]] = {
    "mesh": over_mesh,
    "nats": over_nats,
}


class Callers:
    """Call continuously, and count the results."""

    def __init__(self, request: Request) -> None:
        self._request = request
        self._numbers = count()
        self._stopping = False
        self._seen: set[int] = set()
        self._answered = monotonic()
        self._silence = 0.0
        self._counts = Counter[str]()
        self._reasons = Counter[str]()

    async def work(self, callers: int) -> None:
        """Call until the runner sends a line, then report the counts."""
        tasks = [asyncio.create_task(self._work()) for _ in range(callers)]
        tasks.append(asyncio.create_task(self._poll()))
        await next_line()
        self._stopping = True
        await asyncio.gather(*tasks)
        report(**self._counts, silence=self._silence, reasons=self._reasons)

    async def _work(self) -> None:
        while not self._stopping:
            number = next(self._numbers)
            self._counts["sent"] += 1
            try:
                self._check(number, await self._request(number, _TIMEOUT))
            except (Lost, Failed) as exc:
                self._counts["lost" if isinstance(exc, Lost) else "failed"] += 1
                self._reasons[str(exc)] += 1
                await asyncio.sleep(_PAUSE)

    def _check(self, number: int, answer: dict[str, Any]) -> None:
        if answer.get("number") != number:
            raise Failed("the answer to another request")
        self._counts["mixed"] += answer["first"] != answer["last"]
        self._record(answer["first"])

    def _record(self, version: int) -> None:
        now = monotonic()
        self._silence, self._answered = max(self._silence, now - self._answered), now
        if version not in self._seen:
            self._seen.add(version)
            report(version=version, at=now)

    async def _poll(self) -> None:
        """Find new versions when no caller does; these calls are not counted."""
        while not self._stopping:
            try:
                answer = await self._request(0, _POLL_TIMEOUT)
                if "first" in answer:  # else it is half a file's, which callers count as failed
                    self._record(answer["first"])
            except (Lost, Failed):
                await asyncio.sleep(_PAUSE)


async def main(kind: str, url: str, callers: int) -> None:
    """Connect, and work."""
    async with KINDS[kind](url) as request:
        await Callers(request).work(callers)


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])), "asyncio")
