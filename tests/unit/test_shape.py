"""The shape of the package: how large its parts are, and where things may stand."""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from tests.source import MODULES, PACKAGE, ROOT, parse

BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.BoolOp, ast.IfExp, ast.comprehension, ast.match_case)
DJANGO_NAMES = {
    f"contrib.django.{each}" for each in ("admin", "apps", "management.commands", "models", "projections", "testing")
}
TOP_LEVEL = {
    "",
    "_patches",
    "config",
    "exceptions",
    "extension",
    "failures",
    "host",
    "lifecycle",
    "models",
    "orjson_transcoder",
    "signals",
    "tailing",
}
DATABASE = re.compile(
    r"sqlite|postgres|psycopg|mysql|mariadb|galera|\bpg_\w+"
    r"|\b(40001|40P01|23505|55P03|25006|57014|1062|1205|1213|1290|1020|1047)\b",
    re.IGNORECASE,
)
NAMES_A_DATABASE = {
    # Configuration keys, with what they are passed on to.
    "config": {"postgres_order", "postgres_notify", "sqlite_wal", "PostgresOrder", "POSTGRES_ORDER"},
    # An attribute of Django's.
    "contrib.django.record_fields": {"mysql_is_mariadb", "is_mariadb"},
    "web.sessions": {"sqlite:///eventsourcing.db"},
    "web.setup": {"postgres_order", "postgres_notify", "sqlite_wal"},
}
"""Where a database is named outside of its own file, and how."""
BROAD = {"Exception", "BaseException"}
ROWS = {
    "CassandraSettings",
    "CheckpointRow",
    "Config",
    "DeadLetter",
    "JournalEvent",
    "ProjectionStatus",
    "Row",
    "Statements",
}
"""Values with a field for each column, setting or figure that a user sees."""


