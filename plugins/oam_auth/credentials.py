"""The credentials that requests of this node carry: a bearer token, a signature, or none."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from openagentmesh import ClientOperation

from oam_auth.keys import read_file
from oam_auth.settings import CallerSettings
from oam_auth.signatures import KEY, Signer

AUTHORIZATION = "Authorization"


def authorization_names(headers: Mapping[str, str]) -> list[str]:
    """The names of the Authorization header, in any capitalization."""
    return [name for name in headers if name.lower() == "authorization"]


@dataclass(slots=True, frozen=True)
class Credentials:
    """Adds credentials to operations, unless these have some already."""

    token: str = ""
    signer: Signer | None = None
    token_on_events: bool = False

    @classmethod
    def load(cls, settings: CallerSettings, folder: Path) -> "Credentials":
        """The credentials of the settings; ValueError if a file is unreadable, or contains something else."""
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
            raise ValueError(f"caller.token_file: {path} is not a token: one line without blanks is")
        return cls(token, None, settings.token_on_events)

    def add_to(self, operation: ClientOperation) -> None:
        """Add the credentials."""
        headers = operation.headers
        if operation.verb == "receive" or KEY in headers or authorization_names(headers):
            return
        if self.signer is not None:
            self.signer.sign(operation)
        # All subscribers of an event would get its token.
        elif self.token and (operation.verb != "publish" or self.token_on_events):
            headers[AUTHORIZATION] = f"Bearer {self.token}"
