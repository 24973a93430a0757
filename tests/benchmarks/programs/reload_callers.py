"""Callers of an agent that is edited: `KIND URL COUNT`; the kinds are `mesh` and `nats`.

It says each version when that is first answered. Told to go, it stops and says what came of all requests.
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

from tests.benchmarks.programs.process import run, say, told

_NAME: Final = "bench.edited"
_TIMEOUT: Final = 10.0
# Callers may all wait for a process that is gone; who looks out for a new version does not.
_GLANCE: Final = 0.25
# Nobody is there: without a pause most requests would be those that are lost.
_PAUSE: Final = 0.05

Ask = Callable[[int, float], Awaitable[dict[str, Any]]]


class Lost(Exception):
    """A request that nobody answered."""


class Failed(Exception):
    """A request that was answered by an error."""


@asynccontextmanager
async def over_mesh(url: str) -> AsyncIterator[Ask]:
    """Ask as our users do."""

    async def ask(number: int, timeout: float) -> dict[str, Any]:
        try:
            found: dict[str, Any] = await mesh.call(_NAME, {"number": number}, timeout=timeout)
        except (AgentDied, ConnectionFailed, MeshTimeout, NotAvailable, NotFound) as exc:
            raise Lost(exc.code) from exc
        except MeshError as exc:
            raise Failed(f"{exc.code}: {exc.message}"[:200]) from exc
        return found

    async with AgentMesh(url) as mesh:
        yield ask


@asynccontextmanager
async def over_nats(url: str) -> AsyncIterator[Ask]:
    """Ask without an SDK."""

    async def ask(number: int, timeout: float) -> dict[str, Any]:
        try:
            message = await client.request(_NAME, json.dumps({"number": number}).encode(), timeout=timeout)
        except (NatsError, TimeoutError) as exc:
            raise Lost(type(exc).__name__) from exc
        try:
            found: dict[str, Any] = json.loads(message.data)
        except ValueError as exc:
            raise Failed("no answer in the answer") from exc
        return found

    async with await nats.connect(url) as client:
        yield ask


KINDS: Final[dict[str, Callable[[str], AbstractAsyncContextManager[Ask]]]] = {
    "mesh": over_mesh,
    "nats": over_nats,
}


class Callers:
    """Ask all the time, and keep an account of it."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask
        self._numbers = count()
        self._stopping = False
        self._seen: set[int] = set()
        self._answered = monotonic()
        self._silence = 0.0
        self._counts = Counter[str]()
        self._reasons = Counter[str]()

    async def work(self, callers: int) -> None:
        """Call until told to stop, then say what came of it."""
        tasks = [asyncio.create_task(self._work()) for _ in range(callers)]
        tasks.append(asyncio.create_task(self._look_out()))
        await told()
        self._stopping = True
        await asyncio.gather(*tasks)
        say(**self._counts, silence=self._silence, reasons=self._reasons)

    async def _work(self) -> None:
        while not self._stopping:
            number = next(self._numbers)
            self._counts["asked"] += 1
            try:
                self._check(number, await self._ask(number, _TIMEOUT))
            except (Lost, Failed) as exc:
                self._counts["lost" if isinstance(exc, Lost) else "failed"] += 1
                self._reasons[str(exc)] += 1
                await asyncio.sleep(_PAUSE)

    def _check(self, number: int, answer: dict[str, Any]) -> None:
        if answer.get("number") != number:
            raise Failed("the answer to another question")
        self._counts["mixed"] += answer["first"] != answer["last"]
        self._see(answer["first"])

    def _see(self, version: int) -> None:
        now = monotonic()
        self._silence, self._answered = max(self._silence, now - self._answered), now
        if version not in self._seen:
            self._seen.add(version)
            say(version=version, at=now)

    async def _look_out(self) -> None:
        """See new versions when no caller does; this is not counted."""
        while not self._stopping:
            try:
                answer = await self._ask(0, _GLANCE)
                if "first" in answer:  # else it is half a file's, which callers count as failed
                    self._see(answer["first"])
            except (Lost, Failed):
                await asyncio.sleep(_PAUSE)


async def main(kind: str, url: str, callers: int) -> None:
    """Connect, and work."""
    async with KINDS[kind](url) as ask:
        await Callers(ask).work(callers)


if __name__ == "__main__":
    run(main(sys.argv[1], sys.argv[2], int(sys.argv[3])), "asyncio")
