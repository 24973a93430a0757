"""A host that watches files: `oam up` in a folder of its own, and the measurements of its reloads."""

import asyncio
import os
import re
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from openagentmesh import AgentMesh
from openagentmesh.cli.connecting import connected
from openagentmesh.mesh.node import Node
from openagentmesh.protocol import codec, subjects
from openagentmesh.registry.presence import read_records
from pydantic_core import from_json

from tests.benchmarks.candidates import Unavailable
from tests.benchmarks.processes import Program, ProgramFailed, started
from tests.benchmarks.saving import PROBE, SLOW_IMPORTS

_START_TIMEOUT_S: Final = 30.0
_POLL_S: Final = 0.02
# After the swap the old version is closed and garbage-collected, which is a part of the reload.
_AFTER_RELOAD_S: Final = 0.1
_CONFIG: Final = '[server]\nport = 0\nstore = ""\n[host]\nagents = ["agents"]\nentry_points = false\n'
_LINE: Final = "def helper{0}() -> int:\n    return {0}\n"


@asynccontextmanager
async def host(folder: Path, *options: str) -> AsyncIterator[tuple[Program, str]]:
    """`oam up` for the agents below this folder, and its URL."""
    (folder / "mesh.toml").write_text(_CONFIG)
    modules = folder / "installed"
    modules.mkdir()
    for name, text in SLOW_IMPORTS.items():
        (modules / f"{name}.py").write_text(text)
    command: list[str | Path] = [
        Path(sys.executable).with_name("oam"),
        "up",
        "--log-format",
        "plain",
        *options,
    ]
    async with started(command, folder, {"PYTHONPATH": str(modules)}) as running:
        yield running, await _url(running)


async def _url(running: Program) -> str:
    async with asyncio.timeout(_START_TIMEOUT_S):
        while not (found := re.search(r"serving .* on (nats://\S+)", running.log())):
            if "ERROR" in running.log():
                raise ProgramFailed(running.log())
            await asyncio.sleep(_POLL_S)
    return found[1]


@dataclass(frozen=True)
class Delays:
    """Delays of the event loop: the longest one in seconds, and how many were over 15 ms."""

    longest: float
    over: int


@dataclass
class Observed:
    """Measurements of a host, in seconds and bytes.

    Attributes:
        reloads: the duration of each reload, by the time when it was complete.
        refused: the duration of each refused reload, by the time when it was refused.
        loop_delays: the end of each delay of the event loop, and its duration.
        baseline: the delays without reloads.
        imports: the delays during slow imports, by module.
        growth: of resident memory.
    """

    reloads: dict[float, float] = field(default_factory=dict)
    refused: dict[float, float] = field(default_factory=dict)
    loop_delays: list[tuple[float, float]] = field(default_factory=list)
    baseline: Delays | None = None
    imports: dict[str, Delays] = field(default_factory=dict)
    growth: float = 0.0

    def delays(self) -> tuple[Delays, Delays]:
        """The delays that overlap with a reload, and the others."""
        reloads = self.reloads | self.refused
        spans = [(at - duration, at + _AFTER_RELOAD_S) for at, duration in reloads.items()]
        during: list[float] = []
        between: list[float] = []
        for until, delay in self.loop_delays:
            overlaps = any(began < until and until - delay < ended for began, ended in spans)
            (during if overlaps else between).append(delay)
        return _delays(during), _delays(between)


class Observer:
    """Collects the measurements of a host.

    Args:
        mesh: calls the agent that measures the event loop.
        node: requests the data of `oam status`.
    """

    def __init__(self, mesh: AgentMesh, node: Node) -> None:
        self.observed = Observed()
        self._mesh = mesh
        self._node = node

    async def collect(self) -> None:
        """Add new measurements; the host remembers its last 20 reloads."""
        for reload in await self._history():
            at = datetime.fromisoformat(reload["at"]).timestamp()
            found = self.observed.refused if reload["error"] else self.observed.reloads
            found[at] = reload["took_ms"] / 1000
        self.observed.loop_delays += await self._new_delays()

    async def delays(self) -> Delays:
        """The delays since the last request for them."""
        return _delays([delay for _, delay in await self._new_delays()])

    async def _new_delays(self) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = (await self._mesh.call("bench.delays"))["delays"]
        return found

    async def _history(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for instance in await read_records(self._node.buckets):
            answer = await self._node.inbox.request(subjects.host(instance, "info"), timeout=_START_TIMEOUT_S)
            found += from_json(codec.decode_reply(answer.head, answer.body).body).get("reloads", [])
        return found


@asynccontextmanager
async def observer(url: str) -> AsyncIterator[Observer]:
    """An observer of the host at this URL."""
    async with AgentMesh(url) as mesh, connected(url) as node:
        yield Observer(mesh, node)


def _delays(seconds: list[float]) -> Delays:
    return Delays(max(seconds, default=0.0), sum(each > 0.015 for each in seconds))


async def idle(files: int, seconds: float, *options: str) -> float:
    """The share of a core that an idle host uses, which watches so many files."""
    with tempfile.TemporaryDirectory(prefix="oam-bench-") as created:
        agents = Path(created) / "agents"
        agents.mkdir()
        (agents / "probe.py").write_text(PROBE.replace("while True:", "while False:"))
        for number in range(files):
            package = agents / f"_helpers{number // 50}"
            package.mkdir(exist_ok=True)
            (package / f"_helper{number}.py").write_text(_LINE.format(number))
        async with host(Path(created), *options) as (running, _):
            await asyncio.sleep(seconds / 2)  # the remaining work of the start
            before = _cpu_seconds(running.pid)
            await asyncio.sleep(seconds)
            return (_cpu_seconds(running.pid) - before) / seconds


def _cpu_seconds(pid: int) -> float:
    """The CPU time of a process, in seconds."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("CPU time is read from /proc, which exists only on Linux")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
