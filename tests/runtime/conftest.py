"""Fixtures for modules on disk that are loaded without a server, or served by a host."""

import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from openagentmesh import AgentMesh
from openagentmesh.mesh.node import Node
from openagentmesh.runtime.config import Config, HostSection
from openagentmesh.runtime.loading.loader import Loader, Module
from openagentmesh.runtime.loading.origins import find_origins
from openagentmesh.runtime.reload.changes import Changes
from openagentmesh.runtime.reload.reloader import Reloader
from openagentmesh.transport.connection import Target

from tests.support.host_bench import Bench
from tests.support.modules import NO_SERVER, Configure, Load, write


@pytest.fixture(autouse=True)
def _fresh_modules() -> Iterator[None]:
    """Remove managed modules and import hooks after each test."""
    before, finders = set(sys.modules), list(sys.meta_path)
    yield
    for name in set(sys.modules) - before:
        if name.startswith("oam_"):
            del sys.modules[name]
    sys.meta_path[:] = finders


@pytest.fixture
def load(tmp_path: Path) -> Iterator[Load]:
    """Loads the modules of a config, or the files of `agents/` after it has written these.

    Returns the modules by their display names, without `agents/`.
    """
    loaders = []

    def load_(
        source: Mapping[str, str] | Config, *, settings: Mapping[str, dict[str, Any]] | None = None
    ) -> dict[str, Module]:
        if isinstance(source, Config):
            config = source
        else:
            write(tmp_path / "agents", source)
            section = HostSection(agents=["agents"], entry_points=False)
            config = Config(folder=tmp_path.resolve(), host=section)
        config = config.model_copy(update={"settings": dict(settings or {})})
        node = Node(Target(NO_SERVER), "0" * 32)
        loader = Loader(node, config)
        loaders.append(loader)
        reloader = Reloader(
            loader, node, Changes(loader.imports, None, lambda: config), config, lambda agent, _: agent
        )
        reloader.load_all(find_origins(config))
        return {module.origin.display_name.removeprefix("agents/"): module for module in reloader.modules}

    yield load_
    for loader in loaders:
        loader.imports.close()


@pytest.fixture
def bench(
    configure: Configure, mesh: AgentMesh, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Bench:
    """A folder of agent files and its host; the files share the module `ledger` with the test."""
    created = Bench(configure, mesh, name, tmp_path.resolve())
    monkeypatch.setitem(sys.modules, "ledger", created.ledger)
    return created
