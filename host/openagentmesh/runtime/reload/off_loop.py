"""Run authors' code off the event loop: in a thread, for which the loop waits a moment."""

import asyncio
import ctypes
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import Future, wait
from contextvars import copy_context
from typing import Final, TypeVar

T = TypeVar("T")
# How long the event loop may block for such work. On busy cores a thread beside a busy loop waits longer
# for its turns than most work takes.
_BLOCK_S: Final = 0.008
# The interval of thread switches while the loop and the thread compete.
_SWITCH_S: Final = 0.0001


class TookTooLong(Exception):
    """The work did not end within its limit; `stack` is where it was then."""

    def __init__(self, stack: traceback.StackSummary) -> None:
        super().__init__("took too long")
        self.stack = stack


async def run_off_loop(
    work: Callable[[], T],
    limit_s: float,
    *,
    is_slow: bool = False,
    on_late_end: Callable[[], None] = lambda: None,
) -> T:
    """Run `work` in a thread; the loop blocks for a moment, until quick work is done, unless it `is_slow`.

    After `limit_s` seconds the thread is interrupted and abandoned; `on_late_end` is called once it ends.
    What it raises is raised here, KeyboardInterrupt and SystemExit as RuntimeError: they would end the loop.

    Raises:
        TookTooLong: it did not end within the limit.
    """
    thread, done = _start(work)
    try:
        if not is_slow:
            wait([done], _BLOCK_S)
        if not done.done() and not await _ends_within(done, limit_s):
            raise TookTooLong(_stack_of(thread))
        return done.result()
    finally:
        if not done.done():
            _raise_system_exit(thread)
            _on_loop_when_done(done, on_late_end)
        del done  # its exception refers to this frame


def _start(work: Callable[[], T]) -> tuple[threading.Thread, "Future[T]"]:
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()
    context = copy_context()

    def run() -> None:
        try:
            done.set_result(context.run(work))
        except Exception as exc:  # noqa: BLE001 - raised where it is awaited
            done.set_exception(exc)
        except BaseException as exc:  # noqa: BLE001 - as above
            failure = RuntimeError(f"{type(exc).__name__}: {exc}")
            failure.__cause__ = exc
            done.set_exception(failure)

    thread = threading.Thread(target=run, name="oam-off-loop", daemon=True)
    thread.start()
    return thread, done


async def _ends_within(done: "Future[T]", limit_s: float) -> bool:
    ended = asyncio.Event()
    _on_loop_when_done(done, ended.set)
    # A busy loop releases the interpreter every 5 ms only, and each file read would wait for that.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_S)
    try:
        async with asyncio.timeout(limit_s):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        sys.setswitchinterval(interval)
    return True


def _on_loop_when_done(done: "Future[T]", function: Callable[[], None]) -> None:
    """Call a function on this loop when the work is done, unless the loop is closed by then."""
    loop = asyncio.get_running_loop()

    def call(_done: "Future[T]") -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function)

    done.add_done_callback(call)


def _stack_of(thread: threading.Thread) -> traceback.StackSummary:
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - no public access
    return traceback.extract_stack(frame) if frame else traceback.StackSummary()


def _raise_system_exit(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, at its next step in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )
