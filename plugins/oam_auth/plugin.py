"""The plugin: refuses what nobody was proven to ask, or what no rule allows."""

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from openagentmesh import Agent, Call, Caller, ClientMiddleware, Endpoint, Middleware, Outgoing, hookimpl
from typer import Typer

from oam_auth.auth_state import Protection
from oam_auth.commands import add_to
from oam_auth.settings import Settings
from oam_auth.signatures import Nonces

log = logging.getLogger(__name__)


class Auth:
    """The plugin.

    What a reload wants protects the agents that this reload makes, and everything once it is
    carried out; when it is refused, what was in force before has never been left.

    Args:
        settings: for `AgentMesh(plugins=[Auth(Settings(...))])`; a host gives those of mesh.toml.

    Raises:
        ValueError: something that the settings name is missing or broken.

    Attributes:
        protection: what protects the agents that are made from now on.

    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._nonces = Nonces()
        self.protection = self._in_force = Protection(settings or Settings(), Path.cwd(), self._nonces)
        self._is_up = False

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """Who is believed, and who may do what."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings, folder: Path) -> None:
        """Read all that the settings name; what is in force stays so until the reload is carried out."""
        if (settings, folder) == (self.protection.settings, self.protection.folder):
            return
        wanted = self._in_force
        if (settings, folder) != (wanted.settings, wanted.folder):
            wanted = self._made(settings, folder)
        if self.protection is not self._in_force:
            self.protection.unfollow()
        self.protection = wanted
        if self._is_up:
            self.protection.follow()

    def _made(self, settings: Settings, folder: Path) -> Protection:
        issuer = self._in_force.issuer
        if (settings.tokens.jwks_url if settings.tokens else None) == issuer.url:
            return Protection(settings, folder, self._nonces, issuer)
        if self._is_up:
            raise ValueError("tokens.jwks_url: another issuer needs a restart, for its keys come first")
        return Protection(settings, folder, self._nonces)

    @hookimpl
    def mesh_reloaded(self) -> None:
        """What was wanted is in force for everything, also for what the reload did not make anew."""
        if self.protection is not self._in_force:
            self._in_force.unfollow()
            self._in_force = self.protection

    @hookimpl
    def mesh_cli(self, app: Typer) -> None:
        """Add `oam auth`."""
        add_to(app, self)

    @hookimpl
    def mesh_client_middleware(self) -> ClientMiddleware:
        """What says who asks, on all that leaves."""
        return self._carrying

    @asynccontextmanager
    async def _carrying(self, outgoing: Outgoing) -> AsyncIterator[None]:
        self.protection.guard.identity.add_to(outgoing)
        yield

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """What lets a request through to one agent, or refuses it."""
        name, protection = agent.name, self.protection
        is_asked = agent.contract.invocable or agent.sources
        if is_asked and not any(rule.names(name) for rule in protection.guard.policy.rules):
            log.warning("auth: no rule names '%s', so nobody may ask it", name)

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def guarded(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
                who = await (protection if protection is self.protection else self._in_force).let_in(call)
                name_given = call.request.caller
                # Who proves nothing is nobody here, whatever the request says.
                call.proven = (
                    Caller(name_given, who.subject, who.scopes) if who else Caller.nobody(name_given)
                )
                return await endpoint(call)

            return guarded

        return middleware

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self) -> AsyncIterator[None]:
        """Have the issuer's keys before anybody is served, and follow what changes.

        Raises:
            ValueError: they cannot be fetched.

        """
        self._in_force = self.protection
        await self.protection.issuer.fetch()
        self._is_up = True
        self.protection.follow()
        try:
            yield
        finally:
            self._is_up = False
            following = [*self.protection.unfollow(), *self._in_force.unfollow()]
            await asyncio.gather(*following, return_exceptions=True)
