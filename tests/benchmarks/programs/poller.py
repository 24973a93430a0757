"""Asks agents from outside: `PORT NAME...`. Told to go, it says when all of them had answered.

It imports only what a request needs and is up before it is told, so that it measures the others
and not itself. It says the time of the machine's monotonic clock, which all processes share.
"""

import asyncio
import sys
from time import monotonic
from typing import Final

import nats
from nats.aio.client import Client
from nats.errors import NoRespondersError

from tests.benchmarks.programs.process import run, say, told

_AGAIN: Final = 0.005
_LONGEST: Final = 60.0


async def listening(port: int) -> None:
    """Wait until somebody listens on the port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(_AGAIN)
        else:
            writer.close()
            return


async def ask(port: int, names: list[str]) -> None:
    """Call each agent until it answers."""
    say(ready=True)
    await told()
    async with asyncio.timeout(_LONGEST):
        await listening(port)
        async with await nats.connect(f"nats://127.0.0.1:{port}") as nc:
            for name in names:
                while not await answered(nc, name):
                    await asyncio.sleep(_AGAIN)
            say(answered=monotonic())


async def answered(nc: Client, name: str) -> bool:
    """Whether an agent answers, and well."""
    try:
        answer = await nc.request(f"mesh.agent.{name}", b'{"text": "All happy families"}', timeout=5)
    except NoRespondersError:
        return False
    assert (answer.headers or {})["X-Mesh-Status"] == "ok", answer
    return True


if __name__ == "__main__":
    run(ask(int(sys.argv[1]), sys.argv[2:]), "asyncio")
