"""SQLite's files: those that were open at a fork, and whether a file can use the journal mode WAL.

SQLite keeps a list of its locks in each process, by inode, because a process has only one lock on a part of a file. A
forked process inherits the list but not the locks. If a file was open at the fork, the child believes that it has locks
that it does not have, and another process may end the write-ahead log that the child uses. Connections that were closed
before the fork leave nothing in the list.
"""

from __future__ import annotations

import logging
import os
import resource
import sqlite3
import stat
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import sqlalchemy as sa

from ...exceptions import ConfigurationError, InheritedDatabaseError
from ...lifecycle import PerProcess

logger: logging.Logger = logging.getLogger(__name__)

FileId = tuple[int, int]
"""The device and the inode: symbolic and hard links and relative paths all come to the same."""

closing_threads: dict[int, None] = {}
"""The threads that close a connection now; SQLite's own locks would be taken for ever in a process forked meanwhile."""

_COMPANIONS = ("", "-wal", "-shm", "-journal")
_MOST_DESCRIPTORS = 4096
"""How many descriptors are looked at where the system has no list of them."""

_begun_in = os.getpid()


def _descriptors() -> Iterator[int]:
    for folder in ("/proc/self/fd", "/dev/fd"):
        with suppress(OSError):
            names = [path.name for path in Path(folder).iterdir()]
            # Where it is no list of all, it has the first three.
            if len(names) > 3:
                yield from map(int, names)
                return
    yield from range(min(resource.getrlimit(resource.RLIMIT_NOFILE)[0], _MOST_DESCRIPTORS))


def _open_files() -> dict[int, FileId]:
    """Return all files that are open in this process, by their descriptors."""
    return {} if os.getpid() == _begun_in else _open(stat.S_ISREG)


def open_sockets() -> set[FileId]:
    """Return the sockets that are open in this process."""
    return set(_open(stat.S_ISSOCK).values())


def _open(is_wanted: Callable[[int], bool]) -> dict[int, FileId]:
    found = {}
    for descriptor in _descriptors():
        with suppress(OSError):
            status = os.fstat(descriptor)
            if is_wanted(status.st_mode):
                found[descriptor] = (status.st_dev, status.st_ino)
    return found


_inherited = PerProcess(_open_files)


def note_inherited_files() -> None:
    """Note which files were open at the fork; to be called in a forked process before it opens any."""
    _inherited.get()


def refuse_inherited(dialect: Any, record: Any, arguments: Sequence[Any], parameters: Mapping[str, Any]) -> None:
    """Refuse to connect to a file that was open when this process was forked: SQLAlchemy's event ``do_connect``.

    :raises InheritedDatabaseError: when it was.
    """
    if _inherited.get() and (path := path_of(arguments, parameters)) is not None:
        _refuse_inherited(path)


def refuse_opened(driver: Any, record: Any) -> None:
    """Refuse a connection to such a file that a function of the user's has made: SQLAlchemy's event ``connect``.

    :raises InheritedDatabaseError: when it was open; the connection is closed.
    """
    if _inherited.get() and isinstance(driver, sqlite3.Connection) and (path := file_of(driver)):
        try:
            _refuse_inherited(path)
        except InheritedDatabaseError:
            driver.close()
            raise


def file_of(driver: sqlite3.Connection) -> str:
    """Return the path of a connection's file, or nothing where it has none; the file is not read."""
    with closing(driver.execute("PRAGMA database_list")) as rows:
        return next((str(path) for _, name, path in rows if name == "main"), "")


def _refuse_inherited(path: str) -> None:
    inherited = _inherited.get()
    wanted = {_file_id(f"{path}{companion}") for companion in _COMPANIONS}
    for descriptor, file in list(inherited.items()):
        if file not in wanted:
            continue
        if descriptor_id(descriptor) != file:
            # It was closed since.
            inherited.pop(descriptor, None)
            continue
        raise InheritedDatabaseError(
            f"{path} was open when this process was forked (as descriptor {descriptor}), and SQLite's locks do not "
            "survive that: what is committed here could be lost. Before the fork, end all that uses the file: close "
            "sessions (in Flask, by db.session.remove()) and connections, sqlite3 connections of your own too. See "
            '"SQLite and forks" in the documentation of deployment.'
        )


