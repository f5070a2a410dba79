"""The floors of the package: what each may import, and that each runs with everything above it blocked."""

from __future__ import annotations

import graphlib
import subprocess
import sys

import pytest

from tests.source import MODULES, PACKAGE, ROOT, imports, inner, outer, parents

FLOORS: list[set[str]] = [
    {"_patches", "exceptions", "failures", "signals"},
    {"config", "lifecycle", "metadata", "tailing"},
    {"models", "persistence"},
    {"uow"},
    {"applications", "host", "orjson_transcoder", "projections"},
    {"commands", "web"},
    {"cli", "testing", "workers"},
    {"extension", "pytest_plugin"},
]
WINGS = {"contrib", "cassandra"}
"""Rooms beside the floors."""
HOST_SIDE = {"applications", "commands", "host", "models", "persistence", "projections", "uow"}
ADAPTERS: dict[str, set[str]] = {
    "contrib": set(),
    "contrib.alembic": {"models"},
    "contrib.django": HOST_SIDE,
    "contrib.pyramid": HOST_SIDE,
    "contrib.zope": HOST_SIDE,
    "cassandra": set(),
}
"""What stands in a wing, each with what it may import above floor 1; Pyramid's is built on Zope's."""
FLASK = {"click", "flask", "flask_sqlalchemy", "flask_sqlalchemy_lite", "werkzeug"}
SQLALCHEMY = {"sqlalchemy", "sqlalchemy_utils"}
REQUIRED = (
    FLASK | SQLALCHEMY | {"blinker", "eventsourcing", "typing_extensions", "uuid_utils"} - {"flask_sqlalchemy_lite"}
)
FLASK_SIDE = {"cli", "extension", "web", "workers"}


def room(name: str) -> str:
    """Return the module or package at the top level to which a module belongs."""
    return name.partition(".")[0]


def adapter(name: str) -> str:
    """Return the part of a wing to which a module belongs."""
    return ".".join(name.split(".")[: 1 if room(name) == "cassandra" else 2])


def floor(name: str) -> int:
    """Return the number of a module's floor."""
    return next(number for number, rooms in enumerate(FLOORS) if room(name) in rooms)


INSIDE = [name for name in MODULES if name and room(name) not in WINGS]
BELOW_FLASK = [name for name in INSIDE if room(name) not in FLASK_SIDE | {"orjson_transcoder"}]

IMPORT_BLOCKED = """
import importlib, sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in OUTER or any(name == each or name.startswith(each + ".") for each in INNER):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
for name in NAMES:
    importlib.import_module(name)
blocked = [name for name in sys.modules if name.partition(".")[0] in OUTER]
sys.exit(f"imported: {blocked}" if blocked else 0)
"""


