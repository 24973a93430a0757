"""The plugin: refuses requests without a verified caller, or without a rule that permits them."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openagentmesh import (
    Agent,
    Call,
    Caller,
    ClientMiddleware,
    ClientOperation,
    Endpoint,
    Middleware,
    hookimpl,
)
from typer import Typer

from oam_auth.auth_state import AuthState
from oam_auth.commands import add_commands
from oam_auth.settings import Settings
from oam_auth.signatures import Nonces

log = logging.getLogger(__name__)


class Auth:
    """The plugin.

    New settings apply to the agents that a reload creates, and to all agents once the reload is complete;
    when it is refused, the previous settings have never been replaced.

    Args:
        settings: for `AgentMesh(plugins=[Auth(Settings(...))])`; a host applies those of mesh.toml.

    Raises:
        ValueError: something in the settings is missing or invalid.

    Attributes:
        state: applies to agents that are created from now on.
    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._nonces = Nonces()
        self.state = self._in_force = AuthState(settings or Settings(), Path.cwd(), self._nonces)
        self._is_running = False

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """`[plugins.auth]`."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings, folder: Path) -> None:
        """Read all files of the settings; they are in force once the reload is complete."""
        if (settings, folder) == (self.state.settings, self.state.folder):
            return
        state = self._in_force
        if (settings, folder) != (state.settings, state.folder):
            state = self._new_state(settings, folder)
        if self.state is not self._in_force:
            self.state.unfollow()
        self.state = state
        if self._is_running:
            self.state.follow()

    def _new_state(self, settings: Settings, folder: Path) -> AuthState:
        issuer = self._in_force.issuer
        if (settings.tokens.jwks_url if settings.tokens else None) == issuer.url:
            return AuthState(settings, folder, self._nonces, issuer)
        if self._is_running:
            raise ValueError("tokens.jwks_url: another issuer takes effect after a restart")
        return AuthState(settings, folder, self._nonces)

    @hookimpl
    def mesh_reloaded(self) -> None:
        """The new settings apply to all agents."""
        if self.state is not self._in_force:
            self._in_force.unfollow()
            self._in_force = self.state

    @hookimpl
    def mesh_cli(self, app: Typer) -> None:
        """Add `oam auth`."""
        add_commands(app, lambda: self.state)

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        """Add credentials to the requests of this node."""
        return self._with_credentials

    @asynccontextmanager
    async def _with_credentials(self, operation: ClientOperation) -> AsyncIterator[None]:
        self.state.authenticator.credentials.add_to(operation)
        yield

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """Admit or refuse the requests to one agent."""
        name, state = agent.name, self.state
        takes_requests = agent.contract.invocable or agent.sources
        if takes_requests and not any(rule.covers(name) for rule in state.authenticator.policy.rules):
            log.warning("auth: no rule covers '%s', so all requests to it are refused", name)

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def authenticated(call: Call) -> Any:  # noqa: ANN401 - the handler's result
                current = state if state is self.state else self._in_force
                identity = await current.admit(call)
                # Without a proof the caller is anonymous, whatever the request states.
                call.identity = (
                    Caller(call.instance_id, identity.subject, identity.scopes)
                    if identity
                    else Caller.anonymous(call.instance_id)
                )
                return await endpoint(call)

            return authenticated

        return middleware

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self) -> AsyncIterator[None]:
        """Fetch the issuer's keys before agents serve, and follow changes; raises as `Issuer.fetch` does."""
        self._in_force = self.state
        await self.state.issuer.fetch()
        self._is_running = True
        self.state.follow()
        try:
            yield
        finally:
            self._is_running = False
            following = [*self.state.unfollow(), *self._in_force.unfollow()]
            await asyncio.gather(*following, return_exceptions=True)
