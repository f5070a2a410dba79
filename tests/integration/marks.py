"""Says on which databases a test runs, where it is not all of them."""

from __future__ import annotations

import pytest

on_files = pytest.mark.parametrize("uri", ["sqlite-file", "postgresql", "mariadb"], indirect=True)
"""Where several connections are needed: not in memory."""
on_a_file_first = pytest.mark.parametrize(
    "uri",
    [
        "sqlite-file",
        pytest.param("postgresql", marks=pytest.mark.long),
        pytest.param("mariadb", marks=pytest.mark.long),
    ],
    indirect=True,
)
"""The same, and on servers in long runs only: what takes long and hardly differs by database."""
on_postgresql = pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
on_mariadb = pytest.mark.parametrize("uri", ["mariadb"], indirect=True)
on_sqlite_file = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)
on_sqlite_memory = pytest.mark.parametrize("uri", ["sqlite-memory"], indirect=True)
on_serial_databases = pytest.mark.parametrize(
    "uri", ["sqlite-file", pytest.param("sqlite-memory", marks=pytest.mark.long), "mariadb"], indirect=True
)
"""Where an error does not end the transaction."""
