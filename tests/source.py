"""Reads the package's source, for the tests of its floors and of its shape."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from importlib.util import resolve_name
from pathlib import Path

ROOT = Path(__file__).parents[1]
PACKAGE = "flask_eventsourcing"


def modules() -> dict[str, Path]:
    """Return the package's modules by their dotted name within it; the package itself is ``""``."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(part for part in parts if part != "__init__")] = path
    return found


MODULES = modules()


def parse(name: str) -> ast.Module:
    """Return a module's syntax tree."""
    return ast.parse(MODULES[name].read_text())


def imports(name: str, *, typing_too: bool = True) -> Iterator[str]:
    """Return the absolute names that a module imports, in functions too; those for types only if asked for."""
    path = MODULES[name]
    full = f"{PACKAGE}.{name}".rstrip(".")
    package = full if path.name == "__init__.py" else full.rpartition(".")[0]
    for node in _nodes(parse(name), typing_too):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package) if node.level else node.module or ""
            yield base
            # ``from . import cache`` imports a module; ``from .models import Models`` does not.
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _nodes(tree: ast.AST, typing_too: bool) -> Iterator[ast.AST]:
    for node in ast.iter_child_nodes(tree):
        yield node
        if typing_too or not (isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)):
            yield from _nodes(node, typing_too)


def inner(name: str) -> set[str]:
    """Return the package's modules that a module imports when it runs."""
    found = set()
    for imported in imports(name, typing_too=False):
        if imported == PACKAGE or imported.startswith(f"{PACKAGE}."):
            inside = imported.removeprefix(PACKAGE).removeprefix(".")
            if inside in MODULES:
                found.add(inside)
    return found - {name}


def outer(name: str) -> set[str]:
    """Return the other projects that a module imports, by their top-level package."""
    tops = {imported.partition(".")[0] for imported in imports(name)}
    return tops - set(sys.stdlib_module_names) - {PACKAGE}


def parents(name: str) -> set[str]:
    """Return the packages that a module is in, whose ``__init__`` runs before it."""
    parts = name.split(".")
    return {".".join(parts[:number]) for number in range(len(parts))}
