"""Whether a reload may be carried out: why not, and what is said of it."""

import traceback
from collections.abc import Iterable
from pathlib import Path

from openagentmesh.mesh.node import ContractPolicy
from openagentmesh.protocol.compatibility import breaking_changes
from openagentmesh.protocol.errors import MeshError, text_of
from openagentmesh.runtime.aside import TookTooLong
from openagentmesh.runtime.loader import Module
from openagentmesh.serving.agent import Agent


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
            f for f in exc.stack if not f.filename.startswith(("<frozen", str(Path(__file__).parents[1])))
        ]
        line = f"{frames[-1].filename}:{frames[-1].lineno}" if frames else ""
        return "it takes too long to load; do what takes long in a watcher", "".join(exc.stack.format()), line
    if isinstance(exc, MeshError):
        return exc.message, "", ""
    return f"{type(exc).__name__}: {text_of(exc)}", "".join(traceback.format_exception(exc)), ""
