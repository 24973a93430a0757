"""`oam up`: the host, until Ctrl-C."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from openagentmesh.cli.connecting import advised
from openagentmesh.cli.logs import LogFormat, set_up_logging
from openagentmesh.cli.output import as_json, count, example_input, fail, note
from openagentmesh.mesh.runner import run, stop_event, until_stopped
from openagentmesh.protocol.errors import ConnectionFailed, MeshError
from openagentmesh.runtime.config import FILE_NAME, Config, ConfigError, load_config
from openagentmesh.runtime.host import Host
from openagentmesh.runtime.loading.origins import DEFAULT_FOLDER

log = logging.getLogger("openagentmesh.up")

_MOST_SHOWN = 20


def up(  # noqa: PLR0913, PLR0917 - one parameter an option
    config: Annotated[Path | None, typer.Option(help="The configuration; else mesh.toml here.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The embedded server's port; 0 for any free one.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Use this NATS server instead of an embedded one.")] = None,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a module fails to load.")] = False,  # noqa: FBT002 - a flag
    reload: Annotated[
        bool | None, typer.Option(help="Reload a file as soon as it is saved; else as mesh.toml says.")
    ] = None,
    replay: Annotated[
        int | None,
        typer.Option(min=0, max=1000, help="Run the last N requests of replayable agents before a reload."),
    ] = None,
    replay_strict: Annotated[  # noqa: FBT002 - a flag
        bool, typer.Option("--replay-strict", help="Refuse a reload in which one of these fails newly.")
    ] = False,
    log_format: Annotated[LogFormat, typer.Option(help="How events are shown.")] = LogFormat.AUTO,
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the agents of mesh.toml: one process, one connection, until Ctrl-C."""
    if log_level.upper() not in logging.getLevelNamesMapping():
        raise typer.BadParameter(f"'{log_level}' is no level; take debug, info, warning or error")
    pretty = set_up_logging(log_format, log_level)
    try:
        options: dict[str, object] = {"reload": reload, "replay": replay}
        options |= {"strict": strict or None, "replay_strict": replay_strict or None}
        read = partial(_configured, config, port, url, options)
        run(_serve(read, (config or Path(FILE_NAME)).resolve(), pretty=pretty))
    except ConnectionFailed as exc:
        giver = "--url" if url else f"[mesh] url in {config or FILE_NAME}"
        advice = f"{giver} gives this address; correct it, or leave it out for a server of our own."
        fail(advised(exc, advice))
    except MeshError as exc:
        fail(exc)


def _configured(path: Path | None, port: int | None, url: str | None, host: dict[str, object]) -> Config:
    """mesh.toml, with what the command line says instead."""
    config = load_config(path)
    if url is not None:
        config = config.model_copy(update={"mesh": config.mesh.model_copy(update={"url": url})})
    if port is not None:
        if config.mesh.url:
            raise ConfigError(
                f"--port is for the embedded server, but [mesh] url or --url says {config.mesh.url}. "
                "Leave one of them out."
            )
        config = config.model_copy(update={"server": config.server.model_copy(update={"port": port})})
    said = {key: value for key, value in host.items() if value is not None}
    return config.model_copy(update={"host": config.host.model_copy(update=said)})


async def _serve(read: Callable[[], Config], file: Path, *, pretty: bool) -> None:
    config = read()
    host = Host(config, config_file=file, read_config=read, watch=config.host.reload)
    hangup = _Hangup(host)
    # While modules are loaded the loop does not run: Ctrl-C has to reach a module that hangs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()  # what is here now stays; each reload then looks at what came since alone
    async with host:
        # Before anything is said: who reads it may send a signal at once.
        stop = stop_event(lambda: _say_stopping(host))
        with suppress(NotImplementedError, AttributeError):  # there is no SIGHUP on Windows
            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, hangup.start, stop)
        if pretty:
            note(_banner(host))
        else:
            log.info(
                "serving %s on %s", count(len(host.agents), "agent"), host.node.connection.target.display_url
            )
            if not host.agents:
                log.warning("%s", _why_none(host))
        await until_stopped(stop, host.node.connection.closed)
    log.info("stopped")


