"""What a mesh must know while a host loads the module that makes it."""

from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from openagentmesh.mesh.node import Node
from openagentmesh.serving.agent import Agent


@dataclass(slots=True)
class Loading:
    """One module being loaded: where its agents go until the host binds them."""

    origin: str
    node: Node
    declare: Callable[[Agent], None]
    settings: dict[str, Any] = field(default_factory=dict)


_current: ContextVar[Loading | None] = ContextVar("loading", default=None)
current_loading = _current.get
set_loading = _current.set
reset_loading = _current.reset
