"""The documentation names what there is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType

import pytest
from packaging.version import Version

from flask_eventsourcing import __version__
from flask_eventsourcing.config import RENAMED
from tests.docs.pages import PAGES, ROOT
from tests.source import MODULES, PACKAGE

NAME = re.compile(r"\bflask_eventsourcing(?:\.\w+)+")
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?:#[^)\s]*)?\)")
AUTO = re.compile(r"\.\. auto(?:class|function|method|exception):: (?P<name>\S+)")
FIELDS = re.compile(r"^:(param|raises|return).*\n?(^ +.*\n?)*", re.MULTILINE)
"""The lines of a docstring that describe arguments, errors and the return value."""
SENTENCE = re.compile(r"[.!?:](?=\s|$)")


def exists(name: str) -> bool:
    """Whether a dotted name is that of a module, or of something in one."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found = import_module(".".join(parts[:length]))
        except ModuleNotFoundError as error:
            if error.name is not None and not error.name.startswith("flask_eventsourcing"):
                # The module is there, and needs an extra that is not installed.
                return True
            continue
        for part in parts[length:]:
            if not hasattr(found, part):
                return False
            found = getattr(found, part)
        return True
    return False


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_and_links_lead_somewhere(page: Path) -> None:
    """Every name of the package that a page has can be imported, and every page that it links to is there."""
    text = page.read_text()
    if find_spec("django"):
        # Django's models are there where there are settings.
        import_module("tests.django_host.project")
    assert [name for name in NAME.findall(text) if not exists(name)] == []
    paths = [page.parent / found["path"] for found in LINK.finditer(text)]
    assert [path.relative_to(ROOT) for path in paths if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_leaves_its_contents_to_the_theme(page: Path) -> None:
    """A page shows no error: the theme lists the sections itself, and puts one in the place of a second list."""
    assert "{contents}" not in page.read_text()


def documented() -> Iterator[tuple[str, object]]:
    """Return what the page on the API shows, and those members of classes that it shows with them."""
    module = "flask_eventsourcing"
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif directive := AUTO.match(line):
            name = directive["name"]
            whole = name if name.startswith("flask_eventsourcing.") else f"{module}.{name}"
            found = resolve_name(whole)
            yield whole, found
            if isinstance(found, type) and any(":members:" in each for each in lines[number + 1 : number + 3]):
                yield from ((f"{whole}.{each}", member) for each, member in members(found, lines[number + 1]))


def members(found: type, option: str) -> Iterator[tuple[str, object]]:
    """Return the functions and properties of a class that an option ``:members:`` names, or all public ones."""
    named = option.partition(":members:")[2].replace(",", " ").split()
    for name, member in vars(found).items():
        if (isinstance(member, FunctionType | property)) and (name in named or not (named or name.startswith("_"))):
            yield name, member


@pytest.mark.parametrize(("name", "found"), [pytest.param(*each, id=each[0]) for each in documented()])
def test_what_is_documented_says_more_than_its_name(name: str, found: object) -> None:
    """The docstring of a public name says what it is, and in another sentence why, when or how to use it."""
    prose = FIELDS.sub("", getdoc(found) or "")
    assert len(SENTENCE.findall(prose)) > 1, prose


MARK = re.compile(r"(?:version(?:added|changed)|deprecated)(?:::|\}) (?P<version>\S+)")


def test_marks_name_versions_that_there_are() -> None:
    """A mark of what a version has added, changed or deprecated names this version or an earlier one."""
    texts = [path.read_text() for path in (*PAGES, *(ROOT / PACKAGE).rglob("*.py"))]
    found = {mark["version"] for text in texts for mark in MARK.finditer(text)}
    assert found
    assert [each for each in found if Version(each) > Version(__version__)] == []


def test_renamed_values_are_marked() -> None:
    """The page of settings says of each renamed value that the old name is deprecated, and which is the new one."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    for (key, old), new in RENAMED.items():
        section = page.split(f"\n## {key}\n")[1].split("\n## ")[0]
        assert re.search(rf"\{{deprecated\}} \S+\n`\"{old}\"` is called `\"{new}\"`", section), key


def test_the_picture_of_the_floors_has_every_room() -> None:
    """The picture and the table of the architecture name each module and folder at the top level of the package."""
    rooms = {name.partition(".")[0] for name in MODULES} - {""}
    table = (ROOT / "docs" / "architecture.md").read_text()
    assert [room for room in sorted(rooms) if f"`{room}.py`" not in table and f"`{room}/`" not in table] == []
    picture = (ROOT / "docs" / "_static" / "layers.svg").read_text()
    assert set(re.findall(r'class="name"[^>]*>([^<]+)<', picture)) == rooms - {"orjson_transcoder"}
