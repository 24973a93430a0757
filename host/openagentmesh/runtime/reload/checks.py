"""Whether a reload may be carried out: why not, and what is said of it."""

import logging
import traceback
from collections.abc import Container, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from openagentmesh.agent.agent import Agent
from openagentmesh.hooks.reload_result import Outcome
from openagentmesh.mesh.node import ContractPolicy
from openagentmesh.protocol.errors import MeshError, error_text
from openagentmesh.protocol.schema_diff import breaking_changes
from openagentmesh.runtime.config import Config
from openagentmesh.runtime.loading.files import Stamp, file_digest, stamp
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.modules import Source, is_written_by_code
from openagentmesh.runtime.reload.off_loop import TookTooLong
from openagentmesh.runtime.reload.state import Transfer
from openagentmesh.transport.kv import HEADER_RESERVE

# In the terminal it is the reload that speaks.
log = logging.getLogger("openagentmesh.runtime.reload.reloader")


class ReloadRefused(MeshError):
    """A changed module is not taken; the one before it goes on."""

    code = "reload_refused"


class LoadFailed(Exception):
    """A module could not be loaded; it says why."""

    def __init__(self, module: Module, files: Iterable[Path] = ()) -> None:
        super().__init__(module.error)
        self.module = module
        # Other files that it failed of.
        self.files = list(files)


class Doubtful(Exception):
    """What is on disk may be half a save: a file is gone or empty, or a module lost all its agents."""


@dataclass(slots=True)
class Candidate:
    """A new generation, loaded and checked, before it serves."""

    modules: list[Module]
    agents: dict[Module, list[Agent]]
    serve: list[Agent]
    gone: list[str]
    transfers: list[Transfer]
    notes: list[str]


def check_willing(sources: Mapping[str, Source], names: Iterable[str]) -> None:
    """Refuse to replace modules that decline it."""
    for source in [sources[name] for name in names if name in sources]:
        if source.generation.declined:
            why = f"{source.path.name} declines to be reloaded: {source.generation.declined}"
            raise ReloadRefused(f"{why}. Restart the host")


def check_settled(executed: Iterable[Source], settled: Mapping[str, Stamp], *, sure: bool) -> None:
    """Doubt what was read from a file that is not as it had settled: somebody writes it again.

    Where one is `sure`, since it had been quiet for long, and of what modules write themselves to
    import it, it only has to be what was read.
    """
    for source in executed:
        path = str(source.path)
        differs = path in settled and stamp(path) != settled[path]
        may_differ = (sure or is_written_by_code(path)) and file_digest(source.path) == source.digest
        if differs and not may_differ:
            raise Doubtful


def check_publishable(serve: Iterable[Agent], limit: int) -> None:
    """Refuse contracts that do not fit into a message: nobody would ever hear of them."""
    for agent in serve:
        size = len(agent.contract.to_registry_json().encode())
        if size > limit - HEADER_RESERVE:
            raise ReloadRefused(
                f"{agent.name}: its contract has {size} bytes, and the server takes {limit} in a message. "
                "Shorten its description or its schemas, or raise the server's max_payload"
            )


def different(
    wanted: Mapping[str, Agent],
    served: Mapping[str, Agent],
    now: Config,
    before: Config,
    refused: Container[str],
) -> list[Agent]:
    """The agents that are not served as they are to be."""
    return [
        agent
        for name, agent in wanted.items()
        if name not in served
        or served[name].handler is not agent.handler
        or served[name].limits != now.limits_of(name)
        or before.options_of(name) != now.options_of(name)
        or before.plugins != now.plugins
        or (name in refused and before.host.contract != now.host.contract)
    ]


def withdrawn(
    served: Mapping[str, Agent],
    wanted: Container[str],
    modules: Iterable[Module],
    replaced: Iterable[Source],
) -> list[str]:
    """The agents that are to be served no more.

    What a file has declared while it ran goes with that file; another one's reload takes nothing away.
    """
    declared = {agent.name for module in modules for agent in module.agents}
    files = {source.path for source in replaced}
    gone = [name for name in served if name not in wanted]
    return [name for name in gone if name in declared or served[name].file in files]


def compared(serve: list[Agent], served: dict[str, Agent], policy: ContractPolicy) -> list[str]:
    """What callers would notice of the new contracts; raises it where that is not wanted."""
    if policy == "allow":
        return []
    notes = [
        f"{agent.name} breaks callers: {change}"
        for agent in serve
        if agent.name in served
        for change in breaking_changes(served[agent.name].contract, agent.contract)
    ]
    if notes and policy == "refuse":
        raise ReloadRefused(
            'callers would break, and [host] contract is "refuse": ' + "; ".join(notes),
            details={"changes": notes},
        )
    return notes


def in_words(old: dict[str, Agent], new: list[Agent]) -> list[str]:
    """What changes of each agent, as people are told."""
    words = []
    for agent in new:
        before = old.get(agent.name)
        version = agent.contract.version
        if before is None:
            words.append(f"{agent.name} {version} new")
        elif before.contract.version != version:
            words.append(f"{agent.name} {before.contract.version} → {version}")
        else:
            words.append(f"{agent.name} {version}")
    return words


def why_of(exc: BaseException) -> tuple[str, str, str]:
    """Message, details and `file:line` of a failure, for its author."""
    if isinstance(exc, LoadFailed):
        return exc.module.error, exc.module.traceback, exc.module.line
    if isinstance(exc, TookTooLong):
        frames = [
            f for f in exc.stack if not f.filename.startswith(("<frozen", str(Path(__file__).parents[2])))
        ]
        line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return "it takes too long to load; do what takes long in a watcher", "".join(exc.stack.format()), line
    if isinstance(exc, MeshError):
        return exc.message, "", ""
    return f"{type(exc).__name__}: {error_text(exc)}", "".join(traceback.format_exception(exc)), ""


def tell(outcome: Outcome) -> None:
    """Show a reload in the terminal."""
    if outcome.error:
        details = f"\n{outcome.details}" if outcome.details else ""
        log.error("%s%s", outcome.text, details)
    else:
        log.info("%s", outcome.text)
    for note in outcome.notes:
        log.warning("%s", note)
