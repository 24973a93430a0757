"""Edits an agent under load, as editors do, and prints what that cost its callers: ours and FastStream's."""

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

from tests.benchmarks.competitors import Unavailable
from tests.benchmarks.editing import Editor, Edits
from tests.benchmarks.hosts import resident
from tests.benchmarks.processes import ProgramFailed, nats_server, program, started
from tests.benchmarks.reload_report import Report
from tests.benchmarks.results import machine
from tests.benchmarks.saving import FASTSTREAM, OURS, PROBE, SLOW_IMPORTS, rename
from tests.benchmarks.watched import Observed, Observer, host, idle, observer
from tests.support.published_sdk import NotInstalled, install

_WARM_UP: Final = 50
_BASELINE: Final = 5.0
_SETTLED: Final = 0.5
# A host remembers 20 reloads: it is asked before it forgets one.
_LOOK_EVERY: Final = 8
_WATCHED: Final = 2000
_IDLE: Final = 10.0
_PATIENCE: Final = 5.0
# Long enough for a file written in place to be noticed; a restart takes longer.
_BROKEN_FOR: Final = 0.15
_PEER_PATIENCE: Final = 15.0
_PEER_BROKEN_FOR: Final = 1.5
_WIDTH: Final = 120
_PEER: Final = "faststream[nats,cli]"


def options() -> argparse.Namespace:
    """What the command line says."""
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks.reload", description=__doc__)
    parser.add_argument("--good", type=int, default=1000, help="edits that are to be served (%(default)s)")
    parser.add_argument("--broken", type=int, default=200, help="edits that are not (%(default)s)")
    parser.add_argument("--callers", type=int, default=64, help="requests at once (%(default)s)")
    parser.add_argument("--peer-good", type=int, default=30, help="the same of FastStream (%(default)s)")
    parser.add_argument("--peer-broken", type=int, default=6, help="the same (%(default)s)")
    parser.add_argument("--peer-env", type=Path, help="keep FastStream's environment in this folder")
    parser.add_argument("--no-peer", action="store_true", help="leave FastStream out")
    parser.add_argument("--write", action="store_true", help="write reload.md")
    chosen = parser.parse_args()
    if not 0 <= chosen.broken <= chosen.good or not 0 <= chosen.peer_broken <= chosen.peer_good:
        parser.error("each broken edit is mended by a good one: give no more broken ones than good ones")
    return chosen


async def ours(good: int, broken: int, callers: int) -> tuple[Edits, Observed]:
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
            _calling("mesh", url, callers, path, OURS, _BROKEN_FOR, _PATIENCE) as editor,
        ):
            await _edit(editor, observing, running.pid, good, broken)
            await _add_imports(editor, observing)
            return await editor.finish(), observing.observed


async def _edit(editor: Editor, observing: Observer, pid: int, good: int, broken: int) -> None:
    """The edits, and before them what they are compared with."""
    observed = observing.observed
    await observing.standstills()  # the start's
    await asyncio.sleep(_BASELINE)
    observed.before = await observing.standstills()

    async def now_and_then() -> None:
        if editor.edits.good % _LOOK_EVERY == 0:
            await observing.look()

    await editor.edit(_WARM_UP, 0, now_and_then)
    await asyncio.sleep(_SETTLED)
    before = resident(pid)
    await editor.edit(good, broken, now_and_then)
    await asyncio.sleep(_SETTLED)
    await observing.look()
    observed.growth = resident(pid) - before


async def _add_imports(editor: Editor, observing: Observer) -> None:
    """Add an import that takes long, and take it out again."""
    for module in SLOW_IMPORTS:
        await observing.standstills()
        await editor.save(f"adding {module}", rename, f"import {module}\n")
        observing.observed.imports[module] = await observing.standstills()
        await editor.save("taking that out", rename)


async def faststream(folder: Path, good: int, broken: int, callers: int) -> Edits:
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
                started(command, path.parent, foreign=True),
                _calling(
                    "nats", server.url, callers, path, source, _PEER_BROKEN_FOR, _PEER_PATIENCE
                ) as editor,
            ):
                await editor.edit(good, broken)
                return await editor.finish()


@asynccontextmanager
async def _calling(  # noqa: PLR0913, PLR0917 - what an editor is told
    kind: str, url: str, callers: int, path: Path, source: str, broken_for: float, patience: float
) -> AsyncIterator[Editor]:
    """Callers at work, and who edits what they call."""
    async with started(program("reload_callers", kind, url, callers)) as calling:
        editor = Editor(path, lambda version: source.format(version=version), calling, broken_for, patience)
        if await editor.answered() is None:
            raise ProgramFailed(f"nobody answers within {patience:g} s of the start")
        yield editor


async def measure(given: argparse.Namespace, folder: Path, report: Report) -> None:
    """All of it, one after the other."""
    report.edits, report.observed = await ours(given.good, given.broken, given.callers)
    report.idle = [await idle(_WATCHED, _IDLE, option) for option in ("--reload", "--no-reload")]
    if given.no_peer:
        report.skipped = "not wanted (--no-peer)"
        return
    try:
        report.peer = await faststream(folder, given.peer_good, given.peer_broken, given.callers)
    except (Unavailable, ProgramFailed) as exc:
        report.skipped = str(exc)


def main() -> int:
    """The command."""
    given, load = options(), os.getloadavg()[0]
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # what was started is stopped then, too
    report = Report()
    with ExitStack() as stack:
        folder = given.peer_env or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="oam-peer-")))
        asyncio.run(measure(given, folder, report))
    facts = [f"{given.callers} callers", *machine(load)]
    console = Console()
    # A pipe has no width of its own.
    console.width = max(console.width, _WIDTH)
    console.print(report.as_table(), *facts, sep="\n", highlight=False)
    if given.write:
        Path(__file__).with_suffix(".md").write_text(report.as_markdown(facts), encoding="utf-8")
    return 1 if report.edits.harm else 0


if __name__ == "__main__":
    sys.exit(main())
