"""The table of the benchmark of edits under load."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Final

from rich.box import SIMPLE
from rich.table import Table

from tests.benchmarks.editing import Edits
from tests.benchmarks.saving import SAVES
from tests.benchmarks.watched import Delays, Observed

_HEADERS: Final = ("measurement", "ours", "target", "FastStream --reload")
_NONE: Final = "–"
_ABOUT: Final = """\
A request is lost if it gets no answer, and failed if the answer is an error.
It is mixed if its handler used two versions.
An invalid edit is a syntax error, a missing import, or a file that is empty for a moment.
After a lost request a caller waits for 50 ms.
One more caller polls for new versions; its requests are not counted.
Invalid files stay for 0.15 s with ours, and for 1.5 s with FastStream, which would not notice them otherwise.
A delay of the event loop is how late an agent in the same host wakes up from a sleep of 1 ms.
It counts for a reload if it overlaps with it, or with the 0.1 s after it; the load alone causes the others.
The slow imports take a second: bench_waits sleeps, bench_computes does not release the interpreter by itself.
"""

Line = tuple[str, str, str, str]


@dataclass
class Report:
    """All measurements.

    Attributes:
        edits: those of our agent.
        observed: those of its host.
        idle: the share of a core that an idle host uses, with and without watching its files.
        peer: those of FastStream.
        skipped: the reason if FastStream was not measured.
    """

    edits: Edits = field(default_factory=Edits)
    observed: Observed = field(default_factory=Observed)
    idle: list[float] = field(default_factory=list)
    peer: Edits | None = None
    skipped: str = ""

    def lines(self) -> list[Line]:
        """The lines of the table."""
        return [*self._requests(), *self._edits(), *self._delays(), *self._reloads(), *self._rest()]

    def _requests(self) -> Iterator[Line]:
        for outcome, target in (("sent", "≥ 150,000"), ("lost", "0"), ("failed", "0"), ("mixed", "0")):
            ours, peer = self.edits.requests(outcome), self.peer and self.peer.requests(outcome)
            yield f"requests {outcome}", f"{ours:,}", target, _NONE if peer is None else f"{peer:,}"
        yield "longest time without an answer, ms", _silence(self.edits), "", _silence(self.peer)

    def _edits(self) -> Iterator[Line]:
        for kind in ("valid", "invalid", "late"):
            ours, peer = getattr(self.edits, kind), self.peer and getattr(self.peer, kind)
            target = "0" if kind == "late" else ""
            yield f"edits {kind}", f"{ours:,}", target, _NONE if peer is None else f"{peer:,}"
        expected = self.edits.invalid - self.edits.brief
        yield "edits refused", f"{len(self.observed.refused):,}", f"{expected:,}", _NONE

    def _delays(self) -> Iterator[Line]:
        for method, delays in self.edits.delays.items():
            target = "≤ 30 / 50" if method == "atomic rename" else "≤ 60 / 80" if method in SAVES else ""
            peer = self.peer.delays.get(method, []) if self.peer else []
            yield (f"first new answer, {method}: p50 / p95 / max, ms", _spread(delays), target, _spread(peer))

    def _reloads(self) -> Iterator[Line]:
        durations = [*self.observed.reloads.values()]
        yield "duration of a reload: p50 / p99 / max, ms", _spread(durations, 0.99), "≤ 3 / 10", _NONE
        during, between = self.observed.delays()
        if self.observed.baseline:
            yield "event loop delay without edits", _longest(self.observed.baseline), "", _NONE
        yield "event loop delay between reloads", _longest(between), "", _NONE
        yield "event loop delay during reloads", _longest(during), "≤ 15", _NONE
        for module, found in self.observed.imports.items():
            yield f"event loop delay during the import of {module}", _longest(found), "≤ 15", _NONE

    def _rest(self) -> Iterator[Line]:
        growth = self.observed.growth / 1024 / 1024
        yield "growth of the host's memory, MiB", f"{growth:.2f}", "≤ 1", _NONE
        if self.idle:
            watching, without = (f"{share:.2%}" for share in self.idle)
            idle = f"{watching} ({without})"
            yield "share of a core when idle, with 2,000 files watched (not watched)", idle, "≤ 1%", _NONE

    def _notes(self) -> list[str]:
        reasons = [
            f"{name}: {count:,} requests: {reason}"
            for name, edits in (("ours", self.edits), ("FastStream", self.peer or Edits()))
            for reason, count in edits.counts.get("reasons", {}).items()
        ]
        skipped = [f"FastStream is not measured: {self.skipped}"] if self.skipped else []
        return [*_ABOUT.splitlines(), *reasons, *skipped]

    def as_table(self) -> Table:
        """The table for a terminal."""
        table = Table(*_HEADERS, box=SIMPLE, caption="\n".join(self._notes()), caption_justify="left")
        for line in self.lines():
            table.add_row(*line)
        return table

    def as_markdown(self, facts: list[str]) -> str:
        """The table for a document, with facts on the machine above it."""
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


def _longest(delays: Delays) -> str:
    return f"{_ms(delays.longest)} ms, {delays.over} over 15 ms"
