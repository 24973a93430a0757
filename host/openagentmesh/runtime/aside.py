"""Authors' code that must not hold up the event loop: for a moment on it, else in a thread beside it."""

import asyncio
import ctypes
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextvars import copy_context
from typing import Final, TypeVar

T = TypeVar("T")
# Seconds after which the event loop makes way for work beside it, and the other way round.
_SWITCH: Final = 0.0001


class TookTooLong(Exception):
    """The work did not end within its limit; `stack` is where it was then."""

    def __init__(self, stack: traceback.StackSummary) -> None:
        super().__init__("took too long")
        self.stack = stack


class Interrupted(BaseException):
    """The work did not end in the moment it was given."""


def at_once(work: Callable[[], T], limit: float) -> T:
    """Run `work` here and now, on the event loop's own thread; what it raises is raised.

    On a busy machine a thread would wait longer for its turns than most work takes. What is
    not done after `limit` seconds is interrupted, a sleep too.

    Raises:
        Interrupted: it did not end in time, was given none, or could not be interrupted on this system.

    """
    is_main = threading.current_thread() is threading.main_thread()
    if limit <= 0 or not is_main or not hasattr(signal, "setitimer"):
        raise Interrupted
    working, began, loop = True, time.monotonic(), asyncio._get_running_loop()  # noqa: SLF001 - made for those who implement loops

    def interrupt(_number: int, _frame: object) -> None:
        if working:
            raise Interrupted

    def tell_unraisable(what: "sys.UnraisableHookArgs") -> None:
        # It may come while some object is thrown away; then it is swallowed, and comes again.
        if not isinstance(what.exc_value, Interrupted):
            unraisable(what)

    unraisable, sys.unraisablehook = sys.unraisablehook, tell_unraisable
    handler = signal.signal(signal.SIGALRM, interrupt)
    # Again and again: the work may swallow what interrupts it.
    left, interval = signal.setitimer(signal.ITIMER_REAL, limit, limit)
    try:
        return work()
    finally:
        working = False
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        sys.unraisablehook = unraisable
        # An interruption may come while the stand-in for it is put in place, or taken away.
        asyncio._set_running_loop(loop)  # noqa: SLF001 - as above
        if left:
            left = max(0.001, left - (time.monotonic() - began))
            signal.setitimer(signal.ITIMER_REAL, left, interval)


async def aside(work: Callable[[], T], limit: float, when_late: Callable[[], None] = lambda: None) -> T:
    """Run `work` in a thread; the loop goes on meanwhile.

    Args:
        work: what to do. What it raises is raised, KeyboardInterrupt and SystemExit as RuntimeError:
            they would end the event loop.
        limit: in seconds. After it the thread is told to end, and left.
        when_late: called on the loop when a thread that was left has ended at last.

    Raises:
        TookTooLong: it did not end within the limit.

    """
    loop = asyncio.get_running_loop()
    done: asyncio.Future[T] = loop.create_future()
    context = copy_context()

    def settle(result: T | None, exc: BaseException | None) -> None:
        if done.done():
            when_late()
        elif exc is not None:
            done.set_exception(exc)
        else:
            done.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, failure = None, None
        try:
            result = context.run(work)
        except Exception as exc:  # noqa: BLE001 - raised where it is awaited
            failure = exc
        except BaseException as exc:  # noqa: BLE001 - as above
            failure = RuntimeError(f"{type(exc).__name__}: {exc}")
            failure.__cause__ = exc
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, result, failure)

    thread = threading.Thread(target=run, name="oam-aside", daemon=True)
    # A busy loop gives the interpreter away every 5 ms only, which each file read would wait for.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH)
    thread.start()
    try:
        async with asyncio.timeout(limit):
            return await asyncio.shield(done)
    except TimeoutError:
        stack = _stack_of(thread)
        _stop(thread)
        raise TookTooLong(stack) from None
    finally:
        sys.setswitchinterval(interval)
        done.cancel()


def _stack_of(thread: threading.Thread) -> traceback.StackSummary:
    frame = sys._current_frames().get(thread.ident or 0)  # noqa: SLF001 - made for this
    return traceback.extract_stack(frame) if frame else traceback.StackSummary()


def _stop(thread: threading.Thread) -> None:
    """Raise SystemExit in a thread, at its next step in Python."""
    ctypes.pythonapi.PyThreadState_SetAsyncExc(
        ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit)
    )
