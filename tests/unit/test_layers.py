"""The layers of the package: who may import whom."""

from __future__ import annotations

import ast
import graphlib
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGE = "flask_eventsourcing"
LAYERS: list[set[str]] = [
    {"exceptions"},
    {"config", "lifecycle", "hot"},
    {"models", "persistence"},
    {"signals", "databases", "session", "binding", "cache", "projections", "records", "repository"},
    {"state", "commands"},
    {"guard", "undo", "cli", "http", "browser", "workers", "testing"},
    {"extension", "pytest_plugin", ""},
]
SIDE = {"cassandra", "contrib", "orjson_transcoder"}
"""May import the layers 0 and 1, and what they adapt."""
ADAPTS = {"contrib.alembic": {"models"}}
FLASK = {"blinker", "click", "flask", "flask_sqlalchemy", "werkzeug"}
REQUIRED = FLASK | {"eventsourcing", "sqlalchemy", "sqlalchemy_utils"}


def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted name within it; the package itself is ``""``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


def parse(name: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(MODULES[name].read_text())


def imports(name: str, *, deferred: bool = True) -> Iterator[str]:
    """Return the absolute names that a module imports; without *deferred*, only when it is imported itself."""
    path = MODULES[name]
    full = f"{PACKAGE}.{name}".rstrip(".")
    package = full if path.name == "__init__.py" else full.rpartition(".")[0]
    for node in _nodes(parse(name), deferred):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield base
            # ``from . import guard`` imports a module; ``from .models import Models`` does not.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _nodes(tree: ast.AST, deferred: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        is_function = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        is_typing = isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        if deferred or not (is_function or is_typing):
            yield from _nodes(node, deferred)


def inner(name: str, *, deferred: bool = True) -> set[str]:
    """Return the package's modules that a module imports."""
    found = set()
    for imported in imports(name, deferred=deferred):
        if imported == PACKAGE or imported.startswith(f"{PACKAGE}."):
            inside = imported.removeprefix(PACKAGE).removeprefix(".")
            if inside in MODULES:
                found.add(inside)
    return found - {name}


def outer(name: str) -> set[str]:
    """Return the other projects that a module imports, by their top-level package."""
    tops = {imported.partition(".")[0] for imported in imports(name)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE}


def room(name: str) -> str:
    """Return the module or package at the top level to which a module belongs."""
    return name.partition(".")[0]


def layer(name: str) -> int:
    """Return the number of a module's layer."""
    return next(number for number, rooms in enumerate(LAYERS) if room(name) in rooms)


MODULES = modules()
INSIDE = [name for name in MODULES if room(name) not in SIDE]


def test_every_module_has_a_layer() -> None:
    """No module stands outside of the layers."""
    assert len(MODULES) > 20
    rooms = {room(name) for name in MODULES}
    assert rooms <= set.union(*LAYERS, SIDE)


@pytest.mark.parametrize("name", INSIDE)
def test_module_imports_only_what_stands_below(name: str) -> None:
    """A module imports from its own layer and those below it, and never from the side rooms."""
    # A package's ``__init__`` is what ``from .. import x`` goes through; it is not what is meant.
    above = {other for other in inner(name) - {""} if room(other) in SIDE or layer(other) > layer(name)}
    assert above == set()


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in SIDE])
def test_side_room_imports_only_the_lowest_layers(name: str) -> None:
    """An adapter imports the two lowest layers, and what it is there to adapt."""
    others = {other for other in inner(name) - {""} if room(other) != room(name)}
    assert {other for other in others if layer(other) > 1} <= ADAPTS.get(name, set())


def test_no_circle() -> None:
    """No modules import each other in a circle, not even in the same layer."""
    graph = {name: inner(name, deferred=False) - _parents(name) for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


def _parents(name: str) -> set[str]:
    # ``from .. import x`` names the package, in whose ``__init__`` everything comes together.
    parts = name.split(".")
    return {".".join(parts[:number]) for number in range(len(parts))}


@pytest.mark.parametrize("name", [name for name in INSIDE if layer(name) < 3])
def test_lower_layers_do_without_flask(name: str) -> None:
    """Lifecycle, models and persistence can be used without Flask."""
    assert outer(name) & FLASK == set()


@pytest.mark.parametrize("name", [name for name in INSIDE if layer(name) < 2])
def test_lowest_layers_do_without_sqlalchemy(name: str) -> None:
    """Errors, configuration and lifecycle need no database."""
    assert outer(name) & {"sqlalchemy", "sqlalchemy_utils"} == set()


def test_optional_dependency_is_imported_in_one_place() -> None:
    """Whatever is not always installed is imported by one room only, the adapter for it."""
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        for project in outer(name) - REQUIRED:
            # Within a side room or ``workers``, each module is an adapter of its own.
            rooms.setdefault(project, set()).add(name if room(name) in {*SIDE, "workers"} else room(name))
    assert {project: names for project, names in rooms.items() if len(names) > 1} == {}
    assert rooms["alembic"] == {"contrib.alembic"}


def test_optional_dependency_is_not_imported_by_the_package() -> None:
    """Importing the package imports nothing that is optional."""
    reached, left = set(), [""]
    while left:
        name = left.pop()
        reached.add(name)
        left += [other for other in inner(name, deferred=False) if other not in reached]
    assert len(reached) > 15
    tops = {i.partition(".")[0] for name in reached for i in imports(name, deferred=False)}
    assert tops - set(sys.stdlib_module_names) - {PACKAGE} <= REQUIRED


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_statement(name: str) -> None:
    """The package behaves the same under ``python -O``: no ``assert`` decides anything."""
    assert [node.lineno for node in ast.walk(parse(name)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("name", MODULES)
def test_module_and_its_functions_are_short(name: str) -> None:
    """A module has at most 400 lines and a function at most 40."""
    assert len(MODULES[name].read_text().splitlines()) <= 400
    functions = (n for n in ast.walk(parse(name)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef))
    long = {f.name: size for f in functions if (size := (f.end_lineno or 0) - f.lineno + 1) > 40}
    # A docstring and a long signature are no code, but the line has to be drawn somewhere.
    assert long == {}