class _Hangup:
    """What SIGHUP does: reload by hand; or stop, when it says that the terminal is gone."""

    def __init__(self, host: Host) -> None:
        self._host = host
        self._tasks: set[asyncio.Task[None]] = set()
        # Whom nohup started is to outlive the terminal.
        self._needs_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN

    def start(self, stop: asyncio.Event) -> None:
        """Reload what has changed, in a task; or set `stop`."""
        if self._needs_terminal and not _has_terminal():
            log.info("stopping: the terminal was closed")
            stop.set()
            return
        task = asyncio.create_task(self._reload())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _reload(self) -> None:
        if await self._host.reload() is None:
            log.info("nothing has changed on disk")


def _has_terminal() -> bool:
    """Whether a terminal controls this process."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _say_stopping(host: Host) -> None:
    running = sum(route.in_flight for route in host.node.router)
    what = f"finishing {count(running, 'request')}" if running else "nothing is running"
    log.info("stopping: %s; Ctrl-C again stops at once", what)


def _banner(host: Host) -> str:
    config, agents = host.config, host.agents
    kind = f"embedded, store {config.server.store or 'thrown away'}" if host.server else "remote"
    lines = [
        "",
        f"  {_bold('openagentmesh')} · host {_bold(host.name)}",
        f"  {_bold(host.node.connection.target.display_url)} {_dim(kind)}",
    ]
    failed = [module for module in host.modules if module.state == "failed"]
    lines += ["", f"  {count(len(agents), 'agent')} from {count(len(host.modules) - len(failed), 'module')}"]
    width = max((len(agent.name) for agent in agents[:_MOST_SHOWN]), default=0)
    for agent in agents[:_MOST_SHOWN]:
        about = agent.contract.description.partition("\n")[0][:60]
        lines.append(f"    {agent.name:<{width}}  {_dim(agent.contract.version)}  {about}")
    if len(agents) > _MOST_SHOWN:
        lines.append(_dim(f"    and {len(agents) - _MOST_SHOWN} more: oam mesh catalog"))
    wrong = [f"    {m.origin.shown} failed: {m.error}" for m in failed]
    wrong += [f"    {name} is refused: {why}" for name, why in host.node.refused.items()]
    lines += [typer.style(line, fg=typer.colors.RED) for line in wrong]
    lines += ["", *_how_to_call(host)]
    if config.host.reload:
        lines.append(f"  {_dim('A file that is saved is reloaded at once.')}")
    lines += [f"  {_dim('Ctrl-C finishes what runs, then stops.')}", ""]
    return "\n".join(lines)


def _bold(text: str) -> str:
    return typer.style(text, bold=True)


def _dim(text: str) -> str:
    return typer.style(text, dim=True)


def _how_to_call(host: Host) -> list[str]:
    if not host.agents:
        return [f"  {_why_none(host)}", ""]
    url = host.node.connection.target.url
    is_default = url in {"nats://127.0.0.1:4222", "nats://localhost:4222"}
    where = "" if is_default else f" --url {host.node.connection.target.display_url}"
    # Those that can be called come first, and of these the sample that the docs show.
    agent = min(host.agents, key=lambda a: (not a.contract.invocable, a.name != "nlp.summarizer"))
    contract = agent.contract
    if not contract.invocable:
        return ["  See how they fare from another terminal:", f"    oam status{where}", ""]
    verb = "stream" if contract.streaming else "call"
    given = example_input(contract.input_schema)
    payload = "" if given is None else f" '{as_json(given)}'"
    return ["  Call one from another terminal:", f"    oam agent {verb} {agent.name}{payload}{where}", ""]


def _why_none(host: Host) -> str:
    """What to do when no agent is served."""
    declared = {agent.name for module in host.modules for agent in module.agents}
    if declared & host.node.refused.keys():
        return (
            "Make the refused agents go together with those that run, stop those, "
            'or set [host] contract = "warn"; then start again.'
        )
    if declared:
        return "mesh.toml disables every agent; set enabled = true for one and start again."
    if any(module.state == "failed" for module in host.modules):
        return "Mend what failed and start again."
    if host.modules:
        return "The modules declare no agent: put @mesh.agent(…) above a function and start again."
    folder = next(iter(host.config.host.agents or []), DEFAULT_FOLDER)
    return f"Put a Python file with an agent into {folder.rstrip('/')}/ and start again."
