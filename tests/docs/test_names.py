"""The documentation names what there is."""

from __future__ import annotations

import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from inspect import getdoc
from itertools import takewhile
from pathlib import Path
from pkgutil import resolve_name
from types import FunctionType

import pytest
from packaging.version import Version

from flask_eventsourcing import __version__
from flask_eventsourcing.commands.listing import COMMANDS
from flask_eventsourcing.commands.parsing import add_commands
from flask_eventsourcing.config import RENAMED
from tests.docs.pages import PAGES, ROOT, blocks
from tests.source import MODULES, PACKAGE

NAME = re.compile(r"\bflask_eventsourcing(?:\.\w+)+")
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?:#[^)\s]*)?\)")
AUTO = re.compile(r"\.\. auto(?:class|function|method|exception|data):: (?P<name>\S+)|\.\. data:: (?P<data>\S+)")
COMMAND = re.compile(
    r"(?P<start>^\$ |`)(?:python )?(?:(?:flask(?: --app \S+)?|manage\.py) eventsourcing|pyramid-eventsourcing \S+) "
    r"(?P<words>\w[^`\n]*)",
    re.MULTILINE,
)
"""A command of the package in a line of a terminal, or within a sentence, where its arguments may be left out."""
FIELDS = re.compile(r"^:(param|raises|return).*\n?(^ +.*\n?)*", re.MULTILINE)
"""The lines of a docstring that describe arguments, errors and the return value."""
SENTENCE = re.compile(r"[.!?:](?=\s|$)")


