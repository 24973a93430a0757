"""The one backoff of the project: exponential, with jitter."""

from collections.abc import Callable
from random import Random

from tenacity import RetryCallState

# A generator of our own: programs that seed the global one get the same numbers with and without us.
_random = Random()  # noqa: S311 - jitter is not a secret
jitter = _random.uniform
_MAX_DOUBLINGS = 60


class Backoff:
    """Delays in seconds: random up to `first`, doubled each time up to `maximum`.

    Full jitter by default: clients that collide once do not collide again. At least the part `at_least`
    of the current maximum is waited.
    """

    def __init__(self, first: float, maximum: float, *, at_least: float = 0.0) -> None:
        self._first = first
        self._maximum = maximum
        self._at_least = at_least
        self._attempts = 0

    def next(self) -> float:
        """The next delay."""
        self._attempts += 1
        return self.delay(self._attempts)

    def reset(self) -> None:
        """Begin with `first` again."""
        self._attempts = 0

    def delay(self, attempt: int) -> float:
        """The delay after attempt number `attempt`, which counts from 1."""
        limit = min(self._maximum, self._first * 2.0 ** min(attempt - 1, _MAX_DOUBLINGS))
        return jitter(self._at_least * limit, limit)


def jittered_backoff(first: float, maximum: float) -> Callable[[RetryCallState], float]:
    """The same delays as a `wait` of tenacity."""
    backoff = Backoff(first, maximum)
    return lambda state: backoff.delay(state.attempt_number)
