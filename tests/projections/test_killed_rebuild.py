"""Rebuilds whose process is killed.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import sqlalchemy as sa

from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.projections.conftest import DATABASES
from tests.projections.rebuilder import make

ROOT = Path(__file__).parents[2]


def start(uri: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a rebuild, or a worker, in a process of its own, and wait until it has begun."""
    command = [sys.executable, "-m", "tests.projections.rebuilder", uri, *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    return process


def survive(uri: str, kills: int) -> None:
    """Kill rebuilds at random points; then one must end, with the right rows and nothing left over."""
    desk = make(uri)
    try:
        ids = [desk.open(*range(1, 30)) for _ in range(10)]
        desk.run_once()
        tables = set(sa.inspect(desk.consumer().application.engine).get_table_names())
        ended = 0
        for number in range(kills):
            with start(uri) as process:
                time.sleep((number + random.random()) * 0.06)
                process.kill()
                ended += process.communicate()[0] == "ended\n"
            assert desk.amounts() == dict.fromkeys(ids, sum(range(1, 30)))
            desk.deposit(ids[0], 1, -1)
            desk.run_once()
        with start(uri) as process:
            assert process.communicate(timeout=120)[0] == "ended\n"
        assert desk.amounts() == dict.fromkeys(ids, sum(range(1, 30)))
        Rebuild(desk.consumer()).drop_old()
        assert set(sa.inspect(desk.consumer().application.engine).get_table_names()) == tables
        assert desk.consumer().of_kind("rebuild").checkpoint.read() is None
        assert ended < kills, "no process was killed before its end"
    finally:
        desk.close()


@pytest.mark.xdist_group("rebuild")
@pytest.mark.parametrize(
    "uri",
    [
        "sqlite-file",
        pytest.param("postgresql", marks=pytest.mark.long),
        pytest.param("mariadb", marks=pytest.mark.long),
    ],
    indirect=True,
)
def test_killed_rebuild_is_taken_up_or_begun_again(uri: str) -> None:
    """A rebuild that is killed many times never shows half of its work, succeeds, and leaves nothing behind."""
    survive(uri, 3)


@pytest.mark.torture
@pytest.mark.parametrize("uri", DATABASES, indirect=True)
def test_killed_at_ten_points(uri: str) -> None:
    """Ten kills at random points are survived in the same way."""
    survive(uri, 10)
