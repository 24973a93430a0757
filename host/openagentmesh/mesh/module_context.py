"""What a mesh must know while a host loads the module that makes it, and what the module tells."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from types import FrameType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from openagentmesh.agent.agent import Agent
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import InvalidAgent

log = logging.getLogger(__name__)

Migration = Callable[[dict[str, Any], str], dict[str, Any]]


@dataclass(slots=True, eq=False)
class Generation:
    """One loading of a module: what it declares.

    Attributes:
        agents: its agents, in their order.
        kept: the state that is to survive the next reload, by name.
        hints: the types of what is kept: its class, or what a collection is said to hold.
        disposals: what is called when another generation has taken its place.
        migration: makes its state from an older generation's.
        declined: why it cannot be replaced while it runs; empty when it can.
        before: the generation it is to replace.

    """

    agents: list[Agent] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    disposals: list[Callable[[], Any]] = field(default_factory=list)
    migration: Migration | None = None
    declined: str = ""
    before: "Generation | None" = None

    @property
    def version(self) -> str:
        """The version of its first agent; empty when it has none."""
        return self.agents[0].contract.version if self.agents else ""


@dataclass(slots=True)
class Loading:
    """One module being loaded, on behalf of a node.

    Attributes:
        origin: what is loaded, for messages.
        own: what the module declares.
        loose: what others declare that it imports, and that are not executed again when it is.
        settings: what mesh.toml has for it.
        is_managed: whether a module is one that is executed again when its file changes.
        declared: all agents by name.

    """

    origin: str
    node: Node
    own: Generation
    loose: Generation
    settings: dict[str, Any]
    is_managed: Callable[[str], bool]
    declared: dict[str, Agent] = field(default_factory=dict)

    @property
    def generation(self) -> Generation:
        """Where what is declared right now belongs."""
        name = _executed_now()
        return self.own if not name or self.is_managed(name) else self.loose

    def crosses(self, kept: type) -> bool:
        """Whether objects of a class may pass from one generation to the next as they are."""
        return not self.is_managed(kept.__module__)

    def declare(self, agent: Agent) -> None:
        """Take an agent that the module declares; one of the same name makes way, as in a mesh alone."""
        before = self.declared.get(agent.name)
        if before is not None:
            log.warning(
                "%s declares the agent '%s' twice: the one at %s serves, not the one at %s",
                self.origin, agent.name, agent.source, before.source,
            )  # fmt: skip
            for generation in (self.own, self.loose):
                generation.agents = [each for each in generation.agents if each is not before]
        self.generation.agents.append(agent)
        self.declared[agent.name] = agent

    def keep(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - the author's object
        """The object of this name that an older generation kept, or a new one.

        Raises:
            InvalidAgent: the name is taken, or no other generation could have what was made.

        """
        generation = self.generation
        if name in generation.kept:
            raise InvalidAgent(f"{self.origin} keeps two things under the name '{name}'; rename one of them.")
        before = generation.before.kept if generation.before else {}
        hint = _hint_of(make)
        # What cannot pass as it is gets the old one's content when all of the module is known.
        passes = (
            name in before
            and all(map(self.crosses, {type(before[name]), *_classes_in(hint)}))
            and _is_wanted(before[name], hint)
        )
        kept = generation.kept[name] = before[name] if passes else make()
        generation.hints[name] = hint if get_origin(hint) is type(kept) else type(kept)
        if not self.crosses(type(kept)) and not has_content(kept):
            raise InvalidAgent(
                f"'{name}' is kept and a {type(kept).__name__} of {self.origin}, so that its next version "
                "could not take it over. Only pydantic models, dataclasses and what other packages define "
                "can be kept; make it one of these."
            )
        return kept


def _executed_now() -> str:
    """The name of the module that is being imported, of several the innermost; empty when there is none."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - nobody else tells
    while frame is not None:
        name = frame.f_globals.get("__name__", "")
        if (
            frame.f_code.co_name == "<module>"
            and getattr(sys.modules.get(name), "__dict__", None) is frame.f_globals
        ):
            return str(name)
        frame = frame.f_back
    return ""


def has_content(kept: object) -> bool:
    """Whether an object can be made anew from the content of another one."""
    return isinstance(kept, BaseModel) or (is_dataclass(kept) and not isinstance(kept, type))


def _hint_of(make: Callable[[], Any]) -> Any:  # noqa: ANN401 - a hint may be anything
    """What a function says that it makes; `object` when it does not say."""
    try:
        return get_type_hints(make).get("return", object)
    except Exception:  # noqa: BLE001 - as above
        return object


def _classes_in(hint: Any) -> Iterator[type]:  # noqa: ANN401 - as above
    """The classes that a hint names: of `dict[str, Job]` they are str and Job."""
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _classes_in(part)


def _is_wanted(kept: object, hint: Any) -> bool:  # noqa: ANN401 - as above
    """Whether an object is what a hint says, as far as can be told."""
    origin = get_origin(hint)
    try:
        return isinstance(kept, origin if isinstance(origin, type) and origin is not UnionType else hint)
    except TypeError:  # a hint is no promise
        return True


_current: ContextVar[Loading | None] = ContextVar("loading", default=None)
current_loading = _current.get
set_loading = _current.set
reset_loading = _current.reset
