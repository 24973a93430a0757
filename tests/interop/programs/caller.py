"""Does on the mesh at URL what it is told: a JSON command a line in, JSON lines out.

It runs on whichever `openagentmesh` its interpreter has.
"""

import asyncio
import json
import sys
from collections.abc import Callable
from contextlib import aclosing
from typing import Any

from openagentmesh import AgentMesh, MeshError
from pydantic import BaseModel

Tell = Callable[[object], None]


def say(number: int, **values: object) -> None:
    """Tell the test something about one of its commands."""
    sys.stdout.write(json.dumps({"number": number} | values) + "\n")
    sys.stdout.flush()


def shown(exc: BaseException) -> dict[str, Any]:
    """An exception, for the test; only those of the mesh have a code."""
    kind = {"type": type(exc).__name__, "message": str(exc)}
    if not isinstance(exc, MeshError):
        return kind
    return kind | {"code": exc.code, "agent": exc.agent, "details": exc.details}


class Verbs:
    """What it can be told; it `tell`s what comes of it while it runs."""

    def __init__(self, mesh: AgentMesh, tell: Tell) -> None:
        self._mesh = mesh
        self._tell = tell

    async def call(self, name: str, payload: Any = None) -> object:
        return await self._mesh.call(name, payload, timeout=10.0)

    async def calls(self, name: str, payload: Any, count: int) -> object:
        """Many calls at once."""
        return await asyncio.gather(*[self._mesh.call(name, payload) for _ in range(count)])

    async def stream(self, name: str, payload: Any = None, take: int = sys.maxsize) -> None:
        """All chunks, or only the first few."""
        await _each(self._mesh.stream(name, payload), self._tell, take)

    async def subscribe(self, **what: Any) -> None:
        await _each(self._mesh.subscribe(**what), self._tell)

    async def send(self, name: str, payload: Any, reply_to: str | None = None) -> None:
        await self._mesh.send(name, payload, reply_to=reply_to)

    async def send_and_hear(self, name: str, payload: Any, timeout: float) -> None:
        """A send with both callbacks; tells what they are called with, for ever."""

        async def on_reply(reply: Any) -> None:
            self._tell({"reply": reply})

        async def on_error(error: MeshError) -> None:
            self._tell({"error": shown(error)})

        await self._mesh.send(name, payload, on_reply=on_reply, on_error=on_error, timeout=timeout)
        await asyncio.Event().wait()

    async def publish(self, subject: str, payload: str) -> None:
        await self._mesh.publish(subject, payload)

    async def catalog(self, **what: Any) -> object:
        return [entry.model_dump() for entry in await self._mesh.catalog(**what)]

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
        """Count a value up, whoever else does so too."""
        for _ in range(times):
            await self._mesh.kv.update(key, lambda value: str(int(value) + 1), max_retries=1000)

    async def kv_watch(self, key: str) -> None:
        await _each(self._mesh.kv.watch(key), self._tell)

    async def workspace_put(self, key: str, data: str, *, binary: bool) -> None:
        await self._mesh.workspace.put(key, data.encode("latin-1") if binary else data)

    async def workspace_get(self, key: str) -> object:
        return (await self._mesh.workspace.get(key)).decode("latin-1")

    async def workspace_delete(self, key: str) -> None:
        await self._mesh.workspace.delete(key)


async def _each(values: Any, tell: Tell, take: int = sys.maxsize) -> None:
    async with aclosing(values):
        async for value in values:
            tell(value)
            take -= 1
            if not take:
                return


def _plain(contract: BaseModel) -> object:
    return contract.model_dump(mode="json")


async def perform(mesh: AgentMesh, number: int, verb: str, args: list[Any], kwargs: dict[str, Any]) -> None:
    """Carry out one command and say how it ended."""
    try:
        result = await getattr(Verbs(mesh, lambda value: say(number, item=value)), verb)(*args, **kwargs)
    except Exception as exc:  # noqa: BLE001 - whatever a library raises is for the test to judge
        say(number, error=shown(exc))
    else:
        say(number, result=result)


async def main(url: str) -> None:
    """Take commands until there are no more."""
    running: dict[int, asyncio.Task[None]] = {}
    async with AgentMesh(url) as mesh:
        say(0, result="connected")
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
