"""`oam up`: the host, until Ctrl-C."""

import asyncio
import gc
import logging
import os
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Annotated, Final

import typer

from openagentmesh.cli.connecting import with_advice
from openagentmesh.cli.logs import LogFormat, configure_logging
from openagentmesh.cli.output import ConfigFile, count, example_input, fail, note, to_json_text
from openagentmesh.mesh.runner import run, stop_event, wait_for_stop
from openagentmesh.protocol.errors import ConnectionFailed, MeshError
from openagentmesh.runtime.config import FILE_NAME, Config, ConfigError, load_config
from openagentmesh.runtime.host import Host
from openagentmesh.runtime.loading.origins import DEFAULT_FOLDER

log = logging.getLogger("openagentmesh.up")

_MAX_AGENTS_SHOWN: Final = 20
_LOCAL_URLS: Final = {"nats://127.0.0.1:4222", "nats://localhost:4222"}
_bold = partial(typer.style, bold=True)
_dim = partial(typer.style, dim=True)


def up(  # noqa: PLR0913 - one parameter per option
    config: ConfigFile = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="The embedded server's port; 0 for any free one.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Use this NATS server instead of an embedded one.")] = None,
    *,
    strict: Annotated[bool, typer.Option("--strict", help="Fail when a module fails to load.")] = False,
    reload: Annotated[
        bool | None, typer.Option(help="Reload files as soon as they are saved; else as in mesh.toml.")
    ] = None,
    log_format: Annotated[LogFormat, typer.Option(help="The format of log records.")] = "auto",
    log_level: Annotated[str, typer.Option(help="debug, info, warning or error.")] = "info",
) -> None:
    """Run the agents of mesh.toml: one process, one connection, until Ctrl-C."""
    if log_level.upper() not in logging.getLevelNamesMapping():
        raise typer.BadParameter(f"'{log_level}' is not a level; give debug, info, warning or error")
    is_pretty = configure_logging(log_format, log_level)
    host = {"reload": reload, "strict": strict or None}
    read = partial(_read_config, config, {"mesh": {"url": url}, "server": {"port": port}, "host": host})
    try:
        run(_serve(read, (config or Path(FILE_NAME)).resolve(), is_pretty=is_pretty))
    except ConnectionFailed as exc:
        source = "--url" if url else f"[mesh] url in {config or FILE_NAME}"
        advice = f"The address comes from {source}; correct it, or remove it to start an embedded server."
        fail(with_advice(exc, advice))
    except MeshError as exc:
        fail(exc)


def _read_config(path: Path | None, options: Mapping[str, Mapping[str, object]]) -> Config:
    """mesh.toml, with the options of the command line by section and key; None for missing ones."""
    config = load_config(path)
    for section, values in options.items():
        given = {key: value for key, value in values.items() if value is not None}
        config = config.model_copy(update={section: getattr(config, section).model_copy(update=given)})
    if options["server"]["port"] is not None and config.mesh.url:
        raise ConfigError(
            f"--port is for the embedded server, but [mesh] url or --url is {config.mesh.url}. "
            "Remove one of them."
        )
    return config


async def _serve(read_config: Callable[[], Config], file: Path, *, is_pretty: bool) -> None:
    config = read_config()
    host = Host(config, config_file=file, read_config=read_config, watch=config.host.reload)
    # The loop does not run while modules are loaded: Ctrl-C must reach a module that hangs.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()
    gc.freeze()  # what exists now stays; collections examine later objects alone
    async with host:
        gc.collect()  # the host measures it, to know whether reloads may collect
        # Before any output: its reader may send a signal at once.
        stop = stop_event(lambda: _log_stopping(host))
        _handle_hangup(host, stop)
        if is_pretty:
            note(_banner(host))
        else:
            url = host.node.connection.target.display_url
            log.info("serving %s on %s", count(len(host.agents), "agent"), url)
            if not host.agents:
                log.warning("%s", _advice_without_agents(host))
        await wait_for_stop(stop, host.node.connection.closed)
    log.info("stopped")


