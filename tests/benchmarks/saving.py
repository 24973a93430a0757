"""What is edited: agents as texts, the ways editors save them, and what goes wrong in them."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Final

Save = Callable[[Path, str], Awaitable[float]]
"""Saves a text; returns when the last step of that began, by the machine's monotonic clock."""

# Shorter than what a host takes for the end of a save, longer than it takes to notice one.
_BETWEEN: Final = 0.02
# Up to here a file is an agent that compiles, and answers with nothing.
_SEAM: Final = "    return "


async def rename(path: Path, text: str) -> float:
    """Write beside it, and rename that over it."""
    beside = path.with_name(f".{path.name}.new")
    beside.write_text(text)
    began = monotonic()
    beside.replace(path)
    return began


async def in_place(path: Path, text: str) -> float:
    """Truncate and write."""
    began = monotonic()
    path.write_text(text)
    return began


async def backup(path: Path, text: str) -> float:
    """Rename it to a backup, write a new file, and delete the backup."""
    old = path.with_name(f"{path.name}~")
    path.rename(old)
    began = monotonic()
    path.write_text(text)
    old.unlink()
    return began


async def in_parts(path: Path, text: str) -> float:
    """Truncate, write, and write the rest a moment later."""
    head, seam, tail = text.rpartition(_SEAM)
    with path.open("w") as file:
        file.write(head)
        file.flush()
        await asyncio.sleep(_BETWEEN)  # this is what a slow writer does
        began = monotonic()
        file.write(seam + tail)
    return began


SAVES: Final[dict[str, Save]] = {
    "atomic rename": rename,
    "vim's backup": backup,
    "in place": in_place,
    "in place, slowly": in_parts,
}

_ANSWER: Final = """\
import asyncio

from pydantic import BaseModel
{imports}
VERSION = {{version}}


class Question(BaseModel):
    number: int


class Answer(BaseModel):
    number: int
    first: int
    last: int

{serving}
async def edited(question: Question) -> Answer:
    first = VERSION
    await asyncio.sleep(0.001)
    return Answer(number=question.number, first=first, last=VERSION)
"""
OURS: Final = _ANSWER.format(
    imports="from openagentmesh import AgentMesh, AgentSpec\n\nmesh = AgentMesh()",
    serving='\n@mesh.agent(AgentSpec(name="bench.edited", version="0.{version}.0"))',
)
FASTSTREAM: Final = _ANSWER.format(
    imports="from faststream import FastStream\nfrom faststream.nats import NatsBroker\n\n"
    'broker = NatsBroker("{url}")\napp = FastStream(broker)',
    serving='\n@broker.subscriber("bench.edited", "workers")',
)

# Measures by how much the loop is late, and keeps what is worth looking at until it is asked.
PROBE: Final = """\
import asyncio
import time

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()
STEP, LONG = 0.001, 0.003


class Late(BaseModel):
    late: list[tuple[float, float]] = []


kept = Late()


@mesh.agent(AgentSpec(name="bench.probe", description="Measures how late the loop is."))
async def probe() -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(STEP)
        late = time.perf_counter() - began - STEP
        if late > LONG and len(kept.late) < 5000:
            kept.late.append((time.time(), late))


@mesh.agent(AgentSpec(name="bench.late", description="Gives what was measured since the last call."))
async def late() -> Late:
    global kept
    found, kept = kept, Late()
    return found
"""

# Modules that nobody manages, and that take a second: one waits as for a disk, one computes.
SLOW_IMPORTS: Final = {
    "bench_waits": "import time\ntime.sleep(1)\n",
    "bench_computes": "import time\nend = time.time() + 1\nwhile time.time() < end:\n    pass\n",
}


class Faults:
    """Breaks a text in another way each time, and saves it in another way each time."""

    def __init__(self) -> None:
        ways = list(SAVES.values())
        self._turns = cycle([(fault, save) for save in ways for fault in (_unfinished, _missing, None)])

    async def save(self, path: Path, text: str) -> bool:
        """Save a broken file; returns whether it is more than a file that is empty for a moment."""
        fault, save = next(self._turns)
        await (save(path, fault(text)) if fault else in_place(path, ""))
        return fault is not None


def _unfinished(text: str) -> str:
    return text.replace(_SEAM, f"{_SEAM}return ")


def _missing(text: str) -> str:
    return f"import no_such_module\n{text}"
