"""The fingerprint of a projection's code, which changes with the code, but not with comments or Python's version."""

from __future__ import annotations

import ast
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ...lifecycle import ProcessLock

PACKAGE = __name__.partition(".")[0]
MOST_EARLIER = 100
"""How many earlier fingerprints are kept."""
RAN = "+"
"""The prefix of the fingerprint of code that ran since the last rebuild, other than the code of the rebuild."""
SIMPLE = (bool, int, float, str, bytes, type(None))

_sources: dict[str, str | None] = {}
_digests: dict[str, str] = {}
_parsing = ProcessLock()
"""Held while a source is parsed: Python has one count of the depth for all threads (gh-106905)."""


def note_sources(cls: type[Any]) -> None:
    """Remember the present source of a class's modules: a deployment may replace the files while the process runs."""
    for module in _modules(cls):
        # Read again, because an application factory or a reload may define a module's classes again.
        _sources[module] = _read_source(module)


def fingerprint_of(cls: type[Any], functions: Iterable[Callable[..., Any]]) -> str:
    """Return the fingerprint of a class: 64 characters.

    It is made of the syntax trees of the modules of its handlers and of its bases outside of this package, and of code
    objects where there is no source.

    :param functions: its handlers.
    """
    modules = {*_modules(cls), *(function.__module__ for function in functions)}
    parts = []
    for module in sorted(modules):
        if module not in _sources:
            _sources[module] = _read_source(module)
        source = _sources[module]
        if source is not None and not _is_source_of(source, cls, module):
            source = None
        parts.append(_digest("code", _code(cls, module)) if source is None else _digest_of_source(source))
    # Two classes may be defined in one module.
    names = [base.__qualname__ for base in _bases(cls)]
    return _digest(*names, *sorted(parts))


def retired(earlier: str | None) -> set[str]:
    """Return those of a checkpoint's earlier fingerprints whose code ran before a rebuild with other code."""
    return {each for each in (earlier or "").split() if not each.startswith(RAN)}


def add_run(earlier: str | None, fingerprint: str) -> str:
    """Return earlier fingerprints with one that runs since the last rebuild."""
    known = (earlier or "").split()
    return " ".join([*(each for each in known if each != RAN + fingerprint), RAN + fingerprint][-MOST_EARLIER:])


def accept(earlier: str | None, fingerprint: str) -> str | None:
    """Return earlier fingerprints without one of them, whose code may run again."""
    return " ".join(each for each in (earlier or "").split() if each != fingerprint) or None


def retire(earlier: str | None, last: str | None, fingerprint: str | None) -> str | None:
    """Return earlier fingerprints after a rebuild by the code of a fingerprint; *last* was that of the one before."""
    known = [each.removeprefix(RAN) for each in (earlier or "").split()]
    others = dict.fromkeys(each for each in (*known, last) if each is not None and each != fingerprint)
    return " ".join(list(others)[-MOST_EARLIER:]) or None


def _bases(cls: type[Any]) -> Iterator[type[Any]]:
    return (base for base in cls.__mro__ if base is not object and base.__module__.partition(".")[0] != PACKAGE)


def _modules(cls: type[Any]) -> set[str]:
    return {base.__module__ for base in _bases(cls)}


def _read_source(module: str) -> str | None:
    found = sys.modules.get(module)
    if found is None:
        return None
    try:
        source = inspect.getsource(found)
        _parse(source)
    except (OSError, TypeError, SyntaxError):
        return None
    return source


def _parse(source: str) -> ast.Module:
    with _parsing:
        try:
            return ast.parse(source)
        except SystemError:
            # Another thread has parsed something meanwhile, as the import of a module may.
            return ast.parse(source)


def _is_source_of(source: str, cls: type[Any], module: str) -> bool:
    """Whether a source, which may have been replaced during the import, has the functions of a class."""
    file = getattr(sys.modules.get(module), "__file__", None)
    compiled: dict[str, types.CodeType] = {}
    left = [compile(source, "", "exec", dont_inherit=True)]
    while left:
        code = left.pop()
        compiled[code.co_qualname] = code
        left += [each for each in code.co_consts if isinstance(each, types.CodeType)]
    functions = [value for base in _bases(cls) if base.__module__ == module for value in vars(base).values()]
    codes = [found for each in functions if isinstance(found := getattr(each, "__code__", None), types.CodeType)]
    return all(
        each.co_qualname in compiled and list(_code_parts(each)) == list(_code_parts(compiled[each.co_qualname]))
        for each in codes
        # A function that a decorator of another module, or ``dataclass``, has made does not count.
        if each.co_filename == file
    )


def _digest(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode("utf-8", "backslashreplace")).hexdigest()


def _digest_of_source(source: str) -> str:
    found = _digests.get(source)
    if found is None:
        found = _digests[source] = _digest(*_tree(_parse(source)))
    return found


def _tree(node: ast.AST) -> Iterator[str]:
    """Yield the parts of a syntax tree that are the same in every version of Python."""
    yield f"({type(node).__name__}"
    for name, value in ast.iter_fields(node):
        # Earlier versions leave out an empty field, or do not know it.
        if name in ("ctx", "kind", "type_comment", "type_ignores") or value is None or value == []:
            continue
        yield name
        for each in value if isinstance(value, list) else [value]:
            if isinstance(each, ast.AST):
                if not _is_comment(each):
                    yield from _tree(each)
            else:
                yield f"{type(each).__name__} {each!r}"
    yield ")"


def _is_comment(node: ast.AST) -> bool:
    """Whether a node is a string on its own, such as a docstring."""
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def _code(cls: type[Any], module: str) -> str:
    """Return the names, code and values of the classes of a module without source."""
    parts: list[str] = []
    for base in _bases(cls):
        if base.__module__ != module:
            continue
        for name, value in sorted(vars(base).items()):
            function = getattr(value, "__func__", value)
            code = getattr(function, "__code__", None)
            if isinstance(code, types.CodeType):
                parts += (name, *_code_parts(code))
            elif isinstance(value, SIMPLE) and name not in ("__doc__", "__module__", "__firstlineno__"):
                parts.append(f"{name} {value!r}")
    return "\n".join(parts)


def _code_parts(code: types.CodeType) -> Iterator[str]:
    yield f"{code.co_name} {code.co_code.hex()} {code.co_names!r} {code.co_varnames!r} {code.co_freevars!r}"
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _code_parts(constant)
        elif isinstance(constant, frozenset):
            # Its order differs in every process.
            yield repr(sorted(map(repr, constant)))
        else:
            yield repr(constant)