SOURCE_IMPORT = re.compile(
    r"^ *from (?P<module>flask_eventsourcing[\w.]*) import (?P<names>\([^)]*\)|[^\n]*)", re.MULTILINE
)
DJANGO = f"{PACKAGE}.contrib.django"
if find_spec("django"):
    # Its models can be imported only where there are settings.
    import_module("tests.django_host.project")


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
        except LookupError:
            # Django's admin is not installed here.
            return True
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
    assert [name for name in NAME.findall(text) if not exists(name)] == []
    paths = [page.parent / found["path"] for found in LINK.finditer(text)]
    assert [path.relative_to(ROOT) for path in paths if not path.exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_leaves_its_contents_to_the_theme(page: Path) -> None:
    """A page shows no error: the theme lists the sections itself, and puts one in the place of a second list."""
    assert "{contents}" not in page.read_text()


def on_api_page() -> Iterator[tuple[str, str]]:
    """Return the full names on the page on the API, each with the options of its directive."""
    module = PACKAGE
    lines = (ROOT / "docs" / "api.md").read_text().splitlines()
    for number, line in enumerate(lines):
        if line.startswith(".. currentmodule:: "):
            module = line.split()[-1]
        elif directive := AUTO.match(line):
            name = directive["name"] or directive["data"]
            options = takewhile(lambda each: each.startswith("   :"), lines[number + 1 :])
            yield name if name.startswith(f"{PACKAGE}.") else f"{module}.{name}", "\n".join(options)


def documented() -> Iterator[tuple[str, object]]:
    """Return what the page on the API shows of classes and functions, with the members that it shows of classes."""
    for name, options in on_api_page():
        if name.startswith(DJANGO) and (not find_spec("django") or name.startswith(f"{DJANGO}.admin")):
            # The admin can be imported only where it is installed.
            continue
        found = resolve_name(name)
        if isinstance(found, type | FunctionType):
            yield name, found
        if isinstance(found, type) and ":members:" in options:
            option = next(each for each in options.splitlines() if ":members:" in each)
            yield from ((f"{name}.{each}", member) for each, member in members(found, option))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_an_example_imports_is_on_the_api_page(page: Path) -> None:
    """Every class and function of the package that an example imports is on the page on the API."""
    shown = dict(on_api_page())
    found = [each for block in blocks(page, "python") for each in imported(block.code)]
    # A name that can be imported from two places is shown at one of them.
    last = {name.rpartition(".")[2] for name in shown}
    assert [name for name in found if name not in shown and name.rpartition(".")[2] not in last] == []


def imported(code: str) -> Iterator[str]:
    """Return the names that lines of a program import from the package, except for modules."""
    for line in SOURCE_IMPORT.finditer(code):
        names = line["names"].strip("()").replace("\n", " ").split(",")
        for name in (each.split(" as ")[0].strip() for each in names):
            if name and f"{line['module']}.{name}".removeprefix(f"{PACKAGE}.") not in MODULES:
                yield f"{line['module']}.{name}"


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
    """The page of settings says of a renamed value which is the new name, and which version ends the old one."""
    page = (ROOT / "docs" / "configuration.md").read_text()
    for (key, old), (new, end) in RENAMED.items():
        section = page.split(f"\n## {key}\n")[1].split("\n## ")[0]
        mark = re.search(rf"\{{deprecated\}} (?P<since>\S+)\n`\"{old}\"` is called `\"{new}\"`", section)
        assert mark is not None, key
        assert f"will be removed in {end}." in section[mark.end() :], key
        since = Version(mark["since"])
        assert (since.major, since.minor + 2) == Version(end).release, "an old name is accepted for two minor versions"


def test_an_old_name_ends_when_it_was_said_to() -> None:
    """No old value of a setting is accepted any more in the version that the warning about it names."""
    assert [old for (_, old), (_, end) in RENAMED.items() if Version(__version__) >= Version(end)] == []


def test_the_picture_of_the_floors_has_every_room() -> None:
    """The picture and the table of the architecture name each module and folder at the top level of the package."""
    rooms = {name.partition(".")[0] for name in MODULES} - {""}
    table = (ROOT / "docs" / "architecture.md").read_text()
    assert [room for room in sorted(rooms) if f"`{room}.py`" not in table and f"`{room}/`" not in table] == []
    picture = (ROOT / "docs" / "_static" / "layers.svg").read_text()
    assert set(re.findall(r'class="name"[^>]*>([^<]+)<', picture)) == rooms - {"orjson_transcoder"}


TERM = re.compile(r"\{term\}`(?:[^`<]*<)?(?P<word>[^`>]+)>?`")


def test_glossary_and_pages_fit() -> None:
    """Each word that a page links to the glossary is there, and each word there is linked from a page."""
    glossary = ROOT / "docs" / "glossary.md"
    words = set(re.findall(r"^(?=\w)([^\n]+)\n    ", glossary.read_text().split("```{glossary}")[1], re.MULTILINE))
    linked = {each["word"] for page in PAGES if page != glossary for each in TERM.finditer(page.read_text())}
    assert linked == words


def test_glossary_is_in_alphabetical_order() -> None:
    """A reader finds a word of the glossary where the alphabet has it."""
    text = (ROOT / "docs" / "glossary.md").read_text()
    words = re.findall(r"^(?=\w)([^\n]+)\n    ", text.split("```{glossary}")[1], re.MULTILINE)
    assert words == sorted(words)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_are_those_of_the_list(page: Path) -> None:
    """Every command that a page shows exists, with the options that it is shown with."""
    parser = ArgumentParser()
    parser.add_argument("--database")
    add_commands(parser, COMMANDS)
    known = dict(COMMANDS.paths())
    for found in COMMAND.finditer(page.read_text()):
        words = shlex.split(found["words"], comments=True)
        if found["start"] == "$ ":
            parser.parse_args(words)
            continue
        name = next((" ".join(words[:count]) for count in (2, 1) if " ".join(words[:count]) in known), None)
        assert name or any(each.startswith(" ".join(words) + " ") for each in known), found[0]
        options = {each.name for each in known[name].parameters} if name else set()
        assert {word for word in words if word.startswith("--")} <= options | {"--database"}, found[0]