def import_blocked(names: list[str], inside: list[str], outside: set[str]) -> None:
    """Import modules in a process of its own, in which others cannot be imported."""
    values = f"NAMES = {names!r}\nINNER = {inside!r}\nOUTER = {sorted(outside)!r}\n"
    done = subprocess.run(
        [sys.executable, "-c", values + IMPORT_BLOCKED], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_module_has_a_floor() -> None:
    """No module stands outside of the floors and wings."""
    assert len(MODULES) > 20
    assert {room(name) for name in MODULES if name} <= set.union(*FLOORS, WINGS)


@pytest.mark.parametrize("name", INSIDE)
def test_module_imports_only_what_stands_below(name: str) -> None:
    """A module imports from its own floor and those below it, and never from the wings."""
    # A package's ``__init__`` is what ``from .. import x`` goes through; it is not what is meant.
    above = {other for other in inner(name) - {""} if room(other) in WINGS or floor(other) > floor(name)}
    assert above == set()


@pytest.mark.parametrize("name", [name for name in MODULES if room(name) in WINGS])
def test_wing_imports_only_what_it_may(name: str) -> None:
    """An adapter imports the two lowest floors, and what it is there to adapt."""
    others = {room(other) for other in inner(name) - {""} if room(other) != room(name)}
    assert {other for other in others if floor(other) > 1} <= ADAPTERS[adapter(name)]
    within = {adapter(other) for other in inner(name) - {""} if room(other) == room(name)}
    assert within - {room(name), adapter(name)} <= ({"contrib.zope"} if adapter(name) == "contrib.pyramid" else set())


def test_no_circle() -> None:
    """No modules import each other in a circle, neither when they are imported nor in a function that runs later."""
    graph = {name: inner(name) - parents(name) for name in MODULES}
    order = list(graphlib.TopologicalSorter(graph).static_order())
    assert set(order) == set(MODULES)


@pytest.mark.parametrize("number", range(len(FLOORS)))
def test_floor_runs_without_those_above(number: int) -> None:
    """Each floor can be imported where everything above it is missing."""
    names = [f"{PACKAGE}.{name}" for name in INSIDE if floor(name) == number and not _is_adapter(name)]
    above = sorted({f"{PACKAGE}.{room(name)}" for name in INSIDE if floor(name) > number} | {f"{PACKAGE}.contrib"})
    outside = FLASK | (SQLALCHEMY if number < 2 else set()) if number < 5 else set()
    import_blocked(names, above, outside)


def test_everything_below_the_flask_side_runs_without_flask() -> None:
    """Persistence, units of work, applications, projections and commands can be imported where Flask is missing."""
    names = [f"{PACKAGE}.{name}" for name in BELOW_FLASK]
    import_blocked(names, [f"{PACKAGE}.{each}" for each in sorted(FLASK_SIDE)], FLASK)


def _is_adapter(name: str) -> bool:
    # It imports what is not always installed, and has tests of its own.
    return name == "orjson_transcoder" or name.startswith("workers.")


@pytest.mark.parametrize("name", BELOW_FLASK)
def test_nothing_below_the_flask_side_names_flask(name: str) -> None:
    """What can be used without Flask does not even import it for its types."""
    assert outer(name) & FLASK == set()


@pytest.mark.parametrize("name", [name for name in INSIDE if floor(name) < 2])
def test_lowest_floors_do_without_sqlalchemy(name: str) -> None:
    """Errors, configuration and lifecycle need no database."""
    assert outer(name) & SQLALCHEMY == set()


def test_optional_dependency_is_imported_in_one_place() -> None:
    """Whatever is not always installed is imported by one room only, the adapter for it."""
    rooms: dict[str, set[str]] = {}
    for name in MODULES:
        for project in outer(name) - REQUIRED:
            # Within ``workers`` each module is an adapter of its own, within a wing each package too.
            known = adapter(name) if room(name) in WINGS else name if room(name) == "workers" else room(name)
            rooms.setdefault(project, set()).add(known)
    assert {project: names for project, names in rooms.items() if len(names) > 1} == {}
    assert rooms["alembic"] == {"contrib.alembic"}


def test_optional_dependency_is_not_imported_by_the_package() -> None:
    """Importing the extension imports nothing that is optional."""
    reached, left = set(), ["extension"]
    while left:
        name = left.pop()
        reached.add(name)
        left += [other for other in inner(name) if other not in reached]
    assert len(reached) > 15
    tops = {i.partition(".")[0] for name in reached for i in imports(name, typing_too=False)}
    assert tops - set(sys.stdlib_module_names) - {PACKAGE} <= REQUIRED


def test_rooms_of_projections() -> None:
    """The rooms of ``projections/`` stand in an order, with fewer than 35 arrows between them."""

    def inner_room(name: str) -> str:
        return name.split(".")[1]

    names = [name for name in MODULES if name.startswith("projections.")]
    arrows = {
        (inner_room(name), inner_room(other))
        for name in names
        for other in inner(name)
        if other.startswith("projections.") and inner_room(other) != inner_room(name)
    }
    graphlib.TopologicalSorter({one: {b for a, b in arrows if a == one} for one, _ in arrows}).prepare()
    assert 0 < len(arrows) < 35


@pytest.mark.parametrize("name", [name for name in MODULES if adapter(name) in ("contrib.pyramid", "contrib.zope")])
def test_host_without_flask_names_no_flask(name: str) -> None:
    """The hosts for Zope's transactions and for Pyramid do not even import Flask for its types."""
    assert outer(name) & FLASK == set()


def test_hosts_run_without_flask() -> None:
    """They can be imported where Flask and everything of its side is missing, Zope's without Pyramid."""
    flask_side = [f"{PACKAGE}.{each}" for each in sorted(FLASK_SIDE)]
    names = {each: [f"{PACKAGE}.{n}" for n in MODULES if adapter(n) == each] for each in ADAPTERS}
    import_blocked(names["contrib.zope"], flask_side, FLASK | {"pyramid", "webob"})
    import_blocked(names["contrib.pyramid"], flask_side, FLASK)


def test_cassandra_runs_without_flask_and_sqlalchemy() -> None:
    """The persistence in Cassandra can be imported where both are missing."""
    pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")
    names = [f"{PACKAGE}.{n}" for n in MODULES if adapter(n) == "cassandra"]
    above = [f"{PACKAGE}.{each}" for number, rooms in enumerate(FLOORS) for each in sorted(rooms) if number > 1]
    import_blocked(names, above, FLASK | SQLALCHEMY)
