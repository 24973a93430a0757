"""Measures all rows, prints one table and writes it to a file."""

import argparse
import asyncio
import os
import tempfile
from contextlib import ExitStack
from pathlib import Path

from rich.console import Console

from tests.benchmarks.candidates import Candidate, Pythons, Unavailable
from tests.benchmarks.processes import ProgramFailed
from tests.benchmarks.results import Results, as_markdown, as_table, legend, machine
from tests.benchmarks.rows import Row, rows


def options() -> argparse.Namespace:
    """The options of the command line."""
    names = [row.name for row in rows(quick=True)]
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument("--rows", default=",".join(names), help="only these rows: %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="how often each is measured (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two rounds with smaller loads")
    parser.add_argument("--no-peer", action="store_true", help="without the published SDK")
    parser.add_argument("--peer-env", type=Path, help="keep the published SDK's environment in this folder")
    parser.add_argument("--output", type=Path, default=Path(__file__).with_name("results.md"))
    given = parser.parse_args()
    if unknown := set(given.rows.split(",")) - set(names):
        parser.error(f"unknown rows: {', '.join(sorted(unknown))}; expected {', '.join(names)}")
    if given.quick:
        given.rounds = 2
    return given


async def measure(chosen: list[Row], rounds: int, pythons: Pythons, console: Console) -> Results:
    """Measure all candidates in each round, so that a disturbance affects all of them alike."""
    results = Results()
    pairs = [(row, candidate) for row in chosen for candidate in row.candidates]
    for number in range(rounds):
        # The order alternates, so that no candidate is always the first one.
        for row, candidate in reversed(pairs) if number % 2 else pairs:
            key = row.name, candidate.name
            if key not in results.skipped:
                console.print(f"round {number + 1}/{rounds}: {row.name}, {candidate.name}", style="dim")
                await measure_once(row, candidate, pythons, results, console)
    return results


async def measure_once(
    row: Row, candidate: Candidate, pythons: Pythons, results: Results, console: Console
) -> None:
    """Add one sample; a candidate that cannot be measured is skipped from then on."""
    key = row.name, candidate.name
    try:
        results.samples[key].append(await row.sample(candidate, pythons.of(candidate)))
    except Unavailable as exc:
        results.skipped[key] = str(exc)
    except ProgramFailed as exc:
        console.print(str(exc), style="red", markup=False)
        results.skipped[key] = "failed"


def main() -> None:
    """Run the command."""
    given, console, load = options(), Console(), os.getloadavg()[0]
    chosen = [row for row in rows(quick=given.quick) if row.name in given.rows.split(",")]
    with ExitStack() as stack:
        folder = given.peer_env or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oam-peer-")))
        pythons = Pythons(None if given.no_peer else folder)
        results = asyncio.run(measure(chosen, given.rounds, pythons, console))
    lines, notes = results.lines(chosen), legend(chosen)
    facts = [f"median of {given.rounds} rounds", *machine(load)]
    console.print(as_table(lines), *notes, "", *facts, sep="\n", highlight=False)
    given.output.write_text(as_markdown(lines, notes, facts), encoding="utf-8")


if __name__ == "__main__":
    main()
