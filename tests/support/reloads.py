"""Reloads of a host."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openagentmesh import AgentMesh, Host, NotAvailable, NotFound, ReloadResult

from tests.support.modules import MESH, Configure, write
from tests.support.waiting import TIMEOUT_S


async def reload(host: Host, folder: Path, source: str | None = None, file: str = "a.py") -> ReloadResult:
    """Save a file and reload it."""
    if source is not None:
        write(folder / "agents", {file: source})
    result = await host.reload()
    assert result is not None
    await host.node.wait_served()
    return result


@asynccontextmanager
async def watched_host(configure: Configure, files: dict[str, str], **more: Any) -> AsyncIterator[Host]:
    """A host that reloads files when they are saved."""
    async with Host(configure(files, **more), watch=True) as host:
        yield host


async def until_answers(mesh: AgentMesh, name: str, expected: object) -> None:
    """Wait until an agent returns the expected result."""
    async with asyncio.timeout(TIMEOUT_S):
        while True:
            try:
                if await mesh.call(name, {}) == expected:
                    return
            except (NotFound, NotAvailable):
                pass
            await asyncio.sleep(0.01)


def reloads_of(host: Host) -> list[ReloadResult]:
    """The last reloads of a host, completed and refused; its status has fewer."""
    assert host._reloader is not None
    return list(host._reloader.history)


def replayable_agent(name: str, result: str, *, more: str = "replayable=True") -> str:
    """The source of an agent that returns an expression of `req`."""
    return f"""{MESH}
@mesh.agent(AgentSpec(name={name!r}, {more}))
async def handler(req: dict) -> object:
    return {result}
"""


def replay_settings(keep: int = 5, **more: object) -> dict[str, Any]:
    """The settings of a host with the plugin `replay`; without it when `keep` is 0."""
    if not keep:
        return {}
    return {"host": {"plugins": ["replay"]}, "plugins": {"replay": {"keep": keep, **more}}}
