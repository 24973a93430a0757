"""The programs in docs/examples print the output in their comments."""

import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "docs" / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_prints_its_documented_output(path: Path) -> None:
    """Run alone, with a server of its own, a program prints the lines of its last comment."""
    _, _, expected = path.read_text(encoding="utf-8").partition("# prints\n")
    ran = subprocess.run([sys.executable, path], capture_output=True, text=True, timeout=60, check=False)
    assert (0, [line.removeprefix("# ") for line in expected.splitlines()]) == (
        ran.returncode, ran.stdout.splitlines(),
    ), ran.stderr  # fmt: skip


def test_examples_exist() -> None:
    """The folder of the examples is not empty, so that the test above does run."""
    assert len(EXAMPLES) >= 11
