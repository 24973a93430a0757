"""The documents of this repository and their code blocks."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(document: str, language: str = "python") -> list[str]:
    """The fenced blocks of one language in a document; a language may be empty."""
    return [text for kind, text in BLOCK.findall((ROOT / document).read_text()) if kind == language]
