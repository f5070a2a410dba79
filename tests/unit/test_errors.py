"""Errors: SQLAlchemy's become the library's, and ours explain themselves."""

from __future__ import annotations

import inspect
import sqlite3
from typing import Any

import pymysql
import pytest
import sqlalchemy as sa
from eventsourcing import persistence
from sqlalchemy import exc

from flask_eventsourcing import exceptions
from flask_eventsourcing.exceptions import FlaskEventSourcingError, MissingTableError
from flask_eventsourcing.persistence import Dialect, DialectOptions
from flask_eventsourcing.persistence.dialects import dialect_for, hide_values

URLS = {"mysql": "mysql+pymysql://", "postgresql": "postgresql+psycopg://", "sqlite": "sqlite://"}
OURS = [cls for _, cls in inspect.getmembers(exceptions, inspect.isclass) if issubclass(cls, FlaskEventSourcingError)]


class DriverError(Exception):
    """An error of a driver with a SQLSTATE, as psycopg and psycopg2 have it."""

    def __init__(self, text: str = "failed", sqlstate: str | None = None, pgcode: str | None = None) -> None:
        super().__init__(text)
        self.sqlstate = sqlstate
        self.pgcode = pgcode


def dialect_of(name: str = "sqlite") -> Dialect:
    """Return a database's dialect, without the database."""
    return dialect_for(sa.create_engine(URLS[name]), DialectOptions(program="flask eventsourcing"))


def with_sqlstate(error: Any, sqlstate: str) -> Any:
    """Return an error with what PyMySQL 1.2 adds to it."""
    error.sqlstate = sqlstate
    return error


def wrapped(cls: type[exc.DBAPIError], driver_error: BaseException) -> exc.DBAPIError:
    """Return SQLAlchemy's error around a driver's."""
    return cls("SELECT 1", {}, driver_error)


@pytest.mark.parametrize(
    ("theirs", "library"),
    [
        (exc.IntegrityError, persistence.IntegrityError),
        (exc.DataError, persistence.DataError),
        (exc.OperationalError, persistence.OperationalError),
        (exc.InternalError, persistence.InternalError),
        (exc.ProgrammingError, persistence.ProgrammingError),
        (exc.NotSupportedError, persistence.NotSupportedError),
        (exc.DatabaseError, persistence.DatabaseError),
        (exc.InterfaceError, persistence.InterfaceError),
    ],
)
def test_driver_errors_become_the_librarys(theirs: type[exc.DBAPIError], library: type[Exception]) -> None:
    """Each kind of error of a driver is the library's error of that kind, with the driver's text."""
    error = dialect_of().translate(wrapped(theirs, DriverError("it broke")))
    assert type(error) is library
    assert "it broke" in str(error)


@pytest.mark.parametrize("theirs", [exc.TimeoutError("pool"), exc.PendingRollbackError("first roll back")])
def test_sqlalchemys_own_errors_become_operational_ones(theirs: exc.SQLAlchemyError) -> None:
    """An exhausted pool, or a session that needs a rollback, is the library's operational error."""
    assert type(dialect_of().translate(theirs)) is persistence.OperationalError


def test_any_other_error_is_still_the_librarys() -> None:
    """An error of SQLAlchemy that has no counterpart is the library's most general one."""
    assert type(dialect_of().translate(exc.ArgumentError("?"))) is persistence.PersistenceError


@pytest.mark.parametrize(
    ("database", "driver_error", "conflict", "again"),
    [
        ("postgresql", DriverError(sqlstate="23505"), True, False),
        ("postgresql", DriverError(pgcode="23505"), True, False),
        ("postgresql", DriverError(sqlstate="40001"), True, True),
        ("postgresql", DriverError(pgcode="40P01"), True, True),
        ("mysql", Exception(1062, "Duplicate entry"), True, False),
        ("mysql", Exception(1213, "Deadlock found"), True, True),
        ("mysql", pymysql.err.IntegrityError(1062, "Duplicate entry"), True, False),
        ("mysql", with_sqlstate(pymysql.err.IntegrityError(1062, "Duplicate entry"), "23000"), True, False),
        ("mysql", with_sqlstate(pymysql.err.IntegrityError(1048, "Column cannot be null"), "23000"), False, False),
        ("mysql", with_sqlstate(pymysql.err.OperationalError(1213, "Deadlock found"), "40001"), True, True),
        ("mysql", Exception(["unhashable"]), False, False),
        ("postgresql", DriverError(sqlstate="42P01"), False, False),
        *[(name, error, False, False) for name in URLS for error in (Exception(), None)],
    ],
)
def test_conflicts_are_told_from_other_errors(database: str, driver_error: Any, conflict: bool, again: bool) -> None:
    """A duplicate key, a deadlock and a failed serialisation are conflicts; the last two concern the whole unit."""
    dialect = dialect_of(database)
    error = dialect.translate(wrapped(exc.OperationalError, driver_error))
    assert isinstance(error, persistence.IntegrityError) is conflict
    assert dialect.is_serialization_failure(driver_error) is again


