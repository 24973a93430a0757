"""The example files of docs/, one a way to talk: each prints what it says it prints."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_what_it_says(path: Path) -> None:
    """Run alone, with a server of its own, the file prints the lines of its last comment."""
    _, _, expected = path.read_text(encoding="utf-8").partition("# prints\n")
    ran = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert (0, [line.removeprefix("# ") for line in expected.splitlines()]) == (
        ran.returncode, ran.stdout.splitlines(),
    ), ran.stderr  # fmt: skip


def test_there_are_examples() -> None:
    """A moved folder does not make all of these pass by being empty."""
    assert len(EXAMPLES) >= 11
