"""What only a host has: a start, many agents, a command."""

import asyncio
import json
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from time import monotonic
from typing import Final

from tests.benchmarks.competitors import Competitor, Unavailable
from tests.benchmarks.processes import ROOT, Program, nats_server, program, started

_ASKED: Final = 20
# Long enough for what a start leaves to be done, and for the first heartbeat.
_IDLE: Final = 5.0
_HEAD: Final = """\
from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()


class Text(BaseModel):
    text: str
    length: int = 10


class Short(BaseModel):
    short: str


class Size(BaseModel):
    size: int
"""
_AGENT: Final = """

@mesh.agent(AgentSpec(name="many.agent{number}", description="Number {number} of many.", tags=["many"]))
async def agent{number}(req: Text) -> {output}:
    return {output}({value})
"""
_OUTPUTS: Final = (("Short", "short=req.text[: req.length]"), ("Size", "size=len(req.text)"))


async def start(count: int, competitor: Competitor, python: Path) -> float:
    """Seconds from `Host.start` until it has returned and agents all over answer another process."""
    names = [f"many.agent{number}" for number in sorted({*range(0, count, count // _ASKED), count - 1})]
    async with nats_server() as server, started(program("asker", server.port, *names)) as asker:
        await asker.said()
        async with _host(count, competitor, python, server.url) as (_, began):
            await asker.go()
            answered: float = (await asker.said())["answered"]
            return answered - began


async def catalog(count: int, competitor: Competitor, python: Path) -> float:
    """Seconds in which a new client has connected and read the catalog of `count` agents."""
    async with (
        nats_server() as server,
        _host(count, competitor, python, server.url),
        started(program("reader", server.url, count)) as reader,
    ):
        value: float = (await reader.said())["value"]
        return value


async def memory(count: int, competitor: Competitor, python: Path) -> float:
    """KiB of a host's resident memory that each of `count` idle agents takes."""
    sizes = []
    for agents in (0, count):
        async with nats_server() as server, _host(agents, competitor, python, server.url) as (host, _):
            await asyncio.sleep(_IDLE)
            sizes.append(resident(host.pid))
    return (sizes[1] - sizes[0]) / 1024 / count


async def up(_: Competitor, python: Path) -> float:
    """Seconds from spawning `oam up` until a sample agent has answered another process."""
    command = python.with_name("oam")
    if not command.exists():
        raise Unavailable("no `oam` beside this Python")
    port, agents = _free_port(), json.dumps(str(ROOT / "agents"))
    async with started(program("asker", port, "nlp.summarizer")) as asker:
        await asker.said()
        with tempfile.TemporaryDirectory(prefix="oam-bench-") as folder:
            (Path(folder) / "mesh.toml").write_text(
                f'[server]\nport = {port}\nstore = ""\n[host]\nagents = [{agents}]\n'
            )
            began = monotonic()
            async with started([command, "up"], Path(folder)):
                await asker.go()
                answered: float = (await asker.said())["answered"]
                return answered - began


@asynccontextmanager
async def _host(
    count: int, competitor: Competitor, python: Path, url: str
) -> AsyncIterator[tuple[Program, float]]:
    """A started host with `count` agents, and when its start began."""
    with _module(count) as folder:
        async with started(program(competitor.program, url, folder, python=python)) as host:
            said = await host.said()
            assert said["agents"] == count
            yield host, said["began"]


@contextmanager
def _module(count: int) -> Iterator[Path]:
    """A folder with one module that declares `count` agents."""
    with tempfile.TemporaryDirectory(prefix="oam-bench-") as folder:
        with (Path(folder) / "many.py").open("w") as module:
            module.write(_HEAD)
            for number in range(count):
                output, value = _OUTPUTS[number % len(_OUTPUTS)]
                module.write(_AGENT.format(number=number, output=output, value=value))
        yield Path(folder)


def resident(pid: int) -> int:
    """The resident memory of a process, in bytes."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("resident memory is read from /proc, which only Linux has")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port: int = found.getsockname()[1]
        return port
