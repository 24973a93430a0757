"""Edits an agent under load, as editors save files, and prints the effects: our host and FastStream."""

import argparse
import asyncio
import os
import signal
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from typing import Final

from rich.console import Console

from tests.benchmarks.candidates import Unavailable
from tests.benchmarks.editing import Editor, Edits
from tests.benchmarks.hosts import resident
from tests.benchmarks.processes import ProgramFailed, nats_server, program, started
from tests.benchmarks.reload_report import Report
from tests.benchmarks.results import machine
from tests.benchmarks.saving import FASTSTREAM, OURS, PROBE, SLOW_IMPORTS, rename
from tests.benchmarks.watched import Observed, Observer, host, idle, observer
from tests.support.published_sdk import NotInstalled, install

_WARM_UP_EDITS: Final = 50
_BASELINE_S: Final = 5.0
_SETTLE_S: Final = 0.5
# A host remembers 20 reloads, so they are collected before one is dropped.
_EDITS_PER_COLLECTION: Final = 8
_WATCHED_FILES: Final = 2000
_IDLE_S: Final = 10.0
_ANSWER_TIMEOUT_S: Final = 5.0
# Long enough that a file written in place is noticed; a restart takes longer.
_INVALID_S: Final = 0.15
_PEER_ANSWER_TIMEOUT_S: Final = 15.0
_PEER_INVALID_S: Final = 1.5
_TABLE_WIDTH: Final = 120
_PEER: Final = "faststream[nats,cli]"


def options() -> argparse.Namespace:
    """The options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.reload", description=__doc__)
    parser.add_argument("--valid", type=int, default=1000, help="edits to be served (%(default)s)")
    parser.add_argument("--invalid", type=int, default=200, help="edits to be refused (%(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="concurrent requests (%(default)s)")
    parser.add_argument("--peer-valid", type=int, default=30, help="--valid for FastStream (%(default)s)")
    parser.add_argument("--peer-invalid", type=int, default=6, help="--invalid for FastStream (%(default)s)")
    parser.add_argument("--peer-env", type=Path, help="keep FastStream's environment in this folder")
    parser.add_argument("--no-peer", action="store_true", help="without FastStream")
    parser.add_argument("--write", action="store_true", help="write reload.md")
    given = parser.parse_args()
    if not 0 <= given.invalid <= given.valid or not 0 <= given.peer_invalid <= given.peer_valid:
        parser.error("a valid edit follows each invalid one: expected no more invalid edits than valid ones")
    return given


async def ours(valid: int, invalid: int, callers: int) -> tuple[Edits, Observed]:
    """Edit an agent of `oam up`."""
    with tempfile.TemporaryDirectory(prefix="oam-bench-") as created:
        agents = Path(created) / "agents"
        agents.mkdir()
        (agents / "probe.py").write_text(PROBE)
        path = agents / "edited.py"
        path.write_text(OURS.format(version=0))
        async with (
            host(Path(created)) as (running, url),
            observer(url) as observing,
            _calling("mesh", url, callers, path, OURS, _INVALID_S, _ANSWER_TIMEOUT_S) as editor,
        ):
            await _edit(editor, observing, running.pid, valid, invalid)
            await _add_imports(editor, observing)
            return await editor.finish(), observing.observed


async def _edit(editor: Editor, observing: Observer, pid: int, valid: int, invalid: int) -> None:
    """Measure the loop without edits, then edit the file."""
    observed = observing.observed
    await observing.delays()  # those of the start are dropped
    await asyncio.sleep(_BASELINE_S)
    observed.baseline = await observing.delays()

    async def collect() -> None:
        if editor.edits.valid % _EDITS_PER_COLLECTION == 0:
            await observing.collect()

    await editor.edit(_WARM_UP_EDITS, 0, collect)
    await asyncio.sleep(_SETTLE_S)
    before = resident(pid)
    await editor.edit(valid, invalid, collect)
    await asyncio.sleep(_SETTLE_S)
    await observing.collect()
    observed.growth = resident(pid) - before


async def _add_imports(editor: Editor, observing: Observer) -> None:
    """Add slow imports, and remove each one afterwards."""
    for module in SLOW_IMPORTS:
        await observing.delays()
        await editor.save(f"adding an import of {module}", rename, f"import {module}\n")
        observing.observed.imports[module] = await observing.delays()
        await editor.save("removing an import", rename)


async def faststream(folder: Path, valid: int, invalid: int, callers: int) -> Edits:
    """Edit a subscriber of `faststream run --reload`."""
    try:
        python = await asyncio.to_thread(install, folder, _PEER, "import faststream.nats, typer, watchfiles")
    except NotInstalled as exc:
        raise Unavailable(str(exc)) from exc
    async with nats_server() as server:
        source = FASTSTREAM.replace("{url}", server.url)
        with tempfile.TemporaryDirectory(prefix="oam-bench-") as created:
            path = Path(created) / "edited.py"
            path.write_text(source.format(version=0))
            command: list[str | Path] = [python.with_name("faststream"), "run", "edited:app", "--reload"]
            async with (
                started(command, path.parent, is_external=True),
                _calling(
                    "nats", server.url, callers, path, source, _PEER_INVALID_S, _PEER_ANSWER_TIMEOUT_S
                ) as editor,
            ):
                await editor.edit(valid, invalid)
                return await editor.finish()


@asynccontextmanager
async def _calling(  # noqa: PLR0913, PLR0917 - the arguments of an Editor and of its callers
    kind: str, url: str, callers: int, path: Path, source: str, invalid_s: float, timeout_s: float
) -> AsyncIterator[Editor]:
    """Callers that send requests, and an editor of the agent that they call."""
    async with started(program("reload_callers", kind, url, callers)) as calling:
        editor = Editor(path, lambda version: source.format(version=version), calling, invalid_s, timeout_s)
        if await editor.first_answer() is None:
            raise ProgramFailed(f"no answer of the agent within {timeout_s:g} s of the start")
        yield editor


async def measure(given: argparse.Namespace, folder: Path, report: Report) -> None:
    """Measure our host, then FastStream."""
    report.edits, report.observed = await ours(given.valid, given.invalid, given.callers)
    report.idle = [await idle(_WATCHED_FILES, _IDLE_S, option) for option in ("--reload", "--no-reload")]
    if given.no_peer:
        report.skipped = "skipped (--no-peer)"
        return
    try:
        report.peer = await faststream(folder, given.peer_valid, given.peer_invalid, given.callers)
    except (Unavailable, ProgramFailed) as exc:
        report.skipped = str(exc)


def main() -> int:
    """Run the command; the exit code is 1 if a request was not answered correctly."""
    given, load = options(), os.getloadavg()[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that started processes are stopped
    report = Report()
    with ExitStack() as stack:
        folder = given.peer_env or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oam-peer-")))
        asyncio.run(measure(given, folder, report))
    facts = [f"{given.callers} callers", *machine(load)]
    console = Console()
    # A pipe has no width.
    console.width = max(console.width, _TABLE_WIDTH)
    console.print(report.as_table(), *facts, sep="\n", highlight=False)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(report.as_markdown(facts), encoding="utf-8")
    return 1 if report.edits.incorrect else 0


if __name__ == "__main__":
    sys.exit(main())
