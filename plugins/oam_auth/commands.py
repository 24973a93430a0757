"""`oam auth check`: what is set up, whom a token proves, and what that one may do."""

import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from openagentmesh import MeshError

from oam_auth.keys import read_file
from oam_auth.policy import Proof, Verb

if TYPE_CHECKING:
    from oam_auth.plugin import Auth

Agent = Annotated[str | None, typer.Argument(help="The agent that is asked.")]
TokenFile = Annotated[
    Path | None, typer.Option("--token", help="A file with a bearer token; - reads standard input.")
]
AsSubject = Annotated[str | None, typer.Option("--subject", help="Decide for this subject, without a proof.")]
Scopes = Annotated[str, typer.Option("--scopes", help="The scopes of --subject, with blanks between them.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, for programs.")]


def add_to(app: typer.Typer, auth: "Auth") -> None:
    """Add the commands."""
    commands = typer.Typer(no_args_is_help=True, help="Who may do what on this mesh.")
    app.add_typer(commands, name="auth")

    @commands.callback()
    def of_auth() -> None:
        """Who may do what on this mesh."""

    @commands.command()
    def check(  # noqa: PLR0913 - what the command takes
        agent: Agent = None,
        verb: Verb = "call",
        token: TokenFile = None,
        subject: AsSubject = None,
        scopes: Scopes = "",
        *,
        json_: Json = False,
    ) -> None:
        """Show whom a token proves, and which rule lets it ask an agent; without both, what is set up.

        Exits with 1 where a host would refuse.
        """
        try:
            told = _told(auth, agent, verb, _who(auth, token, subject, scopes))
        except MeshError as exc:
            _fail(exc.message, {"refused": exc.code, "why": exc.message, **exc.details}, json_=json_)
        except ValueError as exc:
            _fail(str(exc), {"why": str(exc)}, json_=json_)
        typer.echo(json.dumps(told) if json_ else "\n".join(f"{key}: {_text(told[key])}" for key in told))


def _who(auth: "Auth", token: Path | None, subject: str | None, scopes: str) -> Proof | None:
    if subject is not None:
        return Proof(subject, frozenset(scopes.split()))
    if token is None:
        return None
    text = sys.stdin.read() if str(token) == "-" else read_file(token).decode("utf-8", "replace")
    tokens = auth.protection.tokens_now()
    if tokens is None:
        raise ValueError("no token counts here: [plugins.auth.tokens] is not set up")
    return tokens.prove(text.strip())


def _told(auth: "Auth", agent: str | None, verb: Verb, who: Proof | None) -> dict[str, Any]:
    told: dict[str, Any] = {}
    if who is not None:
        told |= {"subject": who.subject, "scopes": sorted(who.scopes)}
    if agent is not None:
        told |= {
            "may": f"{verb} {agent}",
            "by the rule": auth.protection.guard.policy.allow(who, agent, verb),
        }
    return told or auth.protection.described()


def _text(value: object) -> str:
    if isinstance(value, list):
        return ", ".join(map(_text, value)) or "none"
    return str(value)


def _fail(text: str, told: dict[str, Any], *, json_: bool) -> NoReturn:
    typer.echo(json.dumps(told) if json_ else f"refused: {text}", err=not json_)
    raise typer.Exit(1)
