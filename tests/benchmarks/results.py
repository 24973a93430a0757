"""What was measured: collected, compared, shown."""

import os
import platform
import subprocess
from collections import defaultdict
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib.metadata import version
from statistics import median

from openagentmesh.bus.server import find_binary
from rich.table import Table

from tests.benchmarks.competitors import Competitor
from tests.benchmarks.rows import Row

HEADERS = ("row", "who", "median", "rounds", "ratio to base", "target", "")


@dataclass
class Results:
    """The samples of each row and competitor, one a round, and why others have none."""

    samples: dict[tuple[str, str], list[float]] = field(default_factory=lambda: defaultdict(list))
    skipped: dict[tuple[str, str], str] = field(default_factory=dict)

    def lines(self, rows: list[Row]) -> list[tuple[str, ...]]:
        """The table, a line for each row and competitor."""
        return [self._line(row, competitor) for row in rows for competitor in row.who]

    def _line(self, row: Row, competitor: Competitor) -> tuple[str, ...]:
        key = row.name, competitor.name
        if key in self.skipped:
            return f"{row.name}: {row.title}", competitor.name, "–", self.skipped[key], "", "", ""
        found = self.samples[key]
        ratio = self._ratio(row, key)
        ours = row.target is not None and competitor.name.startswith("our")
        met = ours and row.target is not None and row.target.met(median(found), ratio or 0)
        return (
            f"{row.name}: {row.title}",
            competitor.name,
            _number(median(found)),
            f"{_number(min(found))} – {_number(max(found))}",
            "" if ratio is None else f"{ratio:.2f}",
            row.target_text if ours else "",
            "" if not ours else "met" if met else "missed",
        )

    def _ratio(self, row: Row, key: tuple[str, str]) -> float | None:
        """The median of each round's ratio: what disturbs a round disturbs both sides of it."""
        base = self.samples[row.base[0], row.base[1].name] if row.base else []
        return median(a / b for a, b in zip(self.samples[key], base, strict=False)) if base else None


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def machine(rounds: int) -> list[str]:
    """What the numbers depend on."""
    server = subprocess.run([find_binary(), "--version"], check=True, capture_output=True, text=True).stdout
    return [
        f"{datetime.now(UTC):%Y-%m-%d}, median of {rounds} rounds",
        f"{os.cpu_count()} CPUs, {platform.system()} {platform.machine()}",
        f"{platform.python_implementation()} {platform.python_version()}",
        f"nats-server {server.rpartition(' ')[2].strip().removeprefix('v')}, nats-py {version('nats-py')}, "
        f"pydantic {version('pydantic')}",
    ]


def as_table(lines: list[tuple[str, ...]]) -> Table:
    """The table for a terminal."""
    table = Table(*HEADERS)
    before = ""
    for line in lines:
        if line[0] != before:
            table.add_section()
        table.add_row("" if line[0] == before else line[0], *line[1:])
        before = line[0]
    return table


def as_markdown(lines: list[tuple[str, ...]], facts: list[str]) -> str:
    """The table for a document, below what it depends on."""
    body = [HEADERS, ("---",) * len(HEADERS), *lines]
    return "\n".join(
        [
            "# Benchmarks",
            "",
            "Written by `python -m tests.benchmarks`. Compare ratios: the times are those of one machine.",
            "",
            *[f"- {fact}" for fact in facts],
            "",
            *[f"| {' | '.join(line)} |" for line in body],
            "",
        ]
    )