def _handle_hangup(host: Host, stop: asyncio.Event) -> None:
    """On SIGHUP reload what has changed, or stop when the controlling terminal was closed."""
    if not hasattr(signal, "SIGHUP"):
        return  # Windows
    # A process that nohup started outlives its terminal.
    needs_terminal = _has_terminal() and signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    tasks: set[asyncio.Task[None]] = set()

    def on_hangup() -> None:
        if needs_terminal and not _has_terminal():
            log.info("stopping: the terminal was closed")
            stop.set()
            return
        task = asyncio.create_task(_reload(host))
        tasks.add(task)
        task.add_done_callback(tasks.discard)

    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, on_hangup)


async def _reload(host: Host) -> None:
    if await host.reload() is None:
        log.info("nothing has changed on disk")


def _has_terminal() -> bool:
    """Whether this process has a controlling terminal."""
    try:
        os.close(os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY))
    except OSError:
        return False
    return True


def _log_stopping(host: Host) -> None:
    running = sum(route.in_flight for route in host.node.router)
    what = f"finishing {count(running, 'request')}" if running else "nothing is running"
    log.info("stopping: %s; Ctrl-C again stops at once", what)


def _banner(host: Host) -> str:
    config, agents = host.config, host.agents
    server = f"embedded, store {config.server.store or 'temporary'}" if host.server else "remote"
    failed = [module for module in host.modules if module.state == "failed"]
    lines = [
        "",
        f"  {_bold('openagentmesh')} · host {_bold(host.name)}",
        f"  {_bold(host.node.connection.target.display_url)} {_dim(server)}",
        "",
        f"  {count(len(agents), 'agent')} from {count(len(host.modules) - len(failed), 'module')}",
        *_agent_lines(host),
    ]
    problems = [f"    {m.origin.display_name} failed: {m.error}" for m in failed]
    problems += [f"    {name} refused: {reason}" for name, reason in host.node.refused.items()]
    lines += [typer.style(line, fg=typer.colors.RED) for line in problems]
    lines += ["", *_call_lines(host)]
    if config.host.reload:
        lines.append(f"  {_dim('Saved files are reloaded at once.')}")
    lines += [f"  {_dim('Ctrl-C finishes running requests, then stops.')}", ""]
    return "\n".join(lines)


def _agent_lines(host: Host) -> list[str]:
    shown = host.agents[:_MAX_AGENTS_SHOWN]
    width = max((len(agent.name) for agent in shown), default=0)
    lines = []
    for agent in shown:
        description = agent.contract.description.partition("\n")[0][:60]
        lines.append(f"    {agent.name:<{width}}  {_dim(agent.contract.version)}  {description}")
    if len(host.agents) > len(shown):
        lines.append(_dim(f"    and {len(host.agents) - len(shown)} more: oam mesh catalog"))
    return lines


def _call_lines(host: Host) -> list[str]:
    """How to use an agent from another terminal."""
    if not host.agents:
        return [f"  {_advice_without_agents(host)}", ""]
    target = host.node.connection.target
    option = "" if target.url in _LOCAL_URLS else f" --url {target.display_url}"
    # Invocable agents first, and of these the sample that the docs show.
    agent = min(host.agents, key=lambda a: (not a.contract.invocable, a.name != "nlp.summarizer"))
    contract = agent.contract
    if not contract.invocable:
        return ["  Monitor them from another terminal:", f"    oam status{option}", ""]
    verb = "stream" if contract.streaming else "call"
    example = example_input(contract.input_schema)
    payload = "" if example is None else f" '{to_json_text(example)}'"
    return ["  Call one from another terminal:", f"    oam agent {verb} {agent.name}{payload}{option}", ""]


def _advice_without_agents(host: Host) -> str:
    """What to do when no agent is served."""
    declared = {agent.name for module in host.modules for agent in module.agents}
    if declared & host.node.refused.keys():
        return (
            "Make the refused agents compatible with the running ones, stop those, "
            'or set [host] contract = "warn"; then restart.'
        )
    if declared:
        return "mesh.toml disables every agent; set enabled = true for one, then restart."
    if any(module.state == "failed" for module in host.modules):
        return "Fix the errors above, then restart."
    if host.modules:
        return "The modules declare no agent: put @mesh.agent(…) above a function, then restart."
    folder = next(iter(host.config.host.agents or []), DEFAULT_FOLDER)
    return f"Put a Python file with an agent into {folder.rstrip('/')}/, then restart."
