"""The language: words that only this project would use stay out of names, comments, messages and docs."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
# Code that tells, asks and mends is hard to search and to understand; the field has words for all of it.
WORDS = (
    "nobody|whoever|whom|tells?|told|telling|ask(s|ed|ing)?|hears?|heard|mend(s|ed)?|strangers?|patience|"
    "verdict|lifeline|aside|bury|buried|overhear|renounce"
)
# Also as a part of a name.
PATTERN = re.compile(rf"(?<![a-zA-Z])({WORDS})(?![a-zA-Z])", re.IGNORECASE)
FOLDERS = ("host", "plugins", "agents", "docs", "tests")
FILES = [
    *(path for folder in FOLDERS for suffix in ("py", "md") for path in (ROOT / folder).rglob(f"*.{suffix}")),
    *ROOT.glob("*.md"),
]


def test_words_of_a_dialect_are_not_used() -> None:
    """Names, comments, messages and docs use the words of Python, asyncio and NATS."""
    found = [
        f"{path.relative_to(ROOT)}:{number}: {line}"
        for path in sorted(FILES)
        if path != Path(__file__)
        for number, line in enumerate(path.read_text().splitlines(), 1)
        if PATTERN.search(line)
    ]
    assert [] == found
