"""Freeing the cycles of old versions at once, where that does not hold up the event loop."""

import gc
import math
import sys
from time import perf_counter
from typing import Any, Final, Literal

_MAX_PAUSE_S: Final = 0.005
# What a collection takes at most for each block of memory that was allocated since the last one.
_MAX_S_PER_BLOCK: Final = 0.5e-6


class Garbage:
    """Observes full collections in its `with` block, to predict how long the next one takes."""

    def __init__(self) -> None:
        self._took_s = math.inf
        self._blocks = 0
        self._began = 0.0

    def __enter__(self) -> None:
        gc.callbacks.append(self._on_collection)

    def __exit__(self, *_: object) -> None:
        gc.callbacks.remove(self._on_collection)

    def collect_if_short(self) -> None:
        """Collect everything, unless that may take longer than agents may stand still."""
        grown = max(0, sys.getallocatedblocks() - self._blocks)
        if self._took_s + grown * _MAX_S_PER_BLOCK <= _MAX_PAUSE_S:
            gc.collect()

    def _on_collection(self, phase: Literal["start", "stop"], info: dict[str, Any]) -> None:
        if info["generation"] < 2:  # noqa: PLR2004 - the oldest generation, hence a full collection
            return
        if phase == "start":
            self._began = perf_counter()
        else:
            self._took_s, self._blocks = perf_counter() - self._began, sys.getallocatedblocks()
