"""Reads the examples out of a page of the documentation.

A comment in the line above a fenced block says what the block is:

``<!-- file: bank.py -->``
    a file of the page's folder;
``<!-- run -->``
    run after the blocks before it, in one program a page, on SQLite;
``<!-- run: postgresql -->``
    the same on PostgreSQL, where the page's other blocks are run too;
``<!-- from: bank.py -->``
    lines of a file that stands elsewhere;
``<!-- project: bank/models.py -->``
    a file, or lines, of the Django project that ``tests/django_host/test_program.py`` makes;
``<!-- console -->``
    commands and what they print.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^(?:<!-- (?P<mark>[^\n]+?) -->\n)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.M | re.S)


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    mark: str
    language: str
    code: str
    line: int


def blocks(page: Path, language: str) -> list[Block]:
    """Return the blocks of a page in a language."""
    text = page.read_text()
    return [
        Block(found["mark"] or "", language, found["code"], text.count("\n", 0, found.start("code")))
        for found in BLOCK.finditer(text)
        if found["language"] == language
    ]


def program(page: Path, marks: set[str]) -> str:
    """Return the blocks with these marks as one program, whose line numbers are those of the page."""
    text = ""
    for block in blocks(page, "python"):
        if block.mark in marks:
            text += "\n" * (block.line - text.count("\n")) + block.code
    return text


def files(page: Path, kind: str = "file") -> dict[str, str]:
    """Return the files that a page shows, by their names."""
    shown = [block for block in blocks(page, "python") if block.mark.startswith(f"{kind}: ")]
    return {block.mark.removeprefix(f"{kind}: "): block.code for block in shown}
