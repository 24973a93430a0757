"""What all programs here share: they exchange lines with the runner, and use the event loop it chooses."""

import asyncio
import json
import sys
from collections.abc import Callable, Coroutine
from contextlib import AbstractAsyncContextManager
from importlib import import_module
from typing import Any

from tests.benchmarks.programs.load import MEASURES, Client


def report(**values: object) -> None:
    """Send the runner a line of JSON."""
    sys.stdout.write(json.dumps(values) + "\n")
    sys.stdout.flush()


async def next_line() -> str:
    """The next line from the runner; empty when it has exited."""
    return await asyncio.to_thread(sys.stdin.readline)


def run(main: Coroutine[Any, Any, None], loop: str) -> None:
    """Run `main` on asyncio's own loop or on uvloop's."""
    factory = import_module("uvloop").new_event_loop if loop == "uvloop" else None
    with asyncio.Runner(loop_factory=factory) as runner:
        runner.run(main)


def provide_or_measure(
    serving: Callable[[str], AbstractAsyncContextManager[object]],
    calling: Callable[[str], AbstractAsyncContextManager[Client]],
) -> None:
    """The main of a candidate: `URL LOOP` serves, `URL LOOP MEASURE COUNT` measures."""

    async def provide(url: str) -> None:
        async with serving(url):
            report(ready=True)
            await next_line()

    async def measure(url: str, name: str, count: int) -> None:
        async with calling(url) as client:
            report(value=await MEASURES[name](client, count))

    url, loop, *what = sys.argv[1:]
    run(measure(url, what[0], int(what[1])) if what else provide(url), loop)
