"""Every hook that a plugin may implement. Hooks run when something loads, never per call."""

from collections.abc import Callable
from typing import Final

import pluggy

from openagentmesh.runtime.outcome import Outcome
from openagentmesh.serving.agent import Agent

NAME: Final = "openagentmesh"
hookimpl = pluggy.HookimplMarker(NAME)
_hookspec = pluggy.HookspecMarker(NAME)

Redactor = Callable[[bytes], bytes | None]


class Hooks:
    """What plugins are told and asked."""

    @_hookspec
    def mesh_reload_failed(self, outcome: Outcome) -> None:
        """Be told that what was saved is not served, and why."""

    @_hookspec(firstresult=True)
    def mesh_redactor(self, agent: Agent) -> Redactor | None:
        """Give what takes secrets out of the requests to this agent before they are kept for a replay.

        It is given a request's body and returns what to keep, None for nothing of it. Asked once
        per agent and generation.
        """


def plugin_manager() -> pluggy.PluginManager:
    """A manager that knows all hooks and has no plugins."""
    manager = pluggy.PluginManager(NAME)
    manager.add_hookspecs(Hooks)
    return manager
