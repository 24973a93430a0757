"""Every hook that a plugin may implement. Hooks run when something loads, never per call."""

from collections.abc import Callable
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pluggy
from pydantic import BaseModel

from openagentmesh.agent.agent import Agent
from openagentmesh.agent.call import Middleware
from openagentmesh.agent.client_middleware import ClientMiddleware
from openagentmesh.hooks.reload_result import Outcome

if TYPE_CHECKING:
    from typer import Typer

NAME: Final = "openagentmesh"
hookimpl = pluggy.HookimplMarker(NAME)
_hookspec = pluggy.HookspecMarker(NAME)

Redactor = Callable[[bytes], bytes | None]


@dataclass(slots=True, frozen=True)
class Instance:
    """One participant of the mesh, as plugins see it.

    Attributes:
        instance_id: its id on the wire.
        describe: what it serves and how that fares, as `oam status` shows it; JSON.

    """

    instance_id: str
    describe: Callable[[], dict[str, Any]]


class Hooks:
    """What plugins are told and asked. An implementation takes as many of the arguments as it needs."""

    @_hookspec
    def mesh_settings(self) -> type[BaseModel] | None:
        """Give the model of the plugin's own table in mesh.toml, `[plugins.<name>]`."""

    @_hookspec
    def mesh_configure(self, settings: BaseModel, folder: Path) -> None:
        """Take the settings, validated by the model of `mesh_settings`; raise what is wrong with them.

        Relative paths in them are within `folder`, the one of mesh.toml. Called before anything else
        is asked, and again when mesh.toml changes while the host runs: then an error refuses the
        change, and what was in force goes on.
        """

    @_hookspec
    def mesh_agent_settings(self) -> type[BaseModel] | None:
        """Give the model of the plugin's table of one agent, `[agents."<name>".plugins.<plugin>]`."""

    @_hookspec
    def mesh_middleware(self, agent: Agent, settings: BaseModel | None) -> Middleware | None:
        """Give what is put around an agent, or None; asked once per agent and version.

        `settings` are the agent's own of this plugin, None where `mesh_agent_settings` is not
        implemented. An error refuses the agent's module.
        """

    @_hookspec
    def mesh_client_middleware(self) -> ClientMiddleware | None:
        """Give what is put around all that leaves: requests, sends, events; asked once per start."""

    @_hookspec
    def mesh_lifespan(self, instance: Instance) -> AbstractAsyncContextManager[None] | None:
        """Give what is entered before the first agent serves, and left after the last one has finished."""

    @_hookspec
    def mesh_agent_unloaded(self, name: str) -> None:
        """Be told that an agent is served no more."""

    @_hookspec
    def mesh_reloaded(self, outcome: Outcome) -> None:
        """Be told that what was saved is served now."""

    @_hookspec
    def mesh_reload_failed(self, outcome: Outcome) -> None:
        """Be told that what was saved is not served, and why."""

    @_hookspec(firstresult=True)
    def mesh_redactor(self, agent: Agent) -> Redactor | None:
        """Give what takes secrets out of the requests to this agent before they are kept for a replay.

        It is given a request's body and returns what to keep, None for nothing of it. Asked once
        per agent and version.
        """

    @_hookspec
    def mesh_cli(self, app: "Typer") -> None:
        """Add commands to `oam`."""
