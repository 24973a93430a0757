"""The rows: what is measured, of whom, and what is aimed at."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Final

from tests.benchmarks import hosts
from tests.benchmarks.competitors import FLOOR, FLOOR_FAST, HOST, OURS, OURS_FAST, PEER, PLUGGED, Competitor
from tests.benchmarks.processes import nats_server, program, started

Sample = Callable[[Competitor, Path], Awaitable[float]]
"""Measures a competitor once, given the interpreter that runs it."""


@dataclass(frozen=True)
class Target:
    """What a value, or its ratio to the row's base, should be at most or at least."""

    limit: float
    of_base: bool = False
    at_least: bool = False

    def met(self, value: float) -> bool:
        """Whether a value, or a ratio where the target is one, is good enough."""
        return value >= self.limit if self.at_least else value <= self.limit


@dataclass(frozen=True)
class Row:
    """One line of questions.

    Attributes:
        name: how `--rows` calls it.
        title: what is measured, with its unit.
        sample: measures one competitor once.
        who: the competitors.
        base: the row and the competitor that the others are compared with.
        target: what ours should reach.
    """

    name: str
    title: str
    sample: Sample
    who: tuple[Competitor, ...]
    base: tuple[str, Competitor] | None = None
    target: Target | None = None

    @property
    def base_text(self) -> str:
        """What ratios are ratios to, in words."""
        return f" (ratio to {self.base[0]}, {self.base[1].name})" if self.base else ""

    @property
    def target_text(self) -> str:
        """The target in words."""
        if self.target is None:
            return ""
        sign = "≥" if self.target.at_least else "≤"
        return f"{sign} {self.target.limit:.3g}{' x' if self.target.of_base else ''}"


async def under_load(measure: str, count: int, competitor: Competitor, python: Path) -> float:
    """One load: a server, a provider, a caller, one process each."""
    async with nats_server() as server:
        plugin = [competitor.plugin] if competitor.plugin else []
        place = (*plugin, server.url, competitor.loop)
        async with started(program(competitor.program, *place, python=python)) as provider:
            await provider.said()
            command = program(competitor.program, *place, measure, count, python=python)
            async with started(command) as caller:
                value: float = (await caller.said())["value"]
                return value


async def layer(competitor: Competitor, python: Path) -> float:
    """What the layers of plugins add to a call within one process, in µs."""
    async with started(program("plugged", competitor.plugin, python=python)) as measured:
        value: float = (await measured.said())["value"]
        return value


ALL: Final = (FLOOR, FLOOR_FAST, OURS, OURS_FAST, PEER)


# What the layers of each of PLUGGED may add, in µs; the SDK's spans and the limits' meters are others' work.
_LAYER_TARGETS: Final = (Target(1), Target(5), Target(15), Target(20), None, None)


def rows(*, quick: bool) -> list[Row]:
    """All rows; with `quick` the loads are smaller."""
    less = 4 if quick else 1
    few, many, streamed = 4000 // less, 16_000 // less, 40_000 // less
    return [
        Row(
            "call",
            "a call, one at a time: p50, µs",
            partial(under_load, "latency", few),
            ALL,
            ("call", FLOOR),
            Target(1.15, of_base=True),
        ),
        Row(
            "rate",
            "64 calls at once: calls/s",
            partial(under_load, "rate", many),
            ALL,
            ("rate", FLOOR),
            Target(0.85, of_base=True, at_least=True),
        ),
        Row(
            "naps",
            "100 calls at once of a handler that sleeps 50 ms: all answered, ms",
            partial(under_load, "naps", 100),
            (OURS, OURS_FAST, PEER),
            ("naps", OURS),
            Target(80),
        ),
        Row(
            "stream",
            "one stream of small chunks: chunks/s, where the SDK's 3,900 stand for 40,000",
            partial(under_load, "chunks", streamed),
            ALL,
            ("stream", PEER),
            Target(40_000 / 3_900, of_base=True, at_least=True),
        ),
        Row(
            "slow",
            "a stream without an end and a slow reader: growth of both processes, MiB",
            partial(under_load, "slow", 0),
            (OURS,),
            None,
            Target(1),
        ),
        Row(
            "fanout",
            "a publisher and 10 subscribers: events/s received",
            partial(under_load, "fanout", streamed // 20),
            ALL,
            ("fanout", FLOOR),
            Target(0.8, of_base=True, at_least=True),
        ),
        Row(
            "kv",
            "a key of the shared state: p50, µs",
            partial(under_load, "kv", few // 2),
            ALL,
            ("kv", FLOOR),
            Target(1.2, of_base=True),
        ),
        Row(
            "stop",
            "from a caller's cancel until its handler is stopped, the longest of 20: ms",
            partial(under_load, "stop", 20),
            (OURS, OURS_FAST),
            None,
            Target(50),
        ),
        Row(
            "plugins",
            "a call, one at a time, with plugins at both ends: p50, µs",
            partial(under_load, "latency", few),
            (OURS, *PLUGGED),
            ("plugins", OURS),
        ),
        *[
            Row(
                f"layer-{each.plugin}",
                "what plugins add to a call in one process: µs",
                layer,
                (each,),
                None,
                aim,
            )
            for each, aim in zip(PLUGGED, _LAYER_TARGETS, strict=True)
        ],
        Row(
            "start-1k",
            "start of a host with 1,000 agents: all callable, s",
            _start(1000),
            (HOST,),
            None,
            Target(0.8),
        ),
        Row(
            "start-10k",
            "start of a host with 10,000 agents: all callable, s",
            _start(10_000),
            (HOST,),
            ("start-1k", HOST),
            Target(5),
        ),
        Row(
            "catalog-10k",
            "a new client connects and reads a catalog of 10,000 agents: s",
            partial(hosts.catalog, 10_000),
            (HOST,),
            None,
            Target(0.5),
        ),
        Row("up", "`oam up` with the sample agents: first answer, s", hosts.up, (HOST,), None, Target(1)),
        Row(
            "memory",
            "an idle agent, of 10,000 in a host: KiB",
            partial(hosts.memory, 10_000),
            (HOST,),
            None,
            Target(25),
        ),
    ]


def _start(count: int) -> Sample:
    return partial(hosts.start, count)
