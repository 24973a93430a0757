"""Origins of modules: folders, files, dotted names and entry points, in their order."""

import sys
from pathlib import Path

import pytest
from openagentmesh.runtime.config import Config, ConfigError, HostSection
from openagentmesh.runtime.loading.loader import Module
from openagentmesh.runtime.loading.origins import Origin, find_origins

from tests.support.modules import MESH, Configure, Load, agent, answer, write


def origins_of(
    folder: Path, places: list[str] | None = None, *, entry_points: bool | list[str] = False
) -> list[Origin]:
    """The origins of these places in a config for `folder`."""
    return find_origins(Config(folder=folder, host=HostSection(agents=places, entry_points=entry_points)))


def display_names(origins: list[Origin]) -> list[str]:
    return [origin.display_name for origin in origins]


def install_package(folder: Path, name: str, entry_points: dict[str, str]) -> None:
    """Install a package `name` with agent entry points, once `folder` is on `sys.path`."""
    points = "".join(f"{key} = {value}\n" for key, value in entry_points.items())
    write(
        folder / f"{name}-1.0.dist-info",
        {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
            "entry_points.txt": f"[openagentmesh.agents]\n{points}[other.group]\nunrelated = nowhere\n",
        },
    )


FILES = {
    "b.py": "",
    "a.py": "",
    "my-agent.py": "",
    "_common.py": "",
    ".hidden.py": "",
    "notes.txt": "",
    "data.json": "{}",
    "sub/c.py": "",
    "sub/deeper/d.py": "",
    "package/__init__.py": "",
    "package/part.py": "",
    "_skipped/x.py": "",
    ".git/x.py": "",
    "__pycache__/a.py": "",
}
ALL = ["a.py", "b.py", "my-agent.py", "package", "sub/c.py", "sub/deeper/d.py"]


def test_a_folder_has_its_files_and_packages_at_any_depth(tmp_path: Path) -> None:
    """In the order of their names; names that begin with `_` or `.` and other files are no agent modules."""
    write(tmp_path / "agents", FILES)
    origins = origins_of(tmp_path, ["agents"])
    assert [f"agents/{name}" for name in ALL] == display_names(origins)
    assert [tmp_path.resolve() / "agents" / name for name in ALL] == [origin.path for origin in origins]
    assert ["a", "b", "my-agent", "package", "c", "d"] == [origin.key for origin in origins]


def test_a_place_may_be_a_file_or_a_package(tmp_path: Path) -> None:
    """In the given order, also a file that a folder would skip."""
    write(tmp_path / "agents", FILES)
    places = ["agents/sub/c.py", "agents/package", "agents/_common.py", str(tmp_path / "agents/a.py")]
    expected = ["agents/sub/c.py", "agents/package", "agents/_common.py", "agents/a.py"]
    assert expected == display_names(origins_of(tmp_path.resolve(), places))


def test_a_place_outside_the_folder_has_an_absolute_name(tmp_path: Path) -> None:
    """The display name of a file outside of mesh.toml's folder is its absolute path."""
    write(tmp_path, {"mesh/mesh.toml": "", "elsewhere/a.py": ""})
    assert [str(tmp_path.resolve() / "elsewhere/a.py")] == display_names(
        origins_of(tmp_path / "mesh", ["../elsewhere"])
    )