def functions(name: str) -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Return the functions of a module."""
    return [n for n in ast.walk(parse(name)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def fields(node: ast.ClassDef) -> set[str]:
    """Return the names of what a class keeps: dataclass fields, and what is assigned to ``self``."""
    found = set()
    is_data = any("dataclass" in ast.unparse(each) for each in node.decorator_list) or any(
        "NamedTuple" in ast.unparse(base) for base in node.bases
    )
    for each in node.body:
        if is_data and isinstance(each, ast.AnnAssign) and "ClassVar" not in ast.unparse(each.annotation):
            found.add(ast.unparse(each.target))
    for part in ast.walk(node):
        found |= _assigned(part)
    return found


def _assigned(node: ast.AST) -> set[str]:
    targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
    parts = [part for target in targets if isinstance(target, ast.AST) for part in ast.walk(target)]
    return {p.attr for p in parts if isinstance(p, ast.Attribute) and ast.unparse(p.value) == "self"}


def test_there_are_few_modules() -> None:
    """The package has at most 170 modules."""
    # Five of them are about the swap of a rebuild: what catalogs say is as much as a database's file can hold.
    assert len(MODULES) <= 170


def test_no_two_modules_have_one_name() -> None:
    """Each module has a name of its own."""
    # Django looks for some by their names, which are those of its own habits; a projection has workers as a server has.
    found = [name for name in MODULES if name not in DJANGO_NAMES and name != "projections.workers"]
    counted = Counter(name.rpartition(".")[2] for name in found)
    assert {name: count for name, count in counted.items() if count > 1} == {}


def test_top_level_has_only_what_users_import() -> None:
    """Everything else is in a folder."""
    packages = {name for name, path in MODULES.items() if path.name == "__init__.py"}
    assert {name for name in MODULES if "." not in name} - packages | {""} == TOP_LEVEL


@pytest.mark.parametrize("name", MODULES)
def test_no_assert_statement(name: str) -> None:
    """The package behaves the same under ``python -O``: no ``assert`` decides anything."""
    assert [node.lineno for node in ast.walk(parse(name)) if isinstance(node, ast.Assert)] == []


@pytest.mark.parametrize("name", MODULES)
def test_module_and_its_functions_are_short(name: str) -> None:
    """A module has at most 400 lines and a function at most 40, of at most 12 branches."""
    assert len(MODULES[name].read_text().splitlines()) <= 400
    # A docstring and a long signature are no code, but the line has to be drawn somewhere.
    assert {f.name: s for f in functions(name) if (s := (f.end_lineno or 0) - f.lineno + 1) > 40} == {}
    complexity = {f.name: 1 + sum(isinstance(child, BRANCHES) for child in ast.walk(f)) for f in functions(name)}
    assert {function: number for function, number in complexity.items() if number > 12} == {}


def test_places_that_catch_every_error_are_few() -> None:
    """At most ten places go on after any error, or raise another one: those that call what a user has written."""
    # Three have an except of their own, and seven use Kept.
    assert len(found := sorted(catching())) <= 10, found


def test_broad_excepts_are_few() -> None:
    """At most three of the places that catch every error have an ``except`` of their own."""
    # One of them is telling(), the block in which handlers of projections are called.
    assert len(found := [each for each in sorted(catching()) if each.endswith("except")]) <= 3, found


@pytest.mark.parametrize("room", ["extension", "config", "lifecycle", "models", "web", "cli", "commands"])
def test_no_broad_except_where_no_code_of_a_user_is_called(room: str) -> None:
    """The Flask side and the commands catch the errors that they know; the one exception is what Flask does, too."""
    found = [each for each in catching() if each.startswith((f"{room}.", f"{room}:"))]
    # An error at the end of a request goes to the user's error handlers, as one in a view does.
    assert len(found) == (1 if room == "web" else 0), found


def catching() -> Iterator[str]:
    """Return the places that catch every error: by an ``except``, or by a block of ``failures`` or ``contextlib``."""
    for name in MODULES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.ExceptHandler) and _is_broad(node.type):
                yield f"{name}:{node.lineno} except"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "Kept":
                yield f"{name}:{node.lineno} {ast.unparse(node.func)}"
            elif isinstance(node, ast.Call) and ast.unparse(node.func) == "suppress":
                yield from (f"{name}:{node.lineno} suppress" for each in node.args if _is_broad(each))


def _is_broad(caught: ast.expr | None) -> bool:
    return caught is None or bool(BROAD & set(ast.unparse(caught).strip("()").split(", ")))


@pytest.mark.parametrize("name", MODULES)
def test_class_has_few_fields(name: str) -> None:
    """A class keeps at most eight things; only rows have as many as their table."""
    classes = [node for node in ast.walk(parse(name)) if isinstance(node, ast.ClassDef) and node.name not in ROWS]
    assert {node.name: sorted(found) for node in classes if len(found := fields(node)) > 8} == {}


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("persistence.dialects")])
def test_database_is_named_in_its_own_file_only(name: str) -> None:
    """What differs by database stands in that database's file, so that a new one is one file and one line."""
    text = MODULES[name].read_text()
    for allowed in sorted(NAMES_A_DATABASE.get(name, ()), key=len, reverse=True):
        text = text.replace(allowed, "")
    found = [(text[: match.start()].count("\n") + 1, match[0]) for match in DATABASE.finditer(text)]
    assert found == []


def test_one_module_changes_foreign_objects() -> None:
    """Objects of other projects are changed in one module, with the reason and what would let it go."""
    written = {
        f"{name}:{node.lineno}"
        for name in MODULES
        if name != "_patches"
        for node in ast.walk(parse(name))
        if (isinstance(node, ast.Attribute) and node.attr == "__class__" and isinstance(node.ctx, ast.Store))
        or (isinstance(node, ast.Call) and ast.unparse(node.func) in ("setattr", "vars.update", "delattr"))
        or (isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del) and _is_vars(node.value))
    }
    assert written == set()
    documented = [node for node in parse("_patches").body if isinstance(node, ast.FunctionDef)]
    assert [node.name for node in documented if "can go" not in (ast.get_docstring(node) or "")] == []


def _is_vars(node: ast.expr) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == "vars"


def test_package_is_where_it_is_looked_for() -> None:
    """The checks above read the package that is imported."""
    assert (ROOT / PACKAGE / "__init__.py").exists()
