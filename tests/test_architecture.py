"""The architecture: imports, sizes and complexity, and what ARCHITECTURE.md says of the files."""

import ast
import re
from collections.abc import Iterator
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
TESTS = sorted((ROOT / "tests").rglob("*.py"))
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
BRANCHES = (
    ast.If,
    ast.For,
    ast.AsyncFor,
    ast.While,
    ast.ExceptHandler,
    ast.IfExp,
    ast.Assert,
    ast.match_case,
    ast.comprehension,
)


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
    root = PACKAGE.parent if path.is_relative_to(PACKAGE) else ROOT / "plugins"
    return ".".join(path.relative_to(root).with_suffix("").parts)


def relative(path: Path) -> str:
    return str(path.relative_to(ROOT))


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    return (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, FUNCTIONS))


def complexity(function: ast.AST) -> int:
    """The cyclomatic complexity, with comprehensions and nested functions."""
    nodes = list(ast.walk(function))
    decisions = sum(isinstance(node, BRANCHES) for node in nodes)
    operators = sum(len(node.values) - 1 for node in nodes if isinstance(node, ast.BoolOp))
    filters = sum(len(node.ifs) for node in nodes if isinstance(node, ast.comprehension))
    return 1 + decisions + operators + filters


@pytest.mark.parametrize("path", [p for p in SOURCES if p.parent != PACKAGE], ids=module_name)
def test_imports_point_down(path: Path) -> None:
    """A module imports only from its own folder and from lower layers."""
    folder = path.relative_to(PACKAGE).parts[0]
    [layer] = [number for number, folders in enumerate(LAYERS) if folder in folders]
    above = {f"openagentmesh.{name}" for folders in LAYERS[layer:] for name in folders - {folder}}
    assert [] == [name for name in imported(path) if ".".join(name.split(".")[:2]) in above]


def test_imports_have_no_cycle() -> None:
    """All modules can be put in an order in which each imports only earlier ones."""
    names = {module_name(path): path for path in [*SOURCES, *PLUGINS]}
    graph = {
        name: {other for other in imported(path) if other in names and other != name}
        for name, path in names.items()
        if path.name != "__init__.py"
    }
    while leaves := {name for name, imports in graph.items() if not imports & graph.keys()}:
        graph = {name: imports for name, imports in graph.items() if name not in leaves}
    assert {} == graph


@pytest.mark.parametrize("path", [*SOURCES, *PLUGINS, *TESTS], ids=relative)
def test_files_are_short(path: Path) -> None:
    """No file has over 400 lines."""
    assert path.read_text().count("\n") <= 400


@pytest.mark.parametrize("path", [*SOURCES, *PLUGINS], ids=relative)
def test_functions_are_short_and_have_few_branches(path: Path) -> None:
    """No function has over 60 lines, or a cyclomatic complexity over 15."""
    lengths = {function.name: (function.end_lineno or 0) - function.lineno for function in functions(path)}
    branches = {function.name: complexity(function) for function in functions(path)}
    assert {} == {name: length for name, length in lengths.items() if length > 60}
    assert {} == {name: number for name, number in branches.items() if number > 15}


@pytest.mark.parametrize("path", TESTS, ids=relative)
def test_tests_import_no_other_tests(path: Path) -> None:
    """What tests share is in tests/support or a conftest.py, so that each file runs alone."""
    assert [] == [name for name in imported(path) if re.search(r"\btest_\w+", name)]


def test_architecture_md_names_existing_functions() -> None:
    """Each `file.py:function` in ARCHITECTURE.md exists."""
    references = re.findall(r"`([a-z_/]+\.py):([\w.]+)`", (ROOT / "ARCHITECTURE.md").read_text())
    assert len(references) > 20
    assert [] == [reference for reference in references if not is_defined(*reference)]


def is_defined(file: str, qualified_name: str) -> bool:
    scope: list[ast.stmt] = ast.parse((PACKAGE / file).read_text()).body
    for part in qualified_name.split("."):
        named = [node for node in scope if isinstance(node, (*FUNCTIONS, ast.ClassDef)) and node.name == part]
        if not named:
            return False
        scope = named[0].body
    return True


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