def test_places_are_relative_to_the_folder_of_mesh_toml(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The working directory does not matter."""
    write(tmp_path / "agents", {"a.py": ""})
    monkeypatch.chdir("/")
    assert ["agents/a.py"] == display_names(origins_of(tmp_path.resolve(), ["agents"]))


def test_the_default_place_is_an_optional_agents_folder(tmp_path: Path) -> None:
    """Without `[host] agents` it is `agents/`, if that exists; an empty list means no place."""
    assert [] == origins_of(tmp_path)
    write(tmp_path / "agents", {"a.py": ""})
    assert ["agents/a.py"] == display_names(origins_of(tmp_path.resolve()))
    assert [] == origins_of(tmp_path, [])


def test_a_dotted_name_is_a_module_on_the_path(tmp_path: Path) -> None:
    """A place that is no file but a module's name is imported; its last part names its settings."""
    assert [Origin("my_company.agents.billing", "billing", module="my_company.agents.billing")] == origins_of(
        tmp_path, ["my_company.agents.billing"]
    )


@pytest.mark.parametrize("place", ["nowhere/agents", "missing.py", "agents", "no-such", "../x", "a..b"])
def test_a_missing_place_is_an_error(tmp_path: Path, place: str) -> None:
    """The message has the key, the place, where it was searched, and what is permitted."""
    folder = tmp_path / "empty"
    folder.mkdir()
    with pytest.raises(ConfigError) as caught:
        find_origins(Config(folder=folder, host=HostSection(agents=[place], entry_points=False)))
    message = caught.value.message
    assert f"host.agents: '{place}'" in message
    assert str(folder / place) in message
    assert "Give a folder, a file, or a dotted module name" in message


def test_entry_points_of_installed_packages_are_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All for `true`, in the order of their names; a list's in its order; none for `false`."""
    install_package(tmp_path, "fake_agents", {"two": "fake_agents.two", "one": "fake_agents.one:mesh"})
    monkeypatch.syspath_prepend(tmp_path)
    one = ("fake_agents (entry point one)", "one", "fake_agents.one")
    two = ("fake_agents (entry point two)", "two", "fake_agents.two")

    def entry_points(*, wanted: bool | list[str]) -> list[tuple[str, str, str]]:
        return [(o.display_name, o.key, o.module) for o in origins_of(tmp_path, [], entry_points=wanted)]

    assert [[one, two], [two, one], []] == [
        entry_points(wanted=True), entry_points(wanted=["two", "one"]), entry_points(wanted=False),
    ]  # fmt: skip


def test_a_missing_entry_point_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names it, the group, and the installed ones."""
    install_package(tmp_path, "fake_agents", {"one": "fake_agents.one"})
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"'two' \(group 'openagentmesh.agents'; installed: one\)"):
        origins_of(tmp_path, [], entry_points=["two"])


async def test_dotted_modules_and_entry_points_are_loaded(
    tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch, load: Load, configure: Configure
) -> None:
    """Both declare agents like files, and get their own settings."""
    package = f"pkg_{name}"
    source = f"from pydantic import BaseModel\n{MESH}"
    source += "class S(BaseModel):\n    greeting: str = 'default'\nsettings = mesh.settings(S)\n"
    write(
        tmp_path / "site",
        {
            f"{package}/__init__.py": "",
            f"{package}/dotted.py": source + agent("dotted", "settings.greeting"),
            f"{package}/point.py": source + agent("point", "settings.greeting"),
        },
    )
    install_package(tmp_path / "site", package, {"greeter": f"{package}.point:mesh"})
    monkeypatch.syspath_prepend(tmp_path / "site")
    config = configure({}, host={"agents": [f"{package}.dotted"], "entry_points": ["greeter"]})
    modules = load_config_modules(
        load, config, {"dotted": {"greeting": "hello"}, "greeter": {"greeting": "hi"}}
    )
    assert [("serving", ["dotted"]), ("serving", ["point"])] == [
        (module.state, [agent.name for agent in module.agents]) for module in modules
    ]
    assert ["hello", "hi"] == [await answer(module) for module in modules]


def load_config_modules(load: Load, config: Config, settings: dict[str, dict[str, str]]) -> list[Module]:
    """The modules of a config."""
    return list(load(config, settings=settings).values())


@pytest.mark.parametrize(
    ("target", "error"),
    [
        ("{}.missing", "ModuleNotFoundError"),
        ("{}:nothing", "AttributeError"),
        ("{}.broken", "ZeroDivisionError"),
    ],
    ids=["missing-module", "missing-attribute", "failed-import"],
)
async def test_a_broken_entry_point_fails_with_its_package(  # noqa: PLR0913, PLR0917 - fixtures
    tmp_path: Path,
    name: str,
    monkeypatch: pytest.MonkeyPatch,
    load: Load,
    configure: Configure,
    target: str,
    error: str,
) -> None:
    """A missing module, a missing attribute and a failed import are errors of the module."""
    package = f"pkg_{name}"
    write(tmp_path / "site" / package, {"__init__.py": "", "broken.py": "1/0"})
    install_package(tmp_path / "site", package, {"greeter": target.format(package)})
    monkeypatch.syspath_prepend(tmp_path / "site")
    (module,) = load_config_modules(load, configure({}, host={"agents": [], "entry_points": ["greeter"]}), {})
    assert ("failed", f"{package} (entry point greeter)", []) == (
        module.state, module.origin.display_name, module.agents,
    )  # fmt: skip
    assert module.error.startswith(error)
    sys.modules.pop(f"{package}.broken", None)
