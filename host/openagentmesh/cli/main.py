"""`oam`: all commands."""

import sys

try:
    import typer

    from openagentmesh.cli import agent, check, kv, mesh, observe, plugins, reload, status, up
    from openagentmesh.cli.connecting import mesh_command
except KeyboardInterrupt:
    sys.exit(130)

app = typer.Typer(
    name="oam",
    help="Run agents, discover them and call them.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(up.up)
mesh_command(app)(status.status)
mesh_command(app)(reload.reload)
app.command()(plugins.plugins)
app.command()(check.check)
app.add_typer(mesh.app, name="mesh")
app.add_typer(agent.app, name="agent")
app.add_typer(kv.app, name="kv")
app.add_typer(observe.app, name="observe")


def run() -> None:
    """The console script."""
    try:
        found, error = plugins.load_local()
        found.add_commands(app)
        if error and not _has_command(sys.argv[1:2]):
            plugins.note_unusable(error)  # the command may be one of a plugin
        app()
    except KeyboardInterrupt:
        sys.exit(130)


def _has_command(arguments: list[str]) -> bool:
    known = typer.main.get_command(app)
    return not arguments or arguments[0].startswith("-") or arguments[0] in getattr(known, "commands", ())


if __name__ == "__main__":
    run()