def path_of(arguments: Sequence[Any], parameters: Mapping[str, Any]) -> str | None:
    """Return the path, without links, of what ``sqlite3.connect()`` is to open; None where it is no file."""
    name = os.fsdecode(arguments[0] if arguments else parameters.get("database", ""))
    if parameters.get("uri") and name.startswith("file:"):
        name = unquote(urlsplit(name).path)
    return None if name in ("", ":memory:") else os.path.realpath(name)


def _file_id(path: str) -> FileId | None:
    try:
        status = os.stat(path)  # noqa: PTH116 - a third of the time, at each checkout
    except (OSError, ValueError):
        return None
    return status.st_dev, status.st_ino


FILE = "flask_eventsourcing.file"
REPLACED = "%s is another file than the one that was opened, or is gone: what is committed to that would be lost."


def note_file(driver: Any, record: Any) -> None:
    """Note which file a connection is for: SQLAlchemy's event ``connect``."""
    if isinstance(driver, sqlite3.Connection) and (path := file_of(driver)):
        record.info[FILE] = path, _file_id(path)


def leave_replaced(driver: Any, record: Any, proxy: Any) -> None:
    """Connect again if another file was put in the place of the one that is open: SQLAlchemy's event ``checkout``.

    The system keeps a file that is open, and SQLite goes on writing to it, also in the journal mode WAL.
    """
    path, known = record.info.get(FILE) or (None, None)
    if path is None or (found := _file_id(path)) == known:
        return
    if known is None:
        # It was made since.
        record.info[FILE] = path, found
        return
    logger.warning(REPLACED, path)
    raise sa.exc.DisconnectionError(REPLACED % path)


def descriptor_id(descriptor: int) -> FileId | None:
    """Return what an open descriptor is of."""
    with suppress(OSError):
        status = os.fstat(descriptor)
        return status.st_dev, status.st_ino
    return None


# ------------------------------------------------------------------------------------------------------- journal mode

LONGEST_WAIT = 5.0
"""The seconds that the switch to WAL waits at most for others that use the file."""


class JournalMode:
    """Sees to the journal mode of the files of one engine, before it connects.

    It is done on a connection of its own. Where a file's shared memory cannot be used, a connection that has found it
    in the mode WAL can neither use it nor let another one take the mode back.

    :param wal: whether to switch files to WAL.
    :param timeout: for how many seconds to wait for others, up to ``LONGEST_WAIT``.
    """

    def __init__(self, wal: bool, timeout: float) -> None:
        self._wal = wal
        self._timeout = min(timeout, LONGEST_WAIT)
        self._settled: FileId | None = None
        self._in_use: str | None = None
        """The file that other processes did not let go in the whole time. Nothing waits for them a second time."""
        self._warned: set[str] = set()

    def settle(self, arguments: Sequence[Any], parameters: Mapping[str, Any]) -> None:
        """Switch the file to WAL unless that is done, cannot be done, or is not wanted.

        :raises ConfigurationError: when the file is in the mode WAL and cannot be used where it is.
        """
        path = path_of(arguments, parameters)
        if path is None or ((file := _file_id(path)) is not None and file == self._settled):
            return
        if "immutable=1" in str(arguments[0]):
            # It is read as it is, without locks and without the log.
            return
        address, uri = arguments[0], bool(parameters.get("uri"))
        try:
            probe = sqlite3.connect(address, timeout=self._timeout, isolation_level=None, uri=uri)
        except sqlite3.Error:
            # The engine's own connection will tell.
            return
        with closing(probe):
            settled = self._look(probe, path)
        if isinstance(settled, sqlite3.Error):
            # A connection that has failed so is in the way of what follows.
            self._leave_wal(address, uri, path, settled)
        if settled:
            self._settled = _file_id(path)

    def _look(self, probe: sqlite3.Connection, path: str) -> bool | sqlite3.Error:
        """Switch to WAL where that is wanted, and return whether to leave it at that.

        The error is that of a file that is in this mode and cannot be used.
        """
        try:
            mode = _mode(probe, "PRAGMA journal_mode")
            if mode == "wal" or not self._wal:
                return True
            settled = self._switch(probe, path, mode)
            # Shared memory is first needed now.
            probe.execute("PRAGMA schema_version").close()
        except sqlite3.Error as error:
            if _is(error, "SQLITE_IOERR_SHM", "SQLITE_PROTOCOL", "SQLITE_CANTOPEN"):
                return error
            if _is(error, "SQLITE_READONLY"):
                raise ConfigurationError(
                    f"{path} is in the journal mode WAL, which needs {Path(path).name}-shm beside it, and that "
                    f"cannot be written here ({error}). Use a copy that was made with VACUUM INTO, or, if nobody "
                    'writes to the file, open it with "?immutable=1&uri=true".'
                ) from error
            # Of anything else, the engine's own connection will tell.
            return False
        return settled

    def _switch(self, probe: sqlite3.Connection, path: str, mode: str) -> bool:
        timeout = 0.0 if self._in_use == path else self._timeout
        probe.execute(f"PRAGMA busy_timeout = {int(timeout * 1000)}").close()
        deadline = time.monotonic() + timeout
        while True:
            try:
                if (mode := _mode(probe, "PRAGMA journal_mode = WAL")) != "wal":
                    self._warn(path, f"it stays in the mode {mode}")
                return True
            except sqlite3.OperationalError as error:
                if _is(error, "SQLITE_READONLY"):
                    # It is opened for reading only: its writers choose its mode.
                    return True
                if not _is(error, "SQLITE_BUSY"):
                    self._warn(path, str(error))
                    return True
                # SQLite does not call its busy handler for each part of the switch.
                if time.monotonic() >= deadline:
                    self._in_use = path
                    self._warn(path, f"{error}: others use it; the next connections try again")
                    return False
                time.sleep(0.01)

    def _leave_wal(self, address: Any, uri: bool, path: str, why: sqlite3.Error) -> None:
        """Take a file out of the mode WAL without shared memory: an exclusive connection needs none."""
        try:
            with closing(sqlite3.connect(address, timeout=self._timeout, isolation_level=None, uri=uri)) as exclusive:
                exclusive.execute("PRAGMA locking_mode = EXCLUSIVE").close()
                mode = _mode(exclusive, "PRAGMA journal_mode = DELETE")
        except sqlite3.Error as error:
            raise ConfigurationError(
                f"{path} is in the journal mode WAL, which cannot be used on this file system ({why}), and the mode "
                f"cannot be taken back now ({error}). End the programs that use the file, or move it to a local disk; "
                "set EVENTSOURCING_SQLITE_WAL = False where it stays."
            ) from error
        self._warn(path, f"{why}; it is in the mode {mode} again")

    def _warn(self, path: str, why: str) -> None:
        if path not in self._warned:
            self._warned.add(path)
            logger.warning(
                "%s cannot be switched to the journal mode WAL (%s). Readers and the writer wait for each other. Set "
                "EVENTSOURCING_SQLITE_WAL = False if the file is to stay so.",
                path,
                why,
            )


def _mode(connection: sqlite3.Connection, statement: str) -> str:
    with closing(connection.execute(statement)) as cursor:
        return str(cursor.fetchone()[0]).lower()


def _is(error: sqlite3.Error, *names: str) -> bool:
    return str(getattr(error, "sqlite_errorname", "")).startswith(names)
