"""Measurements of a host: its start, many agents, and the command `oam up`."""

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

from tests.benchmarks.candidates import Candidate, Unavailable
from tests.benchmarks.processes import ROOT, Program, nats_server, program, started

_CALLED_AGENTS: Final = 20
# Long enough for the remaining work of a start, and for the first heartbeat.
_IDLE_S: Final = 5.0
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


async def start(count: int, candidate: Candidate, python: Path) -> float:
    """Seconds from `Host.start` until it has returned and a sample of all agents answers another process."""
    numbers = sorted({*range(0, count, count // _CALLED_AGENTS), count - 1})
    names = [f"many.agent{number}" for number in numbers]
    async with nats_server() as server, started(program("poller", server.port, *names)) as poller:
        await poller.read()
        async with _host(count, candidate, python, server.url) as (_, began):
            await poller.signal()
            answered: float = (await poller.read())["answered"]
            return answered - began


async def catalog(count: int, candidate: Candidate, python: Path) -> float:
    """Seconds until a new client has connected and read the catalog of `count` agents."""
    async with (
        nats_server() as server,
        _host(count, candidate, python, server.url),
        started(program("reader", server.url, count)) as reader,
    ):
        value: float = (await reader.read())["value"]
        return value


async def memory(count: int, candidate: Candidate, python: Path) -> float:
    """KiB of a host's resident memory per idle agent, of `count` agents."""
    sizes = []
    for agents in (0, count):
        async with nats_server() as server, _host(agents, candidate, python, server.url) as (host, _):
            await asyncio.sleep(_IDLE_S)
            sizes.append(resident(host.pid))
    return (sizes[1] - sizes[0]) / 1024 / count


async def up(_: Candidate, python: Path) -> float:
    """Seconds from spawning `oam up` until a sample agent has answered another process."""
    command = python.with_name("oam")
    if not command.exists():
        raise Unavailable("`oam` is not installed with this Python")
    port, agents = _free_port(), json.dumps(str(ROOT / "agents"))
    async with started(program("poller", port, "nlp.summarizer")) as poller:
        await poller.read()
        with tempfile.TemporaryDirectory(prefix="oam-bench-") as folder:
            (Path(folder) / "mesh.toml").write_text(
                f'[server]\nport = {port}\nstore = ""\n[host]\nagents = [{agents}]\n'
            )
            began = monotonic()
            async with started([command, "up"], Path(folder)):
                await poller.signal()
                answered: float = (await poller.read())["answered"]
                return answered - began


@asynccontextmanager
async def _host(
    count: int, candidate: Candidate, python: Path, url: str
) -> AsyncIterator[tuple[Program, float]]:
    """A started host with `count` agents, and when its start began."""
    with _module(count) as folder:
        async with started(program(candidate.program, url, folder, python=python)) as host:
            message = await host.read()
            assert message["agents"] == count
            yield host, message["began"]


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
        raise Unavailable("resident memory is read from /proc, which exists only on Linux")
    return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port
