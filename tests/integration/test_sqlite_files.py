"""SQLite files that cannot be in the journal mode WAL, or not now, are used as they are, and a warning says so.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import OperationalError

from flask_eventsourcing import ConfigurationError, WriteTimeoutError
from tests.bank import Site, make_site

WARNS = "cannot be switched to the journal mode WAL"


@contextmanager
def site_on(url: str, **config: Any) -> Iterator[Site]:
    """Make a site, and close it."""
    made = make_site(url, create=False, **{"EVENTSOURCING_LOCK_TIMEOUT": 1, **config})
    try:
        yield made
    finally:
        made.close()


def use(site: Site) -> str:
    """Make the tables, open an account, and return the journal mode."""
    with site.app.app_context():
        site.db.create_all()
    site.opened()
    with site.app.app_context():
        return str(site.db.session.scalar(sa.text("PRAGMA journal_mode")))


def run(path: Path, *statements: str) -> None:
    """Run statements as another program does."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for statement in statements:
            connection.execute(statement).close()


@contextmanager
def no_shared_memory(path: Path) -> Iterator[None]:
    """Have SQLite fail to open a file's shared memory, as on a file system that has none."""
    link = path.with_name(f"{path.name}-shm")
    # SQLite follows none there.
    link.symlink_to(path.with_name("nothing"))
    try:
        yield
    finally:
        link.unlink()


def test_a_file_is_switched(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file is in the mode WAL from the first connection on, and keeps its mode if the setting says so."""
    with site_on(f"sqlite:///{tmp_path / 'bank.db'}") as site:
        assert use(site) == "wal"
    with site_on(f"sqlite:///{tmp_path / 'other.db'}", EVENTSOURCING_SQLITE_WAL=False) as site:
        assert use(site) == "delete"
    assert caplog.messages == []


@pytest.mark.parametrize("vfs", ["unix-none", "unix-dotfile"])
def test_a_file_system_without_shared_memory(tmp_path: Path, vfs: str, caplog: pytest.LogCaptureFixture) -> None:
    """Where SQLite knows that WAL cannot work, the file is used without it, with one warning that names the setting."""
    url = f"sqlite:///file:{tmp_path}/bank.db?vfs={vfs}&uri=true"
    with site_on(url, SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.pool.NullPool}) as site:
        assert use(site) == "delete"
    assert [message.count(WARNS) for message in caplog.messages] == [1]
    assert "EVENTSOURCING_SQLITE_WAL = False" in caplog.text


@pytest.mark.parametrize("wal", [True, False])
@pytest.mark.parametrize("before", ["new", "delete", "wal"])
def test_shared_memory_that_cannot_be_had(
    tmp_path: Path, before: str, wal: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """A switch to WAL that does not work is undone, and so is an earlier one, whether WAL is wanted or not."""
    path = tmp_path / "bank.db"
    if before != "new":
        run(path, f"PRAGMA journal_mode = {before}", "CREATE TABLE ours (a)", "INSERT INTO ours VALUES (1)")
    with no_shared_memory(path):
        with site_on(f"sqlite:///{path}", EVENTSOURCING_SQLITE_WAL=wal) as site:
            assert use(site) == "delete"
            assert site.stored()[0] == 1
        taken_back = wal or before == "wal"
        assert [WARNS in message for message in caplog.messages] == [True] * taken_back
    if before != "new":
        with closing(sqlite3.connect(path)) as connection, closing(connection.execute("SELECT a FROM ours")) as rows:
            assert rows.fetchall() == [(1,)]


def test_a_mode_that_cannot_be_taken_back(tmp_path: Path) -> None:
    """A file in the mode WAL that others use where it works is refused where it does not, with the remedy."""
    path = tmp_path / "bank.db"
    url = f"sqlite:///file:{path}?mode=ro&uri=true"
    run(path, "PRAGMA journal_mode = WAL", "CREATE TABLE ours (a)")
    says = pytest.raises(ConfigurationError, match=r"bank\.db.*cannot be taken back.*EVENTSOURCING_SQLITE_WAL")
    with no_shared_memory(path), site_on(url) as site, site.app.app_context(), says:
        site.db.session.scalar(sa.text("SELECT count(*) FROM ours"))


def test_a_reader_in_the_way(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """With another program's reader on the file only the first connection waits for it, and then it works without WAL.

    A commit that the reader is in the way of says so, and when the reader is gone the switch is made.
    """
    path = tmp_path / "bank.db"
    with site_on(f"sqlite:///{path}", EVENTSOURCING_SQLITE_WAL=False) as site:
        use(site)
    options = {"poolclass": sa.pool.NullPool}
    with site_on(f"sqlite:///{path}", SQLALCHEMY_ENGINE_OPTIONS=options) as site:
        with closing(sqlite3.connect(path, isolation_level=None)) as reader:
            reader.execute("BEGIN").close()
            with closing(reader.execute("SELECT count(*) FROM bank_events")) as rows:
                rows.fetchall()
            assert site.stored()[0] == 1
            began = time.monotonic()
            for _ in range(20):
                assert site.stored()[0] == 1
            # Twenty times the timeout, if each waited.
            assert time.monotonic() - began < 10
            with site.app.app_context():
                site.bank.open_account()
                with pytest.raises(
                    WriteTimeoutError, match=r"another program reads the file.*EVENTSOURCING_SQLITE_WAL"
                ):
                    site.db.session.commit()
                site.db.session.rollback()
            assert len(caplog.messages) == 1
            assert "others use it" in caplog.text
        assert use(site) == "wal"
        assert site.stored()[0] == 2


@pytest.mark.parametrize("before", ["delete", "wal"])
@pytest.mark.parametrize("how", ["mode=ro", "immutable=1"])
def test_a_file_that_is_opened_to_be_read(
    tmp_path: Path, before: str, how: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A file that is opened to be read is read at once, in whatever mode it is, and no warning is written."""
    path = tmp_path / "bank.db"
    with site_on(f"sqlite:///{path}") as site:
        use(site)
    run(path, f"PRAGMA journal_mode = {before}")
    began = time.monotonic()
    with site_on(f"sqlite:///file:{path}?{how}&uri=true", EVENTSOURCING_LOCK_TIMEOUT=20) as site:
        assert site.stored()[0] == 1
    assert time.monotonic() - began < 10
    assert caplog.messages == []


def test_a_connection_that_may_only_read(tmp_path: Path) -> None:
    """A save on a connection with ``PRAGMA query_only`` says what SQLite says, and not that others hold the file."""
    with site_on(f"sqlite:///{tmp_path}/bank.db", SQLALCHEMY_ENGINE_OPTIONS={"poolclass": sa.pool.NullPool}) as site:
        with site.app.app_context():
            site.db.create_all()
        account_id = site.opened()
        with site.app.app_context():
            sa.event.listen(site.db.engine, "connect", lambda driver, _: driver.execute("PRAGMA query_only=1").close())
            with pytest.raises(OperationalError, match=r"^attempt to write a readonly database$") as raised:
                site.bank.deposit(account_id)
            assert not isinstance(raised.value, WriteTimeoutError)
            site.db.session.rollback()
        assert site.balance(account_id) == 0
