"""What an old version leaves behind: tasks, threads, logging handlers, references."""

import gc
import logging
import weakref
from pathlib import Path

import pytest
from openagentmesh import AgentMesh, Host

from tests.support.host_bench import Ledger
from tests.support.modules import MESH, Configure, write
from tests.support.reloads import reload

LEAVING = """import asyncio, ledger, logging, threading
{mesh}
class Handler(logging.Handler):
    pass

def work() -> None:
    ledger.go.wait()

async def later() -> None:
    await ledger.gate.wait()

class Thing:
    def do(self) -> None:
        pass

@mesh.agent(AgentSpec(name={name!r}))
async def leave(kind: str) -> None:
    if kind == "task":
        asyncio.get_running_loop().create_task(later(), name="leftover")
    elif kind == "thread":
        threading.Thread(target=work, name="leftover").start()
    elif kind == "handler":
        logging.getLogger("leftover").addHandler(Handler())
    elif kind == "reference":
        logging.leftover = [Thing()]
"""


@pytest.mark.parametrize(
    ("kind", "note"),
    [
        ("task", "the task leftover (later)"),
        ("thread", "the thread leftover"),
        ("handler", "the logging handler Handler of 'leftover'"),
        ("reference", "oam_agents.a in memory, referenced by logging.leftover"),
        ("nothing", ""),
    ],
)
async def test_leftovers_of_the_old_version_are_reported(  # noqa: PLR0913, PLR0917 - fixtures
    configure: Configure,
    mesh: AgentMesh,
    name: str,
    tmp_path: Path,
    ledger: Ledger,
    kind: str,
    note: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """The notes and the log name tasks, threads, logging handlers and references to the old module."""
    monkeypatch.setattr(logging, "leftover", None, raising=False)
    monkeypatch.setattr("openagentmesh.runtime.reload.leftovers._MAX_SEARCH_S", 10.0)
    monkeypatch.setattr(logging.getLogger("leftover"), "handlers", [])
    source = LEAVING.format(mesh=MESH, name=name)
    async with Host(configure({"a.py": source})) as host:
        await mesh.call(name, kind)
        write(tmp_path / "agents", {"a.py": source + "#\n"})
        result = await host.reload(finds_references=kind == "reference")
        await host.wait_retired()
        assert result is not None
        assert ([note] if note else []) == result.notes
        logged = [message for message in caplog.messages if "left behind" in message]
        assert ([f"the old version of {name} left behind: {note}"] if note else []) == logged
        ledger.gate.set()
        ledger.go.set()


class Mark:
    """An object whose weak reference shows whether its module is in memory."""


KEEPING = """import weakref
from typing import Optional
from pydantic import BaseModel
import asyncio, ledger
{mesh}
ledger.marks.append(weakref.ref(mark := ledger.Mark()))

class Tally(BaseModel):
    count: int = 0
    inner: Optional["Tally"] = None

    def add(self) -> "Tally":
        self.count += 1
        return self

@mesh.keep
def tally() -> Tally:
    return Tally()

@mesh.agent(AgentSpec(name={name!r}, version="0.0.{version}"))
async def count(req: dict) -> Tally:
    return tally.add()

@mesh.agent(AgentSpec(name="{name}.watch"))
async def watch() -> None:
    await asyncio.Event().wait()
# {number}
"""


@pytest.mark.parametrize("new_contract", [False, True], ids=["same-contract", "new-contracts"])
async def test_old_versions_are_garbage_collected(  # noqa: PLR0913 - fixtures
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, ledger: Ledger, *, new_contract: bool
) -> None:
    """After fifty reloads, some of them refused, only the last version is in memory, and it serves."""
    marks: list[weakref.ref[Mark]] = []
    vars(ledger).update(marks=marks, Mark=Mark)
    frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    try:

        def source(number: int) -> str:
            version = number if new_contract else 0
            return KEEPING.format(mesh=MESH, name=name, number=number, version=version)

        async with Host(configure({"a.py": source(0)})) as host:
            for number in range(1, 51):
                assert {"count": number, "inner": None} == await mesh.call(name, {})
                assert not (await reload(host, tmp_path, source(number))).error
                if not number % 10:
                    assert "undefined" in (await reload(host, tmp_path, source(-1) + "1 / undefined\n")).error
            await host.wait_retired()
            gc.collect()
            assert [] == [note for result in host.status().reloads for note in result.notes]
            assert 56 == len(marks)
            assert 1 == sum(mark() is not None for mark in marks)
    finally:
        if not frozen:
            gc.unfreeze()
