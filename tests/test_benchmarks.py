"""The benchmarks run, on whatever is installed."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.contenders import Peer
from benchmarks.field import CONTENDERS, absent, contenders
from benchmarks.report import to_markdown
from benchmarks.results import Results

ROOT = Path(__file__).parent.parent


def run(output: Path, *arguments: str) -> str:
    """Run the command, and return what it prints."""
    command = [sys.executable, "-m", "benchmarks", "--quick", "--output", str(output), *arguments]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_a_quick_run_measures_every_contender_that_is_installed(tmp_path: Path) -> None:
    """A quick run ends with a table of each installed contender, and says which ones are left out."""
    table = run(tmp_path, "--databases", "sqlite", "--only", "commit-1", "--only", "threads-4")
    assert table.strip() == (tmp_path / "benchmarks.md").read_text().strip()
    assert "| commit of 1 event |" in table
    for contender in CONTENDERS:
        if "sqlite" in contender.databases:
            assert contender.title in table
    series = json.loads((tmp_path / "results.json").read_text())["series"]["sqlite"]["commit-1"]
    assert set(series) == {contender.name for contender in contenders("sqlite")}
    assert all(value > 0 for each in series.values() for value in each["values"])


@pytest.mark.long
def test_the_memory_of_a_reader_is_measured_in_a_process_of_its_own(tmp_path: Path) -> None:
    """The memory workload reads the whole log in another process."""
    assert "memory for a log" in run(tmp_path, "--databases", "sqlite", "--only", "memory")


def test_a_contender_that_is_not_installed_is_left_out_with_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without the package of a contender the others are measured, and a line says what is missing."""
    monkeypatch.setattr(Peer, "requires", ("no_such_package",))
    assert Peer not in contenders("sqlite")
    assert absent("sqlite") == ["eventsourcing-sqlalchemy is left out: no_such_package is not installed."]


def test_a_ratio_is_the_median_of_the_ratios_of_each_round() -> None:
    """Ratios compare what was measured in the same round, as a machine's speed changes from round to round."""
    results = Results("two cores", 3, 1.0, {"sqlite": "SQLite 3"}, {"sqlite": {"this": "this", "peer": "peer"}})
    for one, other in ((10, 5), (40, 10), (9, 3)):
        results.add("sqlite", "commit-1", "this", one, 0)
        results.add("sqlite", "commit-1", "peer", other, 1)
    assert "| commit of 1 event | **3.00** (2.00..4.00) |" in to_markdown(results)
    assert "5 (3..10, 3 failed)" in to_markdown(results)


@pytest.mark.long
def test_projections_are_measured_on_a_database() -> None:
    """The benchmark of projections prints the rate of catching up and the latency."""
    command = [sys.executable, "-m", "benchmarks.projections", "--quick", "--databases", "sqlite"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| catching up, events/s | accounts |" in result.stdout
    assert "| latency under 200 commits/s, ms | median |" in result.stdout


@pytest.mark.long
def test_large_saves_are_measured_beside_small_writers() -> None:
    """The benchmark of large saves prints how long small writers waited, and that few positions were lost."""
    command = [sys.executable, "-m", "benchmarks.large_saves", "--quick"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| 1,000 |" in result.stdout


def test_metadata_are_measured_on_a_database() -> None:
    """The benchmark of metadata prints the speed with metadata beside that with NULLs."""
    command = [sys.executable, "-m", "benchmarks.metadata", "--quick", "--databases", "sqlite"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| commit of 100 events | SQLite" in result.stdout


@pytest.mark.parametrize(
    ("module", "shown"),
    [("sessions", "| Flask | one row, insert() |"), ("django_rows", "| Django | one row, create() |")],
)
def test_a_host_is_measured_beside_its_own_commits(module: str, shown: str) -> None:
    """The benchmark of a host prints the rate of events, that of rows, and their ratio."""
    command = [sys.executable, "-m", f"benchmarks.{module}", "--quick", "--databases", "sqlite"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert shown in result.stdout


@pytest.mark.long
def test_saves_in_cassandra_are_measured_beside_the_bare_driver(cassandra_server: str) -> None:
    """The benchmark of Cassandra prints the ratio to conditional inserts for one writer, its threads, and processes."""
    command = [sys.executable, "-m", "benchmarks.cassandra", "--quick", "--nodes", cassandra_server]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert "| 4 processes with 4 threads |" in result.stdout
