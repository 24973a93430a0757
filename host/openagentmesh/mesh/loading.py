"""What a mesh must know while a host loads the module that makes it, and what the module tells."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from openagentmesh.mesh.node import Node
from openagentmesh.protocol.errors import InvalidAgent
from openagentmesh.serving.agent import Agent

Migration = Callable[[dict[str, Any], str], dict[str, Any]]


@dataclass(slots=True, eq=False)
class Generation:
    """One loading of a module: what it declares.

    Attributes:
        agents: its agents, in their order.
        kept: the state that is to survive the next reload, by name.
        disposals: what is called when another generation has taken its place.
        migration: makes its state from an older generation's.
        declined: why it cannot be replaced while it runs; empty when it can.
        before: the generation it is to replace.

    """

    agents: list[Agent] = field(default_factory=list)
    kept: dict[str, Any] = field(default_factory=dict)
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

    `crosses` tells whether an object may pass from one generation to the next as it is: its
    class must not come from a file that is loaded anew itself.
    """

    origin: str
    node: Node
    generation: Generation
    settings: dict[str, Any] = field(default_factory=dict)
    crosses: Callable[[object], bool] = lambda _: True

    def keep(self, name: str, make: Callable[[], Any]) -> Any:  # noqa: ANN401 - the author's object
        """The object of this name that an older generation kept, or a new one.

        Raises:
            InvalidAgent: the name is taken.

        """
        generation = self.generation
        if name in generation.kept:
            raise InvalidAgent(f"{self.origin} keeps two things under the name '{name}'; rename one of them.")
        before = generation.before.kept if generation.before else {}
        # What cannot pass as it is gets the old one's content when all of the module is known.
        passes = name in before and self.crosses(before[name])
        generation.kept[name] = before[name] if passes else make()
        return generation.kept[name]


_current: ContextVar[Loading | None] = ContextVar("loading", default=None)
current_loading = _current.get
set_loading = _current.set
reset_loading = _current.reset
