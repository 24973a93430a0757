"""`oam auth check`: the configuration, the identity that a token proves, and its permissions."""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from openagentmesh import MeshError

from oam_auth.auth_state import AuthState
from oam_auth.keys import read_file
from oam_auth.policy import Identity, Verb

Agent = Annotated[str | None, typer.Argument(help="The requested agent.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token", help="A file with a bearer token; - reads standard input.")
]
Subject = Annotated[str | None, typer.Option("--subject", help="Check this subject, without a proof.")]
Scopes = Annotated[str, typer.Option("--scopes", help="The scopes of --subject, separated by blanks.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def add_commands(app: typer.Typer, state: Callable[[], AuthState]) -> None:
    """Add the commands; `state` returns the configuration in force."""
    commands = typer.Typer(no_args_is_help=True)
    app.add_typer(commands, name="auth")

    @commands.callback()
    def auth() -> None:
        """Permissions on this mesh."""

    @commands.command()
    def check(  # noqa: PLR0913 - what the command takes
        agent: Agent = None,
        verb: Verb = "call",
        token: TokenFile = None,
        subject: Subject = None,
        scopes: Scopes = "",
        *,
        json_: Json = False,
    ) -> None:
        """Show the identity that a token proves, and the rule that permits a request; else the configuration.

        The exit code is 1 where a host would refuse.
        """
        try:
            found = _check(state(), agent, verb, _identity(state(), token, subject, scopes))
        except MeshError as exc:
            _fail(exc.message, {"refused": exc.code, "why": exc.message, **exc.details}, json_=json_)
        except ValueError as exc:
            _fail(str(exc), {"why": str(exc)}, json_=json_)
        lines = (f"{key}: {_text(value)}" for key, value in found.items())
        typer.echo(json.dumps(found) if json_ else "\n".join(lines))


def _identity(state: AuthState, token: Path | None, subject: str | None, scopes: str) -> Identity | None:
    if subject is not None:
        return Identity(subject, frozenset(scopes.split()))
    if token is None:
        return None
    text = sys.stdin.read() if str(token) == "-" else read_file(token).decode("utf-8", "replace")
    tokens = state.fetched_tokens()
    if tokens is None:
        raise ValueError("tokens are not accepted: [plugins.auth.tokens] is not configured")
    return tokens.verify(text.strip())


def _check(state: AuthState, agent: str | None, verb: Verb, identity: Identity | None) -> dict[str, Any]:
    found: dict[str, Any] = {}
    if identity is not None:
        found |= {"subject": identity.subject, "scopes": sorted(identity.scopes)}
    if agent is not None:
        rule = state.authenticator.policy.permit(identity, agent, verb)
        found |= {"permitted": f"{verb} {agent}", "rule": rule}
    return found or state.describe()


def _text(value: object) -> str:
    return (", ".join(map(str, value)) or "none") if isinstance(value, list) else str(value)


def _fail(text: str, facts: dict[str, Any], *, json_: bool) -> NoReturn:
    typer.echo(json.dumps(facts) if json_ else f"refused: {text}", err=not json_)
    raise typer.Exit(1)
