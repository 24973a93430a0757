"""What requests from here carry: a bearer token, a signature, or nothing."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openagentmesh import Outgoing

from oam_auth.keys import read_file
from oam_auth.settings import CallerSettings
from oam_auth.signatures import KEY, Signer

AUTHORIZATION = "Authorization"


def spellings(headers: Mapping[str, str]) -> list[str]:
    """How the header with the token is written, in whatever capitals."""
    return [name for name in headers if name.lower() == "authorization"]


@dataclass(slots=True, frozen=True)
class Identity:
    """Adds to what leaves who asks; what a caller says itself stays."""

    token: str = ""
    signer: Signer | None = None
    token_on_events: bool = False

    @classmethod
    def of(cls, settings: CallerSettings, folder: Path) -> "Identity":
        """The identity that settings describe; their files are within the folder.

        Raises:
            ValueError: a file cannot be read, or holds something else.

        """
        if settings.nkey_file is not None:
            path = folder / settings.nkey_file.expanduser()
            try:
                return cls(signer=Signer(read_file(path).strip()))
            except ValueError as exc:
                raise ValueError(f"caller.nkey_file: {path}: {exc}") from exc
        if settings.token_file is None:
            return cls(os.environ.get(settings.token_env, "").strip(), None, settings.token_on_events)
        path = folder / settings.token_file.expanduser()
        token = read_file(path).decode("ascii", "replace").strip()
        if not token.isascii() or not token.isprintable() or " " in token or not token:
            raise ValueError(f"caller.token_file: {path} holds no token: one line without blanks is wanted")
        return cls(token, None, settings.token_on_events)

    def add_to(self, outgoing: Outgoing) -> None:
        """Add what proves who asks."""
        if outgoing.verb == "receive" or KEY in outgoing.headers or spellings(outgoing.headers):
            return
        if self.signer is not None:
            self.signer.sign(outgoing)
        # Whoever listens to an event would hold its token.
        elif self.token and (outgoing.verb != "publish" or self.token_on_events):
            outgoing.headers[AUTHORIZATION] = f"Bearer {self.token}"
