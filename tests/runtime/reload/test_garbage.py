"""Garbage of old versions is collected at once, where that takes a few milliseconds."""

import gc
import weakref
from collections.abc import Iterator

import pytest
from openagentmesh.runtime.reload.garbage import Garbage


class Cycle:
    """An object that only a collection frees."""

    def __init__(self) -> None:
        self.itself = self


@pytest.fixture
def garbage() -> Iterator[Garbage]:
    """Garbage of a process with few objects, as after `oam up` has started."""
    is_frozen = gc.get_freeze_count()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        with (observed := Garbage()):
            yield observed
    finally:
        gc.enable()
        if not is_frozen:
            gc.unfreeze()


def cycle() -> "weakref.ref[Cycle]":
    return weakref.ref(Cycle())


def test_garbage_is_collected_when_that_is_short(garbage: Garbage) -> None:
    """After a short collection the next one is predicted to be short."""
    gc.collect()
    lost = cycle()
    assert lost() is not None
    garbage.collect_if_short()
    assert lost() is None


def test_garbage_stays_when_a_collection_may_be_long(garbage: Garbage) -> None:
    """Before the first collection is observed, and with many new objects, nothing is collected."""
    lost = cycle()
    garbage.collect_if_short()
    assert lost() is not None
    gc.collect()
    lost, many = cycle(), [[number] for number in range(200_000)]
    garbage.collect_if_short()
    assert lost() is not None
    assert many
