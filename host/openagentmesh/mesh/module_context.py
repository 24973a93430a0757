"""The module that a host is loading, and what it declares meanwhile."""

import logging
import sys
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field, is_dataclass
from types import FrameType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from pydantic import BaseModel

from openagentmesh.agent.agent import AgentVersion
from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import InvalidAgent

log = logging.getLogger(__name__)

Migration = Callable[[dict[str, Any], str], dict[str, Any]]


@dataclass(slots=True, eq=False)
class Generation:
    """What one loading of a module declares.

    Attributes:
        kept: the state that survives the next reload, by name.
        hints: the types of kept state: its class, or the annotation of a collection.
        disposals: called when another generation has replaced it.
        migration: converts the state of an older generation.
        declined: why it cannot be replaced while it runs; empty when it can.
        previous: the generation that it replaces.
    """

    agents: list[AgentVersion] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
    hints: dict[str, Any] = field(default_factory=dict)
    disposals: list[Callable[[], Any]] = field(default_factory=list)
    migration: Migration | None = None
    declined: str = ""
    previous: "Generation | None" = None

    @property
    def version(self) -> str:
        """The version of its first agent; empty without agents."""
        return self.agents[0].contract.version if self.agents else ""


@dataclass(slots=True)
class LoadingModule:
    """A module that is being loaded for a node.

    Attributes:
        own: what the module's managed files declare.
        unmanaged: what is declared by modules that it imports and that are not executed again.
        is_managed: whether a module, by its name, is executed again when its file changes.
    """

    origin: str
    node: Node
    own: Generation
    unmanaged: Generation
    settings: dict[str, Any]
    is_managed: Callable[[str], bool]
    declared: dict[str, AgentVersion] = field(default_factory=dict)

    @property
    def generation(self) -> Generation:
        """The generation of what is declared now."""
        name = _executing_module()
        return self.own if not name or self.is_managed(name) else self.unmanaged

    def survives(self, kept: type) -> bool:
        """Whether objects of a class may be passed on to the next generation as they are."""
        return not self.is_managed(kept.__module__)

    def declare(self, agent: AgentVersion) -> None:
        """Add an agent, in place of an earlier one of the same name."""
        earlier = self.declared.get(agent.name)
        if earlier is not None:
            log.warning(
                "%s declares the agent '%s' twice: the one at %s serves, not the one at %s",
                self.origin, agent.name, agent.source, earlier.source,
            )  # fmt: skip
            for generation in (self.own, self.unmanaged):
                generation.agents = [each for each in generation.agents if each is not earlier]
        self.generation.agents.append(agent)
        self.declared[agent.name] = agent

    def keep(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - the author's object
        """The object of this name that the previous generation kept, or a new one."""
        generation = self.generation
        if name in generation.kept:
            raise InvalidAgent(f"{self.origin} keeps two objects named '{name}'; rename one of them.")
        previous = generation.previous.kept if generation.previous else {}
        hint = _return_hint(make)
        kept = generation.kept[name] = previous[name] if self._is_passed_on(name, previous, hint) else make()
        generation.hints[name] = hint if get_origin(hint) is type(kept) else type(kept)
        if not self.survives(type(kept)) and not has_content(kept):
            raise InvalidAgent(
                f"'{name}' is kept and is a {type(kept).__name__} of {self.origin}, which its next version "
                "cannot take over. Keep a pydantic model, a dataclass, or an object of another package."
            )
        return kept

    def _is_passed_on(self, name: str, previous: dict[str, Any], hint: Any) -> bool:  # noqa: ANN401 - any annotation
        """Whether the previous object itself is used; otherwise its content is, once the module is loaded."""
        if name not in previous:
            return False
        classes = {type(previous[name]), *_classes_in(hint)}
        return all(map(self.survives, classes)) and _is_instance(previous[name], hint)


def _executing_module() -> str:
    """The name of the module that is being imported, of several the innermost; empty for none."""
    frame: FrameType | None = sys._getframe(1)  # noqa: SLF001 - no public access
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
    """Whether an object can be created from the content of another one."""
    return isinstance(kept, BaseModel) or (is_dataclass(kept) and not isinstance(kept, type))


def _return_hint(make: Callable[[], Any]) -> Any:  # noqa: ANN401 - any annotation
    try:
        return get_type_hints(make).get("return", object)
    except Exception:  # noqa: BLE001 - evaluating an author's annotation may raise anything: as without one
        return object


def _classes_in(hint: Any) -> Iterator[type]:  # noqa: ANN401 - any annotation
    """The classes in an annotation: str and Job for `dict[str, Job]`."""
    if isinstance(hint, type) and not get_args(hint):
        yield hint
    for part in get_args(hint):
        yield from _classes_in(part)


def _is_instance(kept: object, hint: Any) -> bool:  # noqa: ANN401 - any annotation
    """Whether an object matches an annotation, as far as `isinstance` can check it."""
    origin = get_origin(hint)
    try:
        return isinstance(kept, origin if isinstance(origin, type) and origin is not UnionType else hint)
    except TypeError:
        return True


_current: ContextVar[LoadingModule | None] = ContextVar("loading_module", default=None)
current_module = _current.get
set_current_module = _current.set
reset_current_module = _current.reset
