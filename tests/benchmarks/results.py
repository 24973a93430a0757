"""The measurements: collected, compared with targets, shown as a table."""

import os
import platform
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

from openagentmesh.transport.server import find_binary
from rich.box import SIMPLE
from rich.table import Table

from tests.benchmarks.candidates import Candidate
from tests.benchmarks.rows import Row, Target

HEADERS = ("row", "candidate", "median", "range", "ratio (range)", "target", "reached")


@dataclass
class Results:
    """The samples of each row and candidate, one per round, or the reason why there are none."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)

    def lines(self, rows: list[Row]) -> list[tuple[str, ...]]:
        """The lines of the table, one for each row and candidate."""
        return [self._line(row, candidate) for row in rows for candidate in row.candidates]

    def _line(self, row: Row, candidate: Candidate) -> tuple[str, ...]:
        key = row.name, candidate.name
        if key in self.skipped:
            return row.name, candidate.name, "–", self.skipped[key], "", "", ""
        found, ratios = self.samples[key], self._ratios(row, key)
        ours = row.target is not None and candidate.name.startswith("our")
        return (
            row.name,
            candidate.name,
            _number(median(found)),
            f"{_number(min(found))} – {_number(max(found))}",
            f"{median(ratios):.2f} ({min(ratios):.2f} – {max(ratios):.2f})" if ratios else "",
            row.target_text if ours else "",
            _assessment(row.target, found, ratios) if ours and row.target is not None else "",
        )

    def _ratios(self, row: Row, key: tuple[str, str]) -> list[float]:
        """The ratio to the base in each round: a disturbance of a round affects both values."""
        base = self.samples[row.base[0], row.base[1].name] if row.base else []
        return [a / b for a, b in zip(self.samples[key], base, strict=False)]


def _assessment(target: Target, found: list[float], ratios: list[float]) -> str:
    """Whether the median reaches the target, and how many of the rounds do."""
    values = ratios if target.of_base else found
    if not values:
        return "no base"
    rounds = sum(target.met(value) for value in values)
    return f"{'met' if target.met(median(values)) else 'missed'}, {rounds} of {len(values)}"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def legend(rows: list[Row]) -> list[str]:
    """The titles of the rows."""
    return [f"{row.name}: {row.title}{row.base_text}" for row in rows]


def machine(load: float) -> list[str]:
    """Facts on the machine and its software; `load` is its load average before the benchmark."""
    server = subprocess.run([find_binary(), "--version"], check=True, capture_output=True, text=True).stdout
    return [
        f"{datetime.now(UTC):%Y-%m-%d}",
        f"{os.cpu_count()} CPUs (load {load:.1f} at the start), {platform.system()} {platform.machine()}",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"nats-server {server.rpartition(' ')[2].strip().removeprefix('v')}, nats-py {version('nats-py')}",
        f"pydantic {version('pydantic')}",
    ]


def as_table(lines: list[tuple[str, ...]]) -> Table:
    """The table for a terminal."""
    table = Table(*HEADERS, box=SIMPLE)
    before = ""
    for line in lines:
        if line[0] != before:
            table.add_section()
        table.add_row("" if line[0] == before else line[0], *line[1:])
        before = line[0]
    return table


def as_markdown(lines: list[tuple[str, ...]], notes: list[str], facts: list[str]) -> str:
    """The table for a document, with facts on the machine above it and notes below it."""
    body = [HEADERS, ("---",) * len(HEADERS), *lines]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Written by `python -m tests.benchmarks`. Compare ratios: the times are those of one machine.",
            "If ranges are wide, or few rounds reach a target, the machine was busy: repeat the benchmark.",
            "",
            *[f"- {fact}" for fact in facts],
            "",
            *[f"| {' | '.join(line)} |" for line in body],
            "",
            *[f"- {note}" for note in notes],
            "",
        ]
    )
