"""Authors' code that must not hold up the event loop: in a thread, for which the loop waits a moment."""

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
# How long the event loop may stand still for such work, in seconds. On busy cores a thread beside
# a loop at work waits longer for its turns than most work takes.
_MOMENT: Final = 0.008
# Seconds after which the event loop makes way for the thread, and the other way round.
_SWITCH: Final = 0.0001


class TookTooLong(Exception):
    """The work did not end within its limit; `stack` is where it was then."""

    def __init__(self, stack: traceback.StackSummary) -> None:
        super().__init__("took too long")
        self.stack = stack


async def aside(
    work: Callable[[], T],
    limit: float,
    *,
    is_slow: bool = False,
    when_late: Callable[[], None] = lambda: None,
) -> T:
    """Run `work` in a thread; the loop goes on meanwhile, after a moment in which quick work is done.

    Args:
        work: what to do. What it raises is raised, KeyboardInterrupt and SystemExit as RuntimeError:
            they would end the event loop.
        limit: in seconds. After it the thread is told to end, and left.
        is_slow: it is known to take longer than a moment, so the loop does not wait for it.
        when_late: called on the loop when a thread that was left has ended at last.

    Raises:
        TookTooLong: it did not end within the limit.

    """
    thread, done = _started(work)
    try:
        if not is_slow:
            wait([done], _MOMENT)
        if not done.done() and not await _has_ended(done, limit):
            raise TookTooLong(_stack_of(thread))
        return done.result()
    finally:
        if not done.done():
            _stop(thread)
            _call_when_done(done, when_late)
        del done  # what it raises holds this frame, which would hold it


def _started(work: Callable[[], T]) -> tuple[threading.Thread, "Future[T]"]:
    done: Future[T] = Future()
    done.set_running_or_notify_cancel()  # nobody can cancel a thread
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

    thread = threading.Thread(target=run, name="oam-aside", daemon=True)
    thread.start()
    return thread, done


async def _has_ended(done: "Future[T]", limit: float) -> bool:
    ended = asyncio.Event()
    _call_when_done(done, ended.set)
    # A busy loop gives the interpreter away every 5 ms only, which each file read would wait for.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    try:
        async with asyncio.timeout(limit):
            await ended.wait()
    except TimeoutError:
        return False
    finally:
        sys.setswitchinterval(interval)
    return True


def _call_when_done(done: "Future[T]", function: Callable[[], None]) -> None:
    """Call it on this loop, if that is still there then."""
    loop = asyncio.get_running_loop()

    def call(_done: "Future[T]") -> None:
        if not loop.is_closed():
            loop.call_soon_threadsafe(function)

    done.add_done_callback(call)


def _stack_of(thread: threading.Thread) -> traceback.StackSummary:
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - made for this
    return traceback.extract_stack(frame) if frame else traceback.StackSummary()


def _stop(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, at its next step in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )
