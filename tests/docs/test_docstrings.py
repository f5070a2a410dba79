"""The examples in the docstrings of the package."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from textwrap import dedent

import pytest

from tests.docs.test_examples import README, environment, fill
from tests.source import MODULES, parse

LITERAL = re.compile(r"::\n\n((?: +[^\n]*\n|\n)+)", re.MULTILINE)
BEFORE = """
from bank import Account, Bank, create_app, db, es
from flask_eventsourcing import EventSourcing
from flask_eventsourcing.lifecycle import ApplicationSlot
from flask_eventsourcing.projections import ModelProjection, on


class Balance(db.Model):
    account_id = db.mapped_column(db.Uuid, primary_key=True)
    amount = db.mapped_column(db.Integer)
"""
ON_FLASK = ("extension", "lifecycle", "projections.definitions", "workers.gunicorn")
"""The modules whose examples are about a Flask app, or about none; others need a project of Django or Pyramid."""


def examples() -> Iterator[tuple[str, str]]:
    """Return the examples, each with the name of its module."""
    for name in MODULES:
        for node in ast.walk(parse(name)):
            if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                for found in LITERAL.finditer(f"{ast.get_docstring(node) or ''}\n"):
                    yield name, dedent(found[1])


@pytest.mark.parametrize(("name", "example"), [pytest.param(*each, id=each[0]) for each in examples()])
def test_an_example_is_python(name: str, example: str) -> None:
    """The example of a docstring can be copied into a program."""
    assert ast.parse(example).body, name


def test_examples_run(tmp_path: Path) -> None:
    """The examples of the docstrings about Flask run, after the README's ``bank.py``."""
    fill(tmp_path, README)
    found = [example for name, example in examples() if name in ON_FLASK]
    assert len(found) == len(ON_FLASK)
    (tmp_path / "docstrings.py").write_text("\n".join([BEFORE, *found]))
    command = [sys.executable, "-W", "ignore::ResourceWarning", "docstrings.py"]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
