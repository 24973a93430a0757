"""Runs the rows, prints one table and writes it down."""

import argparse
import asyncio
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.benchmarks.competitors import Competitor, Pythons, Unavailable
from tests.benchmarks.processes import ProgramFailed
from tests.benchmarks.results import Results, as_markdown, as_table, legend, machine
from tests.benchmarks.rows import Row, rows


def options() -> argparse.Namespace:
    """What the command line says."""
    names = [row.name for row in rows(quick=True)]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rows", default=",".join(names), help="these only: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds of smaller loads")
    parser.add_argument("--no-peer", action="store_true", help="leave the published SDK out")
    parser.add_argument("--peer-env", type=Path, help="keep the published SDK's environment in this folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.md"))
    chosen = parser.parse_args()
    if unknown := set(chosen.rows.split(",")) - set(names):
        parser.error(f"no such row: {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    if chosen.quick:
        chosen.rounds = 2
    return chosen


async def measure(chosen: list[Row], rounds: int, pythons: Pythons, console: Console) -> Results:
    """Let everybody have a turn in each round, so that a noisy moment hits all alike."""
    results = Results()
    turns = [(row, competitor) for row in chosen for competitor in row.who]
    for number in range(rounds):
        # Each round goes the other way: nobody always comes first.
        for row, competitor in reversed(turns) if number % 2 else turns:
            key = row.name, competitor.name
            if key not in results.skipped:
                console.print(f"round {number + 1}/{rounds}: {row.name}, {competitor.name}", style="dim")
                await take(row, competitor, pythons, results, console)
    return results


async def take(
    row: Row, competitor: Competitor, pythons: Pythons, results: Results, console: Console
) -> None:
    """Measure once; who cannot be measured is left out from then on."""
    key = row.name, competitor.name
    try:
        results.samples[key].append(await row.sample(competitor, pythons.of(competitor)))
    except Unavailable as exc:
        results.skipped[key] = str(exc)
    except ProgramFailed as exc:
        console.print(str(exc), style="red", markup=False)
        results.skipped[key] = "failed"


def main() -> None:
    """The command."""
    given, console, load = options(), Console(), os.getloadavg()[0]
    chosen = [row for row in rows(quick=given.quick) if row.name in given.rows.split(",")]
    with ExitStack() as stack:
        folder = given.peer_env or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oam-peer-")))
        pythons = Pythons(None if given.no_peer else folder)
        results = asyncio.run(measure(chosen, given.rounds, pythons, console))
    lines, about, facts = (
        results.lines(chosen),
        legend(chosen),
        [f"median of {given.rounds} rounds", *machine(load)],
    )
    console.print(as_table(lines), *about, "", *facts, sep="\n", highlight=False)
    given.output.write_text(as_markdown(lines, about, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
