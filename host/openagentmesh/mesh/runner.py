"""Run until a signal: signal handlers, and the fastest event loop that is installed."""

import asyncio
import os
import signal
from collections.abc import Callable, Coroutine
from importlib import import_module
from importlib.util import find_spec
from types import FrameType
from typing import Any, Final, TypeVar

from openagentmesh.protocol.errors import ConnectionFailed
from openagentmesh.transport.tasks import cancel_and_wait

_SIGNALS: Final = (signal.SIGINT, signal.SIGTERM)

T = TypeVar("T")


def run(main: Coroutine[Any, Any, T]) -> T:
    """`asyncio.run`, on uvloop where that is installed (`openagentmesh[fast]`)."""
    factory = import_module("uvloop").new_event_loop if find_spec("uvloop") else None
    with asyncio.Runner(loop_factory=factory) as runner:
        return runner.run(main)


async def wait_for_stop(stop: asyncio.Event, closed: asyncio.Event) -> None:
    """Wait until `stop` is set; ConnectionFailed when the connection is closed for good before."""
    waiting = [asyncio.create_task(event.wait()) for event in (stop, closed)]
    await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
    await cancel_and_wait(*waiting)
    if not stop.is_set():
        raise ConnectionFailed("The connection was closed for good.")


def stop_event(on_first: Callable[[], None] = lambda: None) -> asyncio.Event:
    """An event that the first SIGINT or SIGTERM sets; the second one ends the process at once."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        on_first()
        stop.set()

    def on_signal_in_thread(number: int, _frame: FrameType | None) -> None:
        loop.call_soon_threadsafe(on_signal, number)

    for number in _SIGNALS:
        try:
            loop.add_signal_handler(number, on_signal, number)
        except NotImplementedError:  # loops on Windows
            signal.signal(number, on_signal_in_thread)
    return stop
