"""Which errors pass by themselves."""

from __future__ import annotations

import pytest
import sqlalchemy as sa
from eventsourcing import persistence

from flask_eventsourcing.exceptions import AbortedTransactionError, MissingTableError
from flask_eventsourcing.persistence.dialects import is_outage, is_read_only
from flask_eventsourcing.projections.checkpoint import FencedError


def driver_error(*args: object, **attributes: str) -> Exception:
    """Make an error as a driver raises it."""
    error = Exception(*args)
    vars(error).update(attributes)
    return error


@pytest.mark.parametrize(
    "error",
    [
        driver_error(sqlstate="40001"),
        driver_error(pgcode="40P01"),
        driver_error(sqlstate="55P03"),
        driver_error(pgcode="55P03"),
        driver_error(1205, "Lock wait timeout exceeded"),
        driver_error(1213, "Deadlock found"),
        driver_error("database is locked"),
        driver_error("database table is locked: bank_projections"),
    ],
    ids=repr,
)
def test_locks_and_deadlocks_pass(error: Exception) -> None:
    """A statement that others have held up may be tried again, on every database."""
    assert is_outage(sa.exc.OperationalError("UPDATE", {}, error))


@pytest.mark.parametrize(
    "error",
    [
        driver_error(1290, "The server is running with the --secure-file-priv option so it cannot execute it"),
        driver_error(sqlstate="23505"),
        driver_error(1062, "Duplicate entry"),
        driver_error("no such column"),
        None,
    ],
    ids=repr,
)
def test_errors_of_a_statement_stay(error: Exception | None) -> None:
    """An error that the statement itself causes is not an outage."""
    assert not is_outage(sa.exc.IntegrityError("INSERT", {}, error))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "error",
    [
        driver_error(sqlstate="25006"),
        driver_error(pgcode="25006"),
        driver_error(1290, "The server is running with the --read-only option so it cannot execute this statement"),
        driver_error(1836, "Running in read-only mode"),
    ],
    ids=repr,
)
def test_a_server_that_only_reads_passes(error: Exception) -> None:
    """After a failover, a server that takes no writes is waited for, and its connections are given up."""
    assert is_outage(sa.exc.InternalError("UPDATE", {}, error))
    assert is_read_only(sa.exc.InternalError("UPDATE", {}, error))
    assert not is_read_only(sa.exc.OperationalError("UPDATE", {}, driver_error("database is locked")))


def test_a_connection_that_cannot_be_made_passes() -> None:
    """An error without a statement counts as one of the connection."""
    assert is_outage(sa.exc.OperationalError(None, None, driver_error("refused")))
    assert is_outage(sa.exc.TimeoutError())
    assert is_outage(sa.exc.PendingRollbackError("lost", code="8s2b"))
    assert not is_outage(sa.exc.PendingRollbackError("a flush has failed", code="7s2a"))


def test_errors_of_recorders_and_runners() -> None:
    """A lost claim and the recorders' operational errors pass; a missing table and an aborted transaction do not."""
    assert is_outage(FencedError())
    assert is_outage(persistence.OperationalError())
    assert not is_outage(persistence.IntegrityError())
    assert not is_outage(MissingTableError("bank_events"))
    assert not is_outage(AbortedTransactionError())
    assert not is_outage(ValueError())
