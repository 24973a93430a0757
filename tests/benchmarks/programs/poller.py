"""Calls agents from another process: `PORT NAME...`. After a line it reports when all of them had answered.

It imports only what a request needs and is up before that line, so that it measures the others
and not itself. It reports the time of the machine's monotonic clock, which all processes share.
"""

import asyncio
import sys
from time import monotonic
from typing import Final

import nats
from nats.aio.client import Client
from nats.errors import NoRespondersError

from tests.benchmarks.programs.process import next_line, report, run

_RETRY_S: Final = 0.005
_TIMEOUT_S: Final = 60.0


async def wait_for_server(port: int) -> None:
    """Wait until a server listens on the port."""
    while True:
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except OSError:
            await asyncio.sleep(_RETRY_S)
        else:
            writer.close()
            return


async def poll(port: int, names: list[str]) -> None:
    """Call each agent until it answers."""
    report(ready=True)
    await next_line()
    async with asyncio.timeout(_TIMEOUT_S):
        await wait_for_server(port)
        async with await nats.connect(f"nats://127.0.0.1:{port}") as nc:
            for name in names:
                while not await answered(nc, name):
                    await asyncio.sleep(_RETRY_S)
            report(answered=monotonic())


async def answered(nc: Client, name: str) -> bool:
    """Whether an agent answers; an error fails the program."""
    try:
        answer = await nc.request(f"mesh.agent.{name}", b'{"text": "All happy families"}', timeout=5)
    except NoRespondersError:
        return False
    assert (answer.headers or {})["X-Mesh-Status"] == "ok", answer
    return True


if __name__ == "__main__":
    run(poll(int(sys.argv[1]), sys.argv[2:]), "asyncio")
