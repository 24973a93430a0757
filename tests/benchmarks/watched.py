"""A host that watches files: `oam up` in a folder of its own, and what it says of its reloads."""

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

from tests.benchmarks.competitors import Unavailable
from tests.benchmarks.processes import Program, ProgramFailed, started
from tests.benchmarks.saving import PROBE, SLOW_IMPORTS

_LONGEST_START: Final = 30.0
_LOOK: Final = 0.02
# After the swap the old version is let go and collected; that is a reload's work as well.
_AFTER: Final = 0.1
_CONFIG: Final = '[server]\nport = 0\nstore = ""\n[host]\nagents = ["agents"]\nentry_points = false\n'
_LINE: Final = "def helper{0}() -> int:\n    return {0}\n"


@asynccontextmanager
async def host(folder: Path, *options: str) -> AsyncIterator[tuple[Program, str]]:
    """`oam up` for the agents below this folder, and its url."""
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
    async with asyncio.timeout(_LONGEST_START):
        while not (found := re.search(r"serving .* on (nats://\S+)", running.wrote())):
            if "ERROR" in running.wrote():
                raise ProgramFailed(running.wrote())
            await asyncio.sleep(_LOOK)
    return found[1]


@dataclass(frozen=True)
class Standstills:
    """How late the event loop was: at most, in seconds, and how often by more than 15 ms."""

    longest: float
    over: int


@dataclass
class Observed:
    """What a host did, beside answering: seconds, bytes.

    Attributes:
        reloads: how long each took, by when it was done.
        refused: how long it took to refuse each, by when that was.
        late: when the loop was late, and by how much.
        before: the loop without reloads.
        imports: the loop while a slow import was added, by what that does.
        growth: of resident memory.
    """

    reloads: dict[float, float] = field(default_factory=dict)
    refused: dict[float, float] = field(default_factory=dict)
    late: list[tuple[float, float]] = field(default_factory=list)
    before: Standstills | None = None
    imports: dict[str, Standstills] = field(default_factory=dict)
    growth: float = 0.0

    def standstills(self) -> tuple[Standstills, Standstills]:
        """Those that overlap with a reload, and the others."""
        spans = [(at - took, at + _AFTER) for at, took in (self.reloads | self.refused).items()]
        during: list[float] = []
        apart: list[float] = []
        for until, late in self.late:
            overlaps = any(began < until and until - late < ended for began, ended in spans)
            (during if overlaps else apart).append(late)
        return _standstills(during), _standstills(apart)


class Observer:
    """Asks a host what it did, by what everybody may ask it.

    Args:
        mesh: calls the agent that measures the loop.
        node: asks for what `oam status` shows.
    """

    def __init__(self, mesh: AgentMesh, node: Node) -> None:
        self.observed = Observed()
        self._mesh = mesh
        self._node = node

    async def look(self) -> None:
        """Take over what is new; the host remembers its last 20 reloads."""
        for reload in await self._history():
            at = datetime.fromisoformat(reload["at"]).timestamp()
            found = self.observed.refused if reload["error"] else self.observed.reloads
            found[at] = reload["took_ms"] / 1000
        self.observed.late += await self._late()

    async def standstills(self) -> Standstills:
        """All that there were since anybody asked last."""
        return _standstills([late for _, late in await self._late()])

    async def _late(self) -> list[tuple[float, float]]:
        found: list[tuple[float, float]] = (await self._mesh.call("bench.late"))["late"]
        return found

    async def _history(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        for instance in await read_records(self._node.buckets):
            answer = await self._node.inbox.request(subjects.host(instance, "info"), timeout=_LONGEST_START)
            found += from_json(codec.decode_reply(answer.head, answer.body).body).get("reloads", [])
        return found


@asynccontextmanager
async def observer(url: str) -> AsyncIterator[Observer]:
    """An observer of the host at this url."""
    async with AgentMesh(url) as mesh, connected(url) as node:
        yield Observer(mesh, node)


def _standstills(late: list[float]) -> Standstills:
    return Standstills(max(late, default=0.0), sum(each > 0.015 for each in late))


async def idle(files: int, seconds: float, *options: str) -> float:
    """The share of a core that a host takes which watches so many files and has nothing to do."""
    with tempfile.TemporaryDirectory(prefix="oam-bench-") as created:
        agents = Path(created) / "agents"
        agents.mkdir()
        (agents / "probe.py").write_text(PROBE.replace("while True:", "while False:"))
        for number in range(files):
            package = agents / f"_helpers{number // 50}"
            package.mkdir(exist_ok=True)
            (package / f"_helper{number}.py").write_text(_LINE.format(number))
        async with host(Path(created), *options) as (running, _):
            await asyncio.sleep(seconds / 2)  # what a start leaves to be done
            before = _worked(running.pid)
            await asyncio.sleep(seconds)
            return (_worked(running.pid) - before) / seconds


def _worked(pid: int) -> float:
    """The seconds that a process has had a core."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("what a process worked is read from /proc, which only Linux has")
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
