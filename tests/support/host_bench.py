"""A running host for tests of reloads: its files, calls to its agents, and a ledger that they share."""

import asyncio
import threading
from collections.abc import Mapping
from contextvars import ContextVar
from pathlib import Path
from types import ModuleType
from typing import Any

from openagentmesh import AgentMesh, Host
from openagentmesh.hooks.reload_result import ReloadResult

from tests.support.modules import Configure, write

# The first line of every module whose runs a test counts.
RUN = "import ledger; ledger.runs.append(__name__.partition('.')[2])\n"


class Ledger(ModuleType):
    """An unmanaged module through which files report what they do, and wait for the test."""

    def __init__(self) -> None:
        super().__init__("ledger")
        self.runs: list[str] = []
        self.waiting = asyncio.Event()
        self.gate = asyncio.Event()
        self.started, self.go = threading.Event(), threading.Event()
        self.variable: ContextVar[str] = ContextVar("variable", default="untouched")

    async def wait(self) -> None:
        """Stay in flight until the test opens the gate."""
        self.waiting.set()
        await self.gate.wait()

    def executed(self) -> list[str]:
        """The modules executed since the last call, each once."""
        found = sorted(set(self.runs))
        self.runs.clear()
        return found


class Bench:
    """A folder of agent files, the host that serves them, and a caller."""

    def __init__(self, configure: Configure, mesh: AgentMesh, name: str, folder: Path) -> None:
        self.name = name
        self.ledger = Ledger()
        self.host: Host
        self._configure = configure
        self._mesh = mesh
        self._folder = folder / "agents"

    def serve(
        self,
        files: Mapping[str, str],
        *,
        host: dict[str, Any] | None = None,
        plugins: dict[str, Any] | None = None,
        **settings: Any,
    ) -> Host:
        """The host, not started yet; `settings` are those of `[host]`."""
        self.host = Host(self._configure(files, host=(host or {}) | settings, plugins=plugins or {}))
        return self.host

    def write(self, files: Mapping[str, str]) -> None:
        write(self._folder, files)

    def path(self, file: str) -> Path:
        return self._folder / file

    async def reloaded(self, files: Mapping[str, str] | None = None) -> ReloadResult:
        """Write files and reload; the reload has to succeed."""
        self.write(files or {})
        result = await self.host.reload()
        assert result is not None
        assert ("", "") == (result.error, result.details)
        return result

    async def refused(self, files: Mapping[str, str] | None = None) -> ReloadResult:
        """Write files and reload; the reload has to be refused."""
        self.write(files or {})
        result = await self.host.reload()
        assert result is not None
        assert result.error
        return result

    async def call(self, suffix: str = "", request: object = None) -> Any:
        return await self._mesh.call(self.name + suffix, request or {})

    async def in_flight(self, suffix: str = "") -> asyncio.Task[Any]:
        """A request that waits at the gate."""
        request = asyncio.create_task(self.call(suffix))
        await self.ledger.waiting.wait()
        return request

    async def listed(self, *suffixes: str) -> None:
        """Wait until the catalog has exactly these agents."""
        wanted = [self.name + suffix for suffix in suffixes]
        while wanted != sorted(entry.name for entry in await self._mesh.catalog(channel=self.name)):
            await asyncio.sleep(0.01)
