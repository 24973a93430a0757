"""Runs commands of a test on the mesh at URL: reads a JSON command per line, and writes JSON lines.

It runs with the `openagentmesh` of its interpreter.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from openagentmesh import AgentMesh, MeshError
from pydantic import BaseModel

Emit = Callable[[object], None]


def write(number: int, **values: object) -> None:
    """Write a message about one of the commands."""
    sys.stdout.write(json.dumps({"number": number} | values) + "\n")
    sys.stdout.flush()


def as_json(exc: BaseException) -> dict[str, Any]:
    """An exception as JSON; only a mesh error has a code."""
    found = {"type": type(exc).__name__, "message": str(exc)}
    if not isinstance(exc, MeshError):
        return found
    return found | {"code": exc.code, "agent": exc.agent, "details": exc.details}


class Verbs:
    """The commands; each passes its items to `emit` while it runs."""

    def __init__(self, mesh: AgentMesh, emit: Emit) -> None:
        self._mesh = mesh
        self._emit = emit

    async def call(self, name: str, payload: Any = None) -> object:
        return await self._mesh.call(name, payload, timeout=10.0)

    async def calls(self, name: str, payload: Any, count: int) -> object:
        """Concurrent calls."""
        return await asyncio.gather(*[self._mesh.call(name, payload) for _ in range(count)])

    async def stream(self, name: str, payload: Any = None, take: int = sys.maxsize) -> None:
        """All chunks, or only the first few."""
        await _each(self._mesh.stream(name, payload), self._emit, take)

    async def subscribe(self, **options: Any) -> None:
        await _each(self._mesh.subscribe(**options), self._emit)

    async def send(self, name: str, payload: Any, reply_to: str | None = None) -> None:
        await self._mesh.send(name, payload, reply_to=reply_to)

    async def send_with_callbacks(self, name: str, payload: Any, timeout: float) -> None:
        """A send with both callbacks; emits their arguments until it is cancelled."""

        async def on_reply(reply: Any) -> None:
            self._emit({"reply": reply})

        async def on_error(error: MeshError) -> None:
            self._emit({"error": as_json(error)})

        await self._mesh.send(name, payload, on_reply=on_reply, on_error=on_error, timeout=timeout)
        await asyncio.Event().wait()

    async def publish(self, subject: str, payload: str) -> None:
        await self._mesh.publish(subject, payload)

    async def catalog(self, **filters: Any) -> object:
        return [entry.model_dump() for entry in await self._mesh.catalog(**filters)]

    async def contract(self, name: str) -> object:
        return _plain(await self._mesh.contract(name))

    async def discover(self, channel: str) -> object:
        return [_plain(contract) for contract in await self._mesh.discover(channel=channel)]

    async def kv_put(self, key: str, value: str) -> object:
        return await self._mesh.kv.put(key, value)

    async def kv_get(self, key: str) -> object:
        return await self._mesh.kv.get(key)

    async def kv_delete(self, key: str) -> None:
        await self._mesh.kv.delete(key)

    async def kv_cas(self, key: str, more: str) -> None:
        """Append to a value."""
        async with self._mesh.kv.cas(key) as entry:
            entry.value += more

    async def kv_count(self, key: str, times: int) -> None:
        """Increment a value, also while others increment it."""
        for _ in range(times):
            await self._mesh.kv.update(key, lambda value: str(int(value) + 1), max_retries=1000)

    async def kv_watch(self, key: str) -> None:
        await _each(self._mesh.kv.watch(key), self._emit)

    async def workspace_put(self, key: str, data: str, *, binary: bool) -> None:
        await self._mesh.workspace.put(key, data.encode("latin-1") if binary else data)

    async def workspace_get(self, key: str) -> object:
        return (await self._mesh.workspace.get(key)).decode("latin-1")

    async def workspace_delete(self, key: str) -> None:
        await self._mesh.workspace.delete(key)


async def _each(values: Any, emit: Emit, take: int = sys.maxsize) -> None:
    async with aclosing(values):
        async for value in values:
            emit(value)
            take -= 1
            if not take:
                return


def _plain(contract: BaseModel) -> object:
    return contract.model_dump(mode="json")


async def perform(mesh: AgentMesh, number: int, verb: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Run one command and write its result or its error."""
    try:
        result = await getattr(Verbs(mesh, lambda item: write(number, item=item)), verb)(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001 - the test checks any exception of an SDK
        write(number, error=as_json(exc))
    else:
        write(number, result=result)


async def main(url: str) -> None:
    """Run commands until the end of the input."""
    running: dict[int, asyncio.Task[None]] = {}
    async with AgentMesh(url) as mesh:
        write(0, result="connected")
        while line := await asyncio.to_thread(sys.stdin.readline):
            command = json.loads(line)
            number = command["number"]
            if "verb" in command:
                running[number] = asyncio.create_task(perform(mesh, **command))
            else:
                running.pop(number).cancel()
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