def test_deadlock_is_an_integrity_error() -> None:
    """A deadlock, which drivers call an operational error, is a conflict for users, so that it is retried."""
    deadlock = wrapped(exc.OperationalError, DriverError("deadlock detected", sqlstate="40P01"))
    error = dialect_of("postgresql").translate(deadlock)
    assert isinstance(error, persistence.IntegrityError)


@pytest.mark.parametrize(
    ("database", "driver_error"),
    [
        ("sqlite", DriverError("no such table: bank_events")),
        ("postgresql", DriverError('relation "bank_events" does not exist', "42P01")),
        ("postgresql", DriverError("Relation »bank_events« existiert nicht", "42P01")),
        ("postgresql", DriverError("la relation « bank_events » n'existe pas", "42P01")),
        ("postgresql", DriverError('リレーション"bank_events"は存在しません', pgcode="42P01")),
        ("mysql", pymysql.err.ProgrammingError(1146, "Table 'bank_events' doesn't exist")),
        ("mysql", pymysql.err.ProgrammingError(1146, "La table 'bank_events' n'existe pas")),
    ],
)
def test_missing_table_says_which_and_what_to_run(database: str, driver_error: Exception) -> None:
    """On every database a missing table is named, in any language of the server, with the commands that create it."""
    error = dialect_of(database).translate(wrapped(exc.ProgrammingError, driver_error))
    assert isinstance(error, MissingTableError)
    assert "'bank_events'" in str(error)
    assert "flask eventsourcing init-db" in str(error)


SECRET = "4711-secret"


@pytest.mark.parametrize(
    ("database", "driver_error"),
    [
        ("postgresql", DriverError(f'invalid input syntax for type uuid: "{SECRET}"', "22P02")),
        ("postgresql", DriverError(f"ungültige Eingabesyntax für Typ uuid: »{SECRET}«", "22P02")),
        ("postgresql", DriverError(f"syntaxe en entrée invalide pour le type uuid : « {SECRET} »", "22P02")),
        ("mysql", pymysql.err.IntegrityError(1062, f"Duplicate entry '{SECRET}' for key 'PRIMARY'")),
        ("mysql", pymysql.err.IntegrityError(1062, f"Doppelter Eintrag 'o'{SECRET}' für Schlüssel 'PRIMARY'")),
        ("mysql", pymysql.err.IntegrityError(1062, f"'{SECRET}' は索引 'PRIMARY' で重複しています。")),
        ("mysql", pymysql.err.DataError(1366, f"Falscher integer-Wert: '{SECRET}' für Feld `note`.`id` in Zeile 1")),
        ("mysql", pymysql.err.ProgrammingError(1064, f"Fehler in der SQL-Syntax bei '{SECRET}' in Zeile 1")),
    ],
)
def test_no_message_has_a_value_of_a_row(database: str, driver_error: Exception) -> None:
    """What a server quotes of a statement's parameters is left out of messages, in any of its languages."""
    dialect = dialect_of(database)
    assert SECRET not in str(dialect.translate(wrapped(exc.DataError, driver_error)))
    own = wrapped(exc.DataError, driver_error)
    hide_values(own)
    assert SECRET not in f"{own} {driver_error}"


def test_context_manager_translates_and_keeps_the_cause() -> None:
    """Within the context manager, SQLAlchemy's error becomes the library's and stays visible as the cause."""
    original = exc.OperationalError(None, None, sqlite3.OperationalError("disk I/O error"))
    with pytest.raises(persistence.OperationalError, match="disk I/O error") as raised, dialect_of().translated:
        raise original
    assert raised.value.__cause__ is original


def test_context_manager_leaves_the_statements_of_others_alone() -> None:
    """An error of a statement that is not the recorders' own stays SQLAlchemy's."""
    with pytest.raises(exc.IntegrityError), dialect_of().translated:
        raise wrapped(exc.IntegrityError, sqlite3.IntegrityError("CHECK constraint failed"))


def test_context_manager_leaves_other_errors_alone() -> None:
    """An error that is not SQLAlchemy's is raised unchanged."""
    with pytest.raises(KeyError), dialect_of().translated:
        raise KeyError


@pytest.mark.parametrize("cls", OURS)
def test_every_error_explains_itself(cls: type[FlaskEventSourcingError]) -> None:
    """An error raised without a message has its class's explanation as the message, in one line."""
    text = str(cls())
    assert len(text) > 20
    assert "\n\n" not in text
    assert str(cls("told otherwise")) == "told otherwise"
