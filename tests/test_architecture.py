"""The architecture: imports between layers, sizes of files and functions, imports of samples and plugins."""

import ast
from pathlib import Path

import openagentmesh
import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "host" / "openagentmesh"
# From the lowest layer up; folders of one layer do not import each other.
LAYERS = [
    {"protocol"},
    {"transport"},
    {"agent"},
    {"serving", "hooks"},
    {"registry"},
    {"client"},
    {"state"},
    {"mesh"},
    {"runtime"},
    {"cli"},
]
SOURCES = sorted(PACKAGE.rglob("*.py"))
SAMPLES = sorted((ROOT / "agents").glob("*.py"))
PLUGINS = sorted((ROOT / "plugins").rglob("*.py"))


def imported(path: Path) -> list[str]:
    """The full names of all modules a file imports."""
    found = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            found += [f"{node.module}.{alias.name}" for alias in node.names] + [str(node.module)]
    return found


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    """A module imports only from its own folder and from lower layers."""
    folder = path.relative_to(PACKAGE).parts[0]
    [layer] = [number for number, folders in enumerate(LAYERS) if folder in folders]
    above = {f"openagentmesh.{name}" for folders in LAYERS[layer:] for name in folders - {folder}}
    assert [] == [name for name in imported(path) if ".".join(name.split(".")[:2]) in above]


def test_imports_have_no_cycle() -> None:
    """All modules can be put in an order in which each imports only earlier ones."""
    names = {module_name(path): path for path in SOURCES}
    graph = {
        name: {other for other in imported(path) if other in names and other != name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    while leaves := {name for name, imports in graph.items() if not imports & graph.keys()}:
        graph = {name: imports for name, imports in graph.items() if name not in leaves}
    assert {} == graph


@pytest.mark.parametrize("path", [*SOURCES, *PLUGINS], ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_functions_are_short(path: Path) -> None:
    """No file has over 400 lines, no function over 60."""
    text = path.read_text()
    assert text.count("\n") <= 400
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    lengths = {
        node.name: (node.end_lineno or 0) - node.lineno
        for node in ast.walk(ast.parse(text))
        if isinstance(node, functions)
    }
    assert {} == {name: length for name, length in lengths.items() if length > 60}


@pytest.mark.parametrize("path", SAMPLES, ids=lambda path: path.stem)
def test_samples_are_short_and_use_the_public_api(path: Path) -> None:
    """A sample agent has under 40 lines and imports only public names of `openagentmesh`."""
    assert path.read_text().count("\n") < 40
    assert set() == private_imports(path)


@pytest.mark.parametrize("path", PLUGINS, ids=lambda path: path.stem)
def test_plugins_use_the_public_api(path: Path) -> None:
    """A first-party plugin imports only public names of `openagentmesh`, as any other plugin."""
    assert set() == private_imports(path)


def private_imports(path: Path) -> set[str]:
    """The names that a file imports from `openagentmesh` and that are not public."""
    names = {name for name in imported(path) if name.startswith("openagentmesh")}
    return names - {f"openagentmesh.{name}" for name in openagentmesh.__all__} - {"openagentmesh"}
