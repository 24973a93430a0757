"""Reloads of a host, and the sources of agents for them."""

import asyncio
import errno
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final, NoReturn

from openagentmesh import AgentMesh, Host, NotAvailable, NotFound, ReloadResult

from tests.support.modules import MESH, Configure, agent, write
from tests.support.waiting import TIMEOUT_S

# The first lines of a module that keeps its jobs; `{more}` is for further fields of a job.
JOBS: Final = """
from pydantic import BaseModel
class Job(BaseModel):
    number: int = 0
{more}
@mesh.keep
def jobs() -> dict[str, Job]:
    return {{}}
"""
_MODEL_IMPORTS: Final = "from pydantic import BaseModel, Field\nfrom dataclasses import dataclass\n"
_KEEP: Final = """
@mesh.keep
def kept() -> object:
    return {make}
"""
# Ways to keep a counter: declarations, the expression that creates it, and the access to its number.
COUNTERS: Final = {
    "model": ("class Tally(BaseModel):\n    count: int = 0\n", "Tally()", ".count"),
    "dataclass": ("@dataclass\nclass Tally:\n    count: int = 0\n", "Tally()", ".count"),
    "strict-model": (
        (
            "import datetime\nclass Tally(BaseModel, strict=True, extra='forbid'):\n"
            "    count: int = Field(0, alias='Count')\n    at: datetime.date = datetime.date(2026, 1, 2)\n"
        ),
        "Tally()",
        ".count",
    ),
    "dict": ("", "{'count': 0}", "['count']"),
    "other-package": ("from types import SimpleNamespace\n", "SimpleNamespace(count=0)", ".count"),
}


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


def off_loop_threads() -> set[threading.Thread]:
    """The threads in which modules are loaded, those of aborted loads included."""
    return {thread for thread in threading.enumerate() if thread.name == "oam-off-loop"}


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


def versioned_agent(name: str, number: int) -> str:
    """The source of an agent that returns its version three times, from both ends of its file and inline."""
    lines = "\n".join(f"PART_{part} = {number}" for part in range(30))
    return f"{MESH}{lines}\n{agent(name, f'[PART_0, PART_29, {number}]')}"


def keeping_module(declared: str, make: str, more: str = "") -> str:
    """The source of a module that keeps the value of `make`."""
    return f"{_MODEL_IMPORTS}{MESH}{declared}{_KEEP.format(make=make)}{more}"


def counting_agent(name: str, declared: str, make: str, access: str = ".count", more: str = "") -> str:
    """The source of an agent that counts its calls in kept state, and checks the class of that state."""
    return f"""{keeping_module(declared, make, more)}
@mesh.agent(AgentSpec(name={name!r}))
async def count(req: dict) -> list:
    kept{access} += 1
    return [kept{access}, type(kept) is type({make})]
"""


def raise_too_many_open_files(*_: object, **__: object) -> NoReturn:
    """Fail as a file operation without a free descriptor."""
    raise OSError(errno.EMFILE, "Too many open files")
