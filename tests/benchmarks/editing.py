"""An agent file is edited, version after version, while callers are at work."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.processes import Program
from tests.benchmarks.saving import SAVES, Faults, Save

# The pace of a hurried author: what an edit leaves to be done is done before the next.
_PAUSE: Final = 0.05


@dataclass
class Edits:
    """What came of the edits.

    Attributes:
        counts: of the requests; and the longest time in which no answer came.
        delays: seconds from a save to the first answer of its version, by the way of saving.
        good: edits that were to be served.
        broken: edits that were not.
        brief: broken ones that are a file which is empty for a moment.
        late: versions that did not answer in time.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    delays: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    good: int = 0
    broken: int = 0
    brief: int = 0
    late: int = 0

    def requests(self, what: str) -> int:
        """How many requests were lost, failed, mixed, or asked at all."""
        return int(self.counts.get(what, 0))

    @property
    def harm(self) -> int:
        """Requests that did not get the answer of one version."""
        return sum(self.requests(what) for what in ("lost", "failed", "mixed"))


async def _nothing() -> None:
    return


class Editor:
    """Edits one file, and waits for each version to answer.

    Args:
        path: the file.
        source: what it says of a version.
        callers: the process that calls the agent in it.
        broken_for: how long a broken file stays, in seconds.
        patience: how long a version may take, in seconds.
    """

    def __init__(
        self, path: Path, source: Callable[[int], str], callers: Program, broken_for: float, patience: float
    ) -> None:
        self.edits = Edits()
        self._path = path
        self._source = source
        self._callers = callers
        self._broken_for = broken_for
        self._patience = patience
        self._version = 0
        self._ways = cycle(SAVES.items())
        self._faults = Faults()

    async def edit(self, good: int, broken: int, after: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Save `good` versions, by each way in turn, with `broken` files between them."""
        for number in range(good):
            way, save = next(self._ways)
            if (number + 1) * broken // good > number * broken // good and not await self.err():
                way = "after an empty moment"
            await self.save(way, save)
            await after()

    async def save(self, way: str, save: Save, head: str = "") -> None:
        """Save the next version, below a `head`, and wait for its first answer."""
        self._version += 1
        self.edits.good += 1
        saved = await save(self._path, head + self._source(self._version))
        answered = await self.answered()
        if answered is None:
            self.edits.late += 1
        else:
            self.edits.delays[way].append(answered - saved)
        await asyncio.sleep(_PAUSE)

    async def err(self) -> bool:
        """Save a broken file, which the next good one mends; whether it is more than empty for a moment."""
        self.edits.broken += 1
        stays = await self._faults.save(self._path, self._source(self._version))
        self.edits.brief += not stays
        await asyncio.sleep(self._broken_for if stays else _PAUSE)
        return stays

    async def answered(self) -> float | None:
        """When the version saved last was first answered; None when it is not in time."""
        try:
            async with asyncio.timeout(self._patience):
                while (said := await self._callers.said())["version"] != self._version:
                    pass
        except TimeoutError:
            return None
        return float(said["at"])

    async def finish(self) -> Edits:
        """Stop the callers, and give what came of it."""
        await self._callers.go()
        while "version" in (said := await self._callers.said()):
            pass
        self.edits.counts = said
        return self.edits
