"""The one backoff of the project: exponential, with jitter."""

from collections.abc import Callable
from random import Random

from tenacity import RetryCallState

# A generator of our own: programs that seed the global one get the same numbers with and without us.
_random = Random()  # noqa: S311 - jitter is not a secret
jitter = _random.uniform


def jittered_backoff(
    first: float, longest: float, *, at_least: float = 0.0
) -> Callable[[RetryCallState], float]:
    """A `wait` of tenacity, in seconds: random up to `first`, doubled with each attempt up to `longest`.

    Full jitter by default: clients that collide once do not collide again. With `at_least`, that share of
    the current maximum is always waited.
    """

    def wait(state: RetryCallState) -> float:
        limit = min(longest, first * 2.0 ** min(state.attempt_number - 1, 60))
        return jitter(at_least * limit, limit)

    return wait
