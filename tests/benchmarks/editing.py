"""Edits of an agent file, version after version, while callers send requests."""

import asyncio
from collections import defaultdict
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path
from typing import Any, Final

from tests.benchmarks.processes import Program
from tests.benchmarks.saving import SAVES, Faults, Save

# Between two edits: enough to complete the work of an edit before the next one.
_PAUSE_S: Final = 0.05


@dataclass
class Edits:
    """The results of the edits.

    Attributes:
        counts: of the requests, and the longest time without an answer.
        delays: seconds from a save to the first answer of its version, by the method of saving.
        valid: edits that are to be served.
        invalid: edits that are to be refused.
        brief: invalid edits that leave the file empty for a moment only.
        late: versions that did not answer in time.
    """

    counts: dict[str, Any] = field(default_factory=dict)
    delays: defaultdict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    valid: int = 0
    invalid: int = 0
    brief: int = 0
    late: int = 0

    def requests(self, outcome: str) -> int:
        """How many requests were sent, lost, failed or mixed."""
        return int(self.counts.get(outcome, 0))

    @property
    def incorrect(self) -> int:
        """How many requests did not get the answer of one version."""
        return sum(self.requests(outcome) for outcome in ("lost", "failed", "mixed"))


async def _nothing() -> None:
    return


class Editor:
    """Edits one file, and waits for each version to answer.

    Args:
        path: the file.
        source: the content of a version.
        callers: the process that calls the agent in the file.
        invalid_s: how long an invalid file stays, in seconds.
        timeout_s: how long the first answer of a version may take, in seconds.
    """

    def __init__(
        self, path: Path, source: Callable[[int], str], callers: Program, invalid_s: float, timeout_s: float
    ) -> None:
        self.edits = Edits()
        self._path = path
        self._source = source
        self._callers = callers
        self._invalid_s = invalid_s
        self._timeout_s = timeout_s
        self._version = 0
        self._methods = cycle(SAVES.items())
        self._faults = Faults()

    async def edit(self, valid: int, invalid: int, after: Callable[[], Awaitable[None]] = _nothing) -> None:
        """Save `valid` versions, by each method in turn, with `invalid` files between them."""
        for number in range(valid):
            method, save = next(self._methods)
            is_after_invalid = (number + 1) * invalid // valid > number * invalid // valid
            if is_after_invalid and not await self.save_invalid():
                method = "after an empty file"
            await self.save(method, save)
            await after()

    async def save(self, method: str, save: Save, head: str = "") -> None:
        """Save the next version, below a `head`, and wait for its first answer."""
        self._version += 1
        self.edits.valid += 1
        saved = await save(self._path, head + self._source(self._version))
        answered = await self.first_answer()
        if answered is None:
            self.edits.late += 1
        else:
            self.edits.delays[method].append(answered - saved)
        await asyncio.sleep(_PAUSE_S)

    async def save_invalid(self) -> bool:
        """Save an invalid file until the next valid one; returns False if it is only empty for a moment."""
        self.edits.invalid += 1
        stays = await self._faults.save(self._path, self._source(self._version))
        self.edits.brief += not stays
        await asyncio.sleep(self._invalid_s if stays else _PAUSE_S)
        return stays

    async def first_answer(self) -> float | None:
        """The time of the first answer of the last saved version; None if it is not in time."""
        try:
            async with asyncio.timeout(self._timeout_s):
                while (message := await self._callers.read())["version"] != self._version:
                    pass
        except TimeoutError:
            return None
        return float(message["at"])

    async def finish(self) -> Edits:
        """Stop the callers, and return the results."""
        await self._callers.signal()
        while "version" in (message := await self._callers.read()):
            pass
        self.edits.counts = message
        return self.edits
