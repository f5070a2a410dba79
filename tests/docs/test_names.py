"""The documentation names what there is."""

from __future__ import annotations

import re
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.docs.pages import PAGES, ROOT

NAME = re.compile(r"\bflask_eventsourcing(?:\.\w+)+")
LINK = re.compile(r"\]\((?P<path>[^)#:\s]+)(?:#[^)\s]*)?\)")


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
