"""The edited agents as texts, the methods by which editors save files, and invalid edits."""

import asyncio
from collections.abc import Awaitable, Callable
from itertools import cycle
from pathlib import Path
from time import monotonic
from typing import Final

Save = Callable[[Path, str], Awaitable[float]]
"""Saves a text; returns when its last step began, by the machine's monotonic clock."""

# Shorter than the time after which a host considers a save as complete, longer than it takes to notice one.
_BETWEEN_PARTS_S: Final = 0.02
# Up to here a file compiles, and its agent returns nothing.
_SPLIT: Final = "    return "


async def rename(path: Path, text: str) -> float:
    """Write a new file, and rename it over the old one."""
    new = path.with_name(f".{path.name}.new")
    new.write_text(text)
    began = monotonic()
    new.replace(path)
    return began


async def in_place(path: Path, text: str) -> float:
    """Truncate and write."""
    began = monotonic()
    path.write_text(text)
    return began


async def backup(path: Path, text: str) -> float:
    """Rename the file to a backup, write a new file, and delete the backup."""
    old = path.with_name(f"{path.name}~")
    path.rename(old)
    began = monotonic()
    path.write_text(text)
    old.unlink()
    return began


async def in_parts(path: Path, text: str) -> float:
    """Truncate, write a part, and write the rest a moment later."""
    head, split, tail = text.rpartition(_SPLIT)
    with path.open("w") as file:
        file.write(head)
        file.flush()
        await asyncio.sleep(_BETWEEN_PARTS_S)  # as a slow writer
        began = monotonic()
        file.write(split + tail)
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

# Measures the delays of the event loop, and keeps the longer ones until they are requested.
PROBE: Final = """\
import asyncio
import time

from openagentmesh import AgentMesh, AgentSpec
from pydantic import BaseModel

mesh = AgentMesh()
STEP, LONG = 0.001, 0.003


class Delays(BaseModel):
    delays: list[tuple[float, float]] = []


kept = Delays()


@mesh.agent(AgentSpec(name="bench.probe", description="Measures the delays of the event loop."))
async def probe() -> None:
    while True:
        began = time.perf_counter()
        await asyncio.sleep(STEP)
        delay = time.perf_counter() - began - STEP
        if delay > LONG and len(kept.delays) < 5000:
            kept.delays.append((time.time(), delay))


@mesh.agent(AgentSpec(name="bench.delays", description="Returns the delays since the last call."))
async def delays() -> Delays:
    global kept
    found, kept = kept, Delays()
    return found
"""

# Modules outside the watched folders whose import takes a second: one sleeps, one computes.
SLOW_IMPORTS: Final = {
    "bench_waits": "import time\ntime.sleep(1)\n",
    "bench_computes": "import time\nend = time.time() + 1\nwhile time.time() < end:\n    pass\n",
}


class Faults:
    """Saves invalid files: each time with the next fault and the next method."""

    def __init__(self) -> None:
        faults = (_with_syntax_error, _with_missing_import, None)
        self._pairs = cycle([(fault, save) for save in SAVES.values() for fault in faults])

    async def save(self, path: Path, text: str) -> bool:
        """Save an invalid file; returns False if it is only empty for a moment."""
        fault, save = next(self._pairs)
        await (save(path, fault(text)) if fault else in_place(path, ""))
        return fault is not None


def _with_syntax_error(text: str) -> str:
    return text.replace(_SPLIT, f"{_SPLIT}return ")


def _with_missing_import(text: str) -> str:
    return f"import no_such_module\n{text}"
