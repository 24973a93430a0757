"""One configuration in force: its authenticator, kept up to date with files and issuer."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from openagentmesh import Call

from oam_auth.authenticator import Authenticator, bearer_token
from oam_auth.file_watch import Issuer, changes
from oam_auth.keys import fetch_keys
from oam_auth.policy import Identity
from oam_auth.settings import Settings
from oam_auth.signatures import Nonces
from oam_auth.tokens import Tokens

log = logging.getLogger(__name__)

_RETRY_S: Final = 5.0


class AuthState:
    """One configuration in force; relative paths in it start at `folder`.

    Args:
        issuer: the issuer of its tokens, if its keys were fetched for another configuration already.

    Raises:
        ValueError: something in the settings is missing or invalid.
    """

    def __init__(
        self, settings: Settings, folder: Path, nonces: Nonces, issuer: Issuer | None = None
    ) -> None:
        self.settings, self.folder, self._nonces = settings, folder, nonces
        self.issuer = issuer or Issuer(settings.tokens)
        self._fetched = self.issuer.keys
        self._authenticator = Authenticator.load(settings, folder, nonces, self._fetched)
        self._following: list[asyncio.Task[None]] = []

    @property
    def authenticator(self) -> Authenticator:
        """Verifies callers, with the issuer's current keys."""
        if self._fetched is not self.issuer.keys:
            self._fetched = self.issuer.keys
            self._authenticator = self._authenticator.with_fetched(self._fetched)
        return self._authenticator

    async def admit(self, call: Call) -> Identity | None:
        """The verified identity of a permitted caller; None for a permitted anonymous one.

        Raises:
            Unauthenticated: its credentials are invalid, or missing and required.
            PermissionDenied: no rule permits the request.
            Overloaded: too many signed requests are remembered.
        """
        authenticator = self.authenticator
        token = bearer_token(call) if self.issuer.url else ""
        if token and authenticator.tokens is not None and not authenticator.tokens.is_fetch_useless(token):
            await self.issuer.fetch_for_request()  # the issuer may have a new one
            authenticator = self.authenticator
        identity = authenticator.verify(call)
        authenticator.policy.permit(identity, call.agent, call.verb)
        authenticator.use_signature(call)  # only now: refused requests must not fill the memory
        return identity

    def fetched_tokens(self) -> Tokens | None:
        """Verifies tokens, with newly fetched keys of the issuer; blocks, and raises as `fetch_keys` does."""
        fetched = fetch_keys(self.issuer.url) if self.issuer.url else ()
        return self.authenticator.with_fetched(fetched).tokens

    def describe(self) -> dict[str, Any]:
        """Rules, keys, signers, and the credentials of this node's requests; no secrets."""
        signatures, credentials = self.settings.signatures, self.authenticator.credentials
        signer = f"the signature of {credentials.signer.key}" if credentials.signer else ""
        return {
            "rules": [rule.name for rule in self.authenticator.policy.rules],
            "keys in files": [key.kid or key.thumbprint() for key in self.authenticator.keys_in_files],
            "keys from": [self.issuer.url] if self.issuer.url else [],
            "signers": [user.subject for user in signatures.users.values()] if signatures else [],
            "requests carry": signer or ("a token" if credentials.token else "nothing"),
        }

    def reload(self) -> None:
        """Reload all files; an invalid one keeps its previous state."""
        self._authenticator = Authenticator.load(
            self.settings, self.folder, self._nonces, self._fetched, previous=self._authenticator
        )
        log.info("auth: files reloaded, %d rules", len(self._authenticator.policy.rules))

    def follow(self) -> None:
        """Follow the files and the issuer, until `unfollow`."""
        if not self._following:
            self._following = [
                asyncio.create_task(_retry(follow)) for follow in (self._follow_files, self._follow_issuer)
            ]

    def unfollow(self) -> list[asyncio.Task[None]]:
        """Stop following; returns the tasks that are about to end."""
        following, self._following = self._following, []
        for task in following:
            task.cancel()
        return following

    async def _follow_files(self) -> None:
        if self._authenticator.files:
            files = changes(lambda: self._authenticator.files, self._authenticator.stamps)
            async with aclosing(files) as changed:
                async for _ in changed:
                    self.reload()

    async def _follow_issuer(self) -> None:
        tokens = self.settings.tokens
        while tokens is not None and tokens.jwks_url is not None:
            await self.issuer.fetch()
            await asyncio.sleep(tokens.refresh)


async def _retry(follow: Callable[[], Awaitable[None]]) -> None:
    """Follow until there is nothing to follow; restarted after each failure."""
    while True:
        try:
            await follow()
        # One attempt ends here: withdrawn keys must not stay in force because of it.
        except Exception as exc:  # noqa: BLE001 - as above
            log.error("auth: the previous state stays in force: %s", exc)  # noqa: TRY400 - not a defect of ours
            await asyncio.sleep(_RETRY_S)
        else:
            return
