"""The plugin: refuses what nobody was proven to ask, or what no rule allows."""

import asyncio
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from pathlib import Path
from typing import Any, Final

from openagentmesh import Agent, Call, Caller, ClientMiddleware, Endpoint, Middleware, Outgoing, hookimpl
from typer import Typer

from oam_auth.commands import add_to
from oam_auth.following import Issuer, changes
from oam_auth.guard import Guard, bearer_token
from oam_auth.keys import fetch_keys
from oam_auth.policy import Proof
from oam_auth.settings import Settings
from oam_auth.signatures import Nonces
from oam_auth.tokens import Tokens

log = logging.getLogger(__name__)

# Until what could not be followed is followed again, in seconds.
_AGAIN: Final = 5.0


class Auth:
    """The plugin.

    Args:
        settings: for `AgentMesh(plugins=[Auth(Settings(...))])`; a host gives those of mesh.toml.

    Raises:
        ValueError: something that the settings name is missing or broken.

    """

    def __init__(self, settings: Settings | None = None) -> None:
        self._settings = settings or Settings()
        self._folder = Path.cwd()
        self._nonces = Nonces()
        self._issuer = Issuer(self._settings.tokens, self._take_fetched)
        self.guard = self._made(self._settings, self._folder, self._issuer)
        self._following: list[asyncio.Task[None]] = []

    def _made(self, settings: Settings, folder: Path, issuer: Issuer) -> Guard:
        return Guard.of(settings, folder, self._nonces, issuer.keys)

    @hookimpl
    def mesh_settings(self) -> type[Settings]:
        """Who is believed, and who may do what."""
        return Settings

    @hookimpl
    def mesh_configure(self, settings: Settings, folder: Path) -> None:
        """Read all that the settings name; what is in force stays when something is broken."""
        if (settings, folder) == (self._settings, self._folder):
            return
        issuer = Issuer(settings.tokens, self._take_fetched)
        if issuer.url == self._issuer.url:
            issuer = self._issuer
        elif self._following:
            raise ValueError("tokens.jwks_url: another issuer needs a restart, for its keys come first")
        self.guard = self._made(settings, folder, issuer)
        self._settings, self._folder, self._issuer = settings, folder, issuer
        if self._following:
            self._follow()

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
        self.guard.identity.add_to(outgoing)
        yield

    @hookimpl
    def mesh_middleware(self, agent: Agent) -> Middleware:
        """What lets a request through to one agent, or refuses it."""
        name = agent.name
        is_asked = agent.contract.invocable or agent.sources
        if is_asked and not any(rule.names(name) for rule in self.guard.policy.rules):
            log.warning("auth: no rule names '%s', so nobody may ask it", name)

        def middleware(endpoint: Endpoint) -> Endpoint:
            async def guarded(call: Call) -> Any:  # noqa: ANN401 - whatever the handler returns
                who = await self._prove(call)
                self.guard.policy.allow(who, name, call.verb)
                name_given = call.request.caller
                # Who proves nothing is nobody here, whatever the request says.
                call.proven = (
                    Caller(name_given, who.subject, who.scopes) if who else Caller.nobody(name_given)
                )
                return await endpoint(call)

            return guarded

        return middleware

    def tokens_now(self) -> Tokens | None:
        """What verifies tokens, with the issuer's keys of this moment; blocks while they are fetched.

        Raises:
            ValueError: they cannot be fetched.

        """
        tokens = self._settings.tokens
        if tokens is None or tokens.jwks_url is None:
            return self.guard.tokens
        return self.guard.with_fetched(tokens, fetch_keys(tokens.jwks_url)).tokens

    def described(self) -> dict[str, Any]:
        """What is set up: rules, keys, signers, and what requests from here carry; no secrets."""
        signatures, identity = self._settings.signatures, self.guard.identity
        signer = f"the signature of {identity.signer.key}" if identity.signer else ""
        return {
            "rules": [rule.name for rule in self.guard.policy.rules],
            "keys in files": [key.kid or key.thumbprint() for key in self.guard.keys],
            "keys from": [self._issuer.url] if self._issuer.url else [],
            "signers": [user.subject for user in signatures.users.values()] if signatures else [],
            "requests from here carry": signer or ("a token" if identity.token else "nothing"),
        }

    async def _prove(self, call: Call) -> Proof | None:
        tokens, token = self.guard.tokens, bearer_token(call) if self._issuer.url else ""
        if token and tokens is not None and not tokens.knows_key_of(token):
            await self._issuer.fetch_for_request()  # the issuer may have a new one
        return self.guard.prove(call)

    def _take_fetched(self) -> None:
        if self._settings.tokens is not None:
            self.guard = self.guard.with_fetched(self._settings.tokens, self._issuer.keys)

    def read_again(self) -> None:
        """Read all files once more; what is in force stays when one is broken."""
        try:
            self.guard = self._made(self._settings, self._folder, self._issuer)
        except ValueError as exc:
            log.error("auth: what was read before stays in force: %s", exc)  # noqa: TRY400 - no bug of ours
            return
        log.info("auth: read again, %d rules", len(self.guard.policy.rules))

    @hookimpl
    @asynccontextmanager
    async def mesh_lifespan(self) -> AsyncIterator[None]:
        """Have the issuer's keys before anybody is served, and follow what changes.

        Raises:
            ValueError: they cannot be fetched.

        """
        await self._issuer.fetch()
        self._follow()
        try:
            yield
        finally:
            following, self._following = self._following, []
            for task in following:
                task.cancel()
            await asyncio.gather(*following, return_exceptions=True)

    def _follow(self) -> None:
        """Follow the files and the issuer that the settings name now."""
        for task in self._following:
            task.cancel()
        self._following = [
            asyncio.create_task(persistently(following))
            for following in (self._follow_files, self._follow_issuer)
        ]

    async def _follow_files(self) -> None:
        if self.guard.files:
            async with aclosing(changes(lambda: self.guard.files, self.guard.stamps)) as told:
                async for _ in told:
                    self.read_again()

    async def _follow_issuer(self) -> None:
        while (tokens := self._settings.tokens) is not None and tokens.jwks_url is not None:
            await asyncio.sleep(tokens.refresh)
            await self._issuer.fetch()


async def persistently(following: Callable[[], Awaitable[None]]) -> None:
    """Follow until there is nothing to follow; whatever fails is told, and begun again."""
    while True:
        try:
            await following()
        # What ends here is one attempt: a key that was withdrawn must not count because of it.
        except Exception as exc:  # noqa: BLE001 - as above
            log.error("auth: what was read before stays in force: %s", exc)  # noqa: TRY400 - no bug of ours
            await asyncio.sleep(_AGAIN)
        else:
            return
