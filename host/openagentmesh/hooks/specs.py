"""Every hook that a plugin may implement. Hooks run when something loads, never per call."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

import pluggy
from pydantic import BaseModel

from openagentmesh.agent.agent import Agent, Redactor
from openagentmesh.agent.call import Middleware
from openagentmesh.agent.client_middleware import ClientMiddleware
from openagentmesh.hooks.reload_result import ReloadResult
from openagentmesh.protocol.status import NodeStatus

if TYPE_CHECKING:
    from typer import Typer

NAME: Final = "openagentmesh"
hookimpl = pluggy.HookimplMarker(NAME)
_hookspec = pluggy.HookspecMarker(NAME)


@dataclass(slots=True, frozen=True)
class Instance:
    """One participant of the mesh, as plugins see it.

    Attributes:
        instance_id: its id on the wire.
        status: returns its state; a HostStatus in a host.
    """

    instance_id: str
    status: Callable[[], NodeStatus]


class Hooks:
    """The hooks. An implementation takes as many of the arguments as it needs."""

    @_hookspec
    def mesh_settings(self) -> type[BaseModel] | None:
        """Return the model of the plugin's own table in mesh.toml, `[plugins.<name>]`."""

    @_hookspec
    def mesh_configure(self, settings: BaseModel, folder: Path) -> None:
        """Apply the settings, validated by the model of `mesh_settings`; raise if they cannot be used.

        Relative paths in them start at `folder`, the one of mesh.toml. Called before any other hook, and
        again when mesh.toml changes while the host runs: an error then refuses the change, and the settings
        in force stay.
        """

    @_hookspec
    def mesh_agent_settings(self) -> type[BaseModel] | None:
        """Return the model of the plugin's table of one agent, `[agents."<name>".plugins.<plugin>]`."""

    @_hookspec
    def mesh_middleware(self, agent: Agent, settings: BaseModel | None) -> Middleware | None:
        """Return a middleware for an agent, or None; called once per agent and version.

        `settings` are the agent's own settings of this plugin, None without `mesh_agent_settings`. An error
        refuses the agent's module.
        """

    @_hookspec
    def mesh_client_middleware(self) -> ClientMiddleware | None:
        """Return a middleware for requests, sends and events of this node; called once per start."""

    @_hookspec
    def mesh_lifespan(self, instance: Instance) -> AbstractAsyncContextManager[None] | None:
        """Return a context that is entered before the first agent serves, and exited after the last one."""

    @_hookspec
    def mesh_check_candidate(self, agent: Agent, serving: Agent | None) -> Awaitable[Sequence[str]] | None:
        """Check a new version of an agent before it serves, or return None.

        Awaited during a reload, while the version `serving` still serves; None when the agent is new.
        Returns notes for the result of the reload. An error refuses the reload.
        """

    @_hookspec
    def mesh_agent_unloaded(self, name: str) -> None:
        """An agent is not served any more."""

    @_hookspec
    def mesh_reloaded(self, result: ReloadResult) -> None:
        """A reload is complete: the saved version serves."""

    @_hookspec
    def mesh_reload_failed(self, result: ReloadResult) -> None:
        """A reload was refused: the old version still serves."""

    @_hookspec(firstresult=True)
    def mesh_redactor(self, agent: Agent) -> Redactor | None:
        """Return a function that removes secrets from an agent's requests before plugins store them.

        It gets a request's body and returns what may be stored, None for nothing. Called once per agent and
        version; other plugins get it as `agent.redactor`. An error refuses the agent's module.
        """

    @_hookspec
    def mesh_cli(self, app: "Typer") -> None:
        """Add commands to `oam`."""
