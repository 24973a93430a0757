"""The rows: measurements, their candidates and their targets."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.benchmarks import hosts
from tests.benchmarks.candidates import (
    FLOOR,
    FLOOR_FAST,
    HOST,
    OURS,
    OURS_FAST,
    PEER,
    WITH_PLUGINS,
    Candidate,
)
from tests.benchmarks.processes import nats_server, program, started

Sample = Callable[[Candidate, Path], Awaitable[float]]
"""Measures a candidate once, given the interpreter that runs it."""


@dataclass(frozen=True)
class Target:
    """The limit of a value, or of its ratio to the row's base: a maximum, or a minimum."""

    limit: float
    of_base: bool = False
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a value, or a ratio if the target is one, is within the limit."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Row:
    """One measurement of several candidates.

    Attributes:
        name: its name in the table and for `--rows`.
        title: what is measured, with its unit.
        base: the row and the candidate that the others are compared with.
        target: the target of our candidates.
    """

    name: str
    title: str
    sample: Sample
    candidates: tuple[Candidate, ...]
    base: tuple[str, Candidate] | None = None
    target: Target | None = None

    @property
    def base_text(self) -> str:
        """The base of ratios as text."""
        return f" (ratio to {self.base[0]}, {self.base[1].name})" if self.base else ""

    @property
    def target_text(self) -> str:
        """The target as text."""
        if self.target is None:
            return ""
        sign = "≥" if self.target.at_least else "≤"
        return f"{sign} {self.target.limit:.3g}{' x' if self.target.of_base else ''}"


async def under_load(measure: str, count: int, candidate: Candidate, python: Path) -> float:
    """The result of a load with a server, a provider and a caller, one process each."""
    async with nats_server() as server:
        plugin = [candidate.plugin] if candidate.plugin else []
        arguments = (*plugin, server.url, candidate.loop)
        async with started(program(candidate.program, *arguments, python=python)) as provider:
            await provider.read()
            command = program(candidate.program, *arguments, measure, count, python=python)
            async with started(command) as caller:
                value: float = (await caller.read())["value"]
                return value


async def layer(candidate: Candidate, python: Path) -> float:
    """The time that the middlewares of plugins add to a call within one process, in µs."""
    async with started(program("with_plugins", candidate.plugin, python=python)) as measured:
        value: float = (await measured.read())["value"]
        return value


ALL: Final = (FLOOR, FLOOR_FAST, OURS, OURS_FAST, PEER)


# For each of WITH_PLUGINS, in µs; most of the time of the last two is spent in libraries.
_LAYER_TARGETS: Final = (Target(1), Target(5), Target(15), Target(20), None, None)


def rows(*, quick: bool) -> list[Row]:
    """All rows; with `quick` the loads are smaller."""
    divisor = 4 if quick else 1
    few, many, streamed = 4000 // divisor, 16_000 // divisor, 40_000 // divisor
    return [
        Row(
            "call",
            "one call at a time: p50, µs",
            partial(under_load, "latency", few),
            ALL,
            ("call", FLOOR),
            Target(1.15, of_base=True),
        ),
        Row(
            "rate",
            "64 concurrent calls: calls/s",
            partial(under_load, "rate", many),
            ALL,
            ("rate", FLOOR),
            Target(0.85, of_base=True, at_least=True),
        ),
        Row(
            "sleep",
            "100 concurrent calls of a handler that sleeps 50 ms: time until all are answered, ms",
            partial(under_load, "naps", 100),
            (OURS, OURS_FAST, PEER),
            ("sleep", OURS),
            Target(80),
        ),
        Row(
            "stream",
            "one stream of small chunks: chunks/s; the target is 40,000 where the SDK reaches 3,900",
            partial(under_load, "chunks", streamed),
            ALL,
            ("stream", PEER),
            Target(40_000 / 3_900, of_base=True, at_least=True),
        ),
        Row(
            "slow-reader",
            "an endless stream with a slow reader: growth of both processes' memory, MiB",
            partial(under_load, "slow", 0),
            (OURS,),
            None,
            Target(1),
        ),
        Row(
            "fanout",
            "one publisher and 10 subscribers: received events/s",
            partial(under_load, "fanout", streamed // 20),
            ALL,
            ("fanout", FLOOR),
            Target(0.8, of_base=True, at_least=True),
        ),
        Row(
            "kv",
            "reading a key of the shared state: p50, µs",
            partial(under_load, "kv", few // 2),
            ALL,
            ("kv", FLOOR),
            Target(1.2, of_base=True),
        ),
        Row(
            "cancel",
            "from the cancellation of a call until its handler is cancelled: longest of 20, ms",
            partial(under_load, "stop", 20),
            (OURS, OURS_FAST),
            None,
            Target(50),
        ),
        Row(
            "plugins",
            "one call at a time, with plugins at caller and agent: p50, µs",
            partial(under_load, "latency", few),
            (OURS, *WITH_PLUGINS),
            ("plugins", OURS),
        ),
        *[
            Row(
                f"layer-{each.plugin}",
                "time that plugins add to a call within one process: µs",
                layer,
                (each,),
                None,
                target,
            )
            for each, target in zip(WITH_PLUGINS, _LAYER_TARGETS, strict=True)
        ],
        Row(
            "start-1k",
            "start of a host with 1,000 agents until all answer: s",
            _start(1000),
            (HOST,),
            None,
            Target(0.8),
        ),
        Row(
            "start-10k",
            "start of a host with 10,000 agents until all answer: s",
            _start(10_000),
            (HOST,),
            ("start-1k", HOST),
            Target(5),
        ),
        Row(
            "catalog-10k",
            "connecting and reading a catalog of 10,000 agents: s",
            partial(hosts.catalog, 10_000),
            (HOST,),
            None,
            Target(0.5),
        ),
        Row(
            "up",
            "start of `oam up` with the samples until the first answer: s",
            hosts.up,
            (HOST,),
            None,
            Target(1),
        ),
        Row(
            "memory",
            "memory of an idle agent, of 10,000 in a host: KiB",
            partial(hosts.memory, 10_000),
            (HOST,),
            None,
            Target(25),
        ),
    ]


def _start(count: int) -> Sample:
    return partial(hosts.start, count)
