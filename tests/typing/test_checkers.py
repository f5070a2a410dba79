"""What type checkers say of a program that uses the package."""

from __future__ import annotations

import ast
import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

import flask_eventsourcing
from flask_eventsourcing import persistence, projections
from tests.servers import require
from tests.source import ROOT

HERE = Path(__file__).parent
RIGHT = [HERE / "bank.py", HERE / "everything.py"]
WRONG = HERE / "wrong.py"
CONFIGURATION = """
[mypy]
strict = true
enable_error_code = deprecated

[mypy-flask_eventsourcing.*]
follow_imports = silent
"""
"""As for a package that is installed: what is found in it is not told."""


def errors(*arguments: object) -> tuple[set[int], str]:
    """Run a type checker; returns the lines of ``wrong.py`` that have errors, and all that it says."""
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    found = re.findall(r"(\w+\.py):(\d+)(?::\d+)?(?: -|:) error", done.stdout)
    assert {name for name, _ in found} <= {WRONG.name}, done.stdout
    return {int(line) for _, line in found}, done.stdout + done.stderr


def wrong_lines() -> set[int]:
    """Return the lines in which there must be an error."""
    lines = WRONG.read_text().splitlines()
    return {number for number, line in enumerate(lines, 1) if line.endswith("# wrong")}


@pytest.mark.xdist_group("checkers")
@pytest.mark.long
def test_mypy(tmp_path: Path) -> None:
    """``mypy --strict`` finds nothing in a program that uses each public name, and every wrong use in another."""
    configuration = tmp_path / "mypy.ini"
    configuration.write_text(CONFIGURATION)
    found, said = errors(
        "mypy", "--config-file", configuration, "--cache-dir", ROOT / ".mypy_cache" / "program", *RIGHT, WRONG
    )
    assert found == wrong_lines(), said


@pytest.mark.xdist_group("checkers")
def test_pyright(tmp_path: Path) -> None:
    """Pyright finds nothing in a program that uses each public name, and every wrong use in another."""
    require(find_spec("pyright"), "pyright", "pip install -e '.[types]'")
    program = tmp_path / "program"
    program.mkdir()
    for path in (HERE / "__init__.py", *RIGHT, WRONG):
        (program / path.name).write_text(path.read_text())
    configuration = tmp_path / "pyrightconfig.json"
    configuration.write_text(json.dumps({"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}))
    found, said = errors("pyright", "--project", configuration, "--pythonpath", sys.executable)
    assert found == wrong_lines(), said


def test_each_public_name_is_used() -> None:
    """The programs that are checked use each name of the package, of its projections and of its recorders."""
    used = {
        alias.name
        for path in RIGHT
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    public = {*flask_eventsourcing.__all__, *projections.__all__, *persistence.__all__} - {"__version__"}
    assert public - used == set()
