"""What a short run leaves out."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import length

TESTS = """
import pytest

@pytest.mark.parametrize("database", ["sqlite", pytest.param("oracle", marks=pytest.mark.long)])
def test_database(database): pass

@pytest.mark.long
def test_again(): pass

def test_once(): pass
"""


@pytest.mark.parametrize(
    ("workers", "variables", "passed"),
    [("2", {}, 2), ("0", {"LONG": "1"}, 4), pytest.param("2", {"LONG": "1", "REQUIRE_SERVERS": "1"}, 4)],
)
def test_long_tests(workers: str, variables: dict[str, str], passed: int, tmp_path: Path) -> None:
    """A run leaves out the long tests and says in one line how many and how they run, or runs all if it is asked to."""
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = long\n")
    env = {name: value for name, value in os.environ.items() if name not in ("LONG", "REQUIRE_SERVERS")}
    command = [sys.executable, "-m", "pytest", "-p", "tests.conftest", "-n", workers, "-p", "no:cacheprovider"]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        env={**env, **variables, "PYTHONPATH": str(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{passed} passed" in done.stdout
    assert ("2 long tests were left out: 'make test LONG=1' runs them too." in done.stdout.splitlines()) == (
        passed == 2
    )


def test_a_part_of_the_long_tests_is_drawn_where_all_servers_are(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run with all servers has about a quarter of the long tests, the same in each of its processes."""
    monkeypatch.setattr(length, "IS_WHOLE", False)
    monkeypatch.setattr(length, "IS_LONG", True)
    tests = [f"tests/test_some.py::test_case[{number}]" for number in range(1000)]
    first, second = ([each for each in tests if length.is_drawn(each, run)] for run in ("first", "second"))
    assert 150 < len(first) < 350
    assert first != second
    assert first == [each for each in tests if length.is_drawn(each, "first")]
