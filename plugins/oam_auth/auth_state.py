"""One configuration at work: what it protects with, kept like its files and its issuer are."""

import asyncio
import logging
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from pathlib import Path
from typing import Any, Final

from openagentmesh import Call

from oam_auth.authenticator import Guard, bearer_token
from oam_auth.file_watch import Issuer, changes
from oam_auth.keys import fetch_keys
from oam_auth.policy import Proof
from oam_auth.settings import Settings
from oam_auth.signatures import Nonces
from oam_auth.tokens import Tokens

log = logging.getLogger(__name__)

# Until what could not be followed is followed again, in seconds.
_AGAIN: Final = 5.0


class Protection:
    """What one configuration protects with.

    Args:
        settings: the configuration.
        folder: where its relative paths begin.
        nonces: the signatures that have been used.
        issuer: who issues its tokens, with keys that were fetched for another configuration.

    Raises:
        ValueError: something that the settings name is missing or broken.

    """

    def __init__(
        self, settings: Settings, folder: Path, nonces: Nonces, issuer: Issuer | None = None
    ) -> None:
        self.settings, self.folder, self._nonces = settings, folder, nonces
        self.issuer = issuer or Issuer(settings.tokens)
        self._fetched = self.issuer.keys
        self._guard = Guard.of(settings, folder, nonces, self._fetched)
        self._following: list[asyncio.Task[None]] = []

    @property
    def guard(self) -> Guard:
        """What decides now, with the keys that the issuer publishes now."""
        if self._fetched is not self.issuer.keys and self.settings.tokens is not None:
            self._fetched = self.issuer.keys
            self._guard = self._guard.with_fetched(self.settings.tokens, self._fetched)
        return self._guard

    async def let_in(self, call: Call) -> Proof | None:
        """Who is proven to ask, and may; None for nobody, who may.

        Raises:
            Unauthenticated: what the request says of who asks does not count, or it says nothing.
            PermissionDenied: no rule lets this subject do this.
            Overloaded: too many signed requests came to remember them all.

        """
        tokens, token = self.guard.tokens, bearer_token(call) if self.issuer.url else ""
        if token and tokens is not None and not tokens.knows_key_of(token):
            await self.issuer.fetch_for_request()  # the issuer may have a new one
        guard = self.guard
        who = guard.prove(call)
        guard.policy.allow(who, call.agent, call.verb)
        guard.use_up(call)  # only now: who may nothing must not fill the memory
        return who

    def tokens_now(self) -> Tokens | None:
        """What verifies tokens, with the issuer's keys of this moment; blocks while they are fetched.

        Raises:
            ValueError: they cannot be fetched.

        """
        tokens = self.settings.tokens
        if tokens is None or tokens.jwks_url is None:
            return self.guard.tokens
        return self.guard.with_fetched(tokens, fetch_keys(tokens.jwks_url)).tokens

    def described(self) -> dict[str, Any]:
        """What is set up: rules, keys, signers, and what requests from here carry; no secrets."""
        signatures, identity = self.settings.signatures, self.guard.identity
        signer = f"the signature of {identity.signer.key}" if identity.signer else ""
        return {
            "rules": [rule.name for rule in self.guard.policy.rules],
            "keys in files": [key.kid or key.thumbprint() for key in self.guard.keys_in_files],
            "keys from": [self.issuer.url] if self.issuer.url else [],
            "signers": [user.subject for user in signatures.users.values()] if signatures else [],
            "requests from here carry": signer or ("a token" if identity.token else "nothing"),
        }

    def read_again(self) -> None:
        """Read all files once more; of what is broken, what was read before stays in force."""
        self._guard = Guard.of(self.settings, self.folder, self._nonces, self._fetched, before=self._guard)
        log.info("auth: read again, %d rules", len(self._guard.policy.rules))

    def follow(self) -> None:
        """Follow the files and the issuer from now on, until `unfollow`."""
        if not self._following:
            self._following = [
                asyncio.create_task(_keep(following))
                for following in (self._follow_files, self._follow_issuer)
            ]

    def unfollow(self) -> list[asyncio.Task[None]]:
        """Follow nothing any more; gives what is about to end."""
        following, self._following = self._following, []
        for task in following:
            task.cancel()
        return following

    async def _follow_files(self) -> None:
        if self._guard.files:
            async with aclosing(changes(lambda: self._guard.files, self._guard.stamps)) as told:
                async for _ in told:
                    self.read_again()

    async def _follow_issuer(self) -> None:
        tokens = self.settings.tokens
        while tokens is not None and tokens.jwks_url is not None:
            await self.issuer.fetch()
            await asyncio.sleep(tokens.refresh)


async def _keep(following: Callable[[], Awaitable[None]]) -> None:
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
