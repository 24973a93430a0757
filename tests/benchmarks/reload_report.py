"""What edits under load cost: the table of it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from rich.box import SIMPLE
from rich.table import Table

from tests.benchmarks.editing import Edits
from tests.benchmarks.saving import SAVES
from tests.benchmarks.watched import Observed, Standstills

_HEADERS: Final = ("what", "ours", "aimed at", "FastStream --reload")
_NONE: Final = "–"
_ABOUT: Final = """\
A request is lost when nobody answers it, failed when the answer is an error.
It is mixed when its handler saw two versions.
A broken edit is a syntax error, a missing import, or a file that is empty for a moment.
After a loss a caller waits for 50 ms. One more looks out for new versions, and is not counted.
Broken files stay 0.15 s with ours; 1.5 s with FastStream, which would not notice them otherwise.
A standstill is by how much an agent in the same host wakes up too late from a sleep of 1 ms.
It belongs to a reload when it overlaps with it, or with the 0.1 s after it; the load alone causes the others.
Of the imports of a second bench_waits sleeps; bench_computes never lets go of the interpreter by itself.
"""

Line = tuple[str, str, str, str]


@dataclass
class Report:
    """Everything that was measured.

    Attributes:
        edits: of our agent.
        observed: what its host did.
        idle: the share of a core of a host that watches, and of one that does not.
        peer: the edits of FastStream's.
        skipped: why there are none.
    """

    edits: Edits = field(default_factory=Edits)
    observed: Observed = field(default_factory=Observed)
    idle: list[float] = field(default_factory=list)
    peer: Edits | None = None
    skipped: str = ""

    def lines(self) -> list[Line]:
        """The table."""
        return [*self._requests(), *self._edits(), *self._delays(), *self._reloads(), *self._rest()]

    def _requests(self) -> Iterator[Line]:
        for what, target in (("asked", "≥ 150,000"), ("lost", "0"), ("failed", "0"), ("mixed", "0")):
            ours, peer = self.edits.requests(what), self.peer and self.peer.requests(what)
            yield f"requests {what}", f"{ours:,}", target, _NONE if peer is None else f"{peer:,}"
        yield "longest time without an answer, ms", _silence(self.edits), "", _silence(self.peer)

    def _edits(self) -> Iterator[Line]:
        for what in ("good", "broken", "late"):
            ours, peer = getattr(self.edits, what), self.peer and getattr(self.peer, what)
            target = "0" if what == "late" else ""
            yield f"edits {what}", f"{ours:,}", target, _NONE if peer is None else f"{peer:,}"
        expected = self.edits.broken - self.edits.brief
        yield "edits refused", f"{len(self.observed.refused):,}", f"{expected:,}", _NONE

    def _delays(self) -> Iterator[Line]:
        for way, delays in self.edits.delays.items():
            target = "≤ 30 / 50" if way == "atomic rename" else "≤ 60 / 80" if way in SAVES else ""
            peer = self.peer.delays.get(way, []) if self.peer else []
            yield (f"first new answer, {way}: p50 / p95 / max, ms", _spread(delays), target, _spread(peer))

    def _reloads(self) -> Iterator[Line]:
        took = [*self.observed.reloads.values()]
        yield "a reload alone: p50 / p99 / max, ms", _spread(took, 0.99), "≤ 3 / 10", _NONE
        during, apart = self.observed.standstills()
        if self.observed.before:
            yield "standstill without edits", _standstill(self.observed.before), "", _NONE
        yield "standstill between reloads", _standstill(apart), "", _NONE
        yield "standstill in a reload", _standstill(during), "≤ 15", _NONE
        for module, found in self.observed.imports.items():
            yield f"standstill while {module} is imported", _standstill(found), "≤ 15", _NONE

    def _rest(self) -> Iterator[Line]:
        grown = self.observed.growth / 1024 / 1024
        yield "growth of the host's memory, MiB", f"{grown:.2f}", "≤ 1", _NONE
        if self.idle:
            watching, without = (f"{share:.2%}" for share in self.idle)
            yield (
                "idle with 2,000 files watched (not watched): of a core",
                f"{watching} ({without})",
                "≤ 1%",
                _NONE,
            )

    def _notes(self) -> list[str]:
        reasons = [
            f"{who}: {times:,} requests: {reason}"
            for who, edits in (("ours", self.edits), ("FastStream", self.peer or Edits()))
            for reason, times in edits.counts.get("reasons", {}).items()
        ]
        return [
            *_ABOUT.splitlines(),
            *reasons,
            *([f"FastStream is left out: {self.skipped}"] if self.skipped else []),
        ]

    def as_table(self) -> Table:
        """For a terminal."""
        table = Table(*_HEADERS, box=SIMPLE, caption="\n".join(self._notes()), caption_justify="left")
        for line in self.lines():
            table.add_row(*line)
        return table

    def as_markdown(self, facts: list[str]) -> str:
        """For a document, below what it depends on."""
        body = [_HEADERS, ("---",) * len(_HEADERS), *self.lines()]
        return "\n".join(
            [
                "# Edits under load",
                "",
                "Written by `python -m tests.benchmarks.reload`. The times are those of one machine.",
                "",
                *[f"- {fact}" for fact in facts],
                "",
                *[f"| {' | '.join(line)} |" for line in body],
                "",
                *[f"- {note}" for note in self._notes()],
                "",
            ]
        )


def _spread(seconds: list[float], high: float = 0.95) -> str:
    if not seconds:
        return _NONE
    ordered = sorted(seconds)
    found = (ordered[min(int(len(ordered) * share), len(ordered) - 1)] for share in (0.5, high, 1))
    return " / ".join(_ms(each) for each in found)


def _ms(seconds: float) -> str:
    return f"{seconds * 1000:,.0f}" if seconds >= 0.1 else f"{seconds * 1000:.1f}"


def _silence(edits: Edits | None) -> str:
    return _ms(edits.counts["silence"]) if edits else _NONE


def _standstill(found: Standstills) -> str:
    return f"{_ms(found.longest)} ms, {found.over} over 15 ms"
