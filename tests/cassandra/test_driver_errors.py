"""What errors of the driver mean for the protocol."""

from __future__ import annotations

from typing import Any

import pytest
from eventsourcing.persistence import ProgrammingError

from flask_eventsourcing.exceptions import MissingRightError, MissingTableError

cassandra: Any = pytest.importorskip("cassandra", reason="cassandra-driver is not installed")
pytest.importorskip("cassandra.cluster", reason="cassandra-driver is not installed")


def maybe_done() -> list[Any]:
    """Return errors after which a write may have been done."""
    from cassandra import connection, protocol

    return [
        cassandra.WriteTimeout("timed out", write_type=5),
        cassandra.ReadTimeout("timed out"),
        cassandra.Unavailable("not enough"),
        cassandra.WriteFailure("failed"),
        cassandra.OperationTimedOut(),
        connection.ConnectionShutdown("closed"),
        protocol.ServerError(0, "null pointer", None),
        protocol.OverloadedErrorMessage(0x1001, "overloaded", None),
        # CAS_WRITE_UNKNOWN, for which the driver has no class.
        protocol.ErrorMessage(0x1700, "CAS operation result is unknown", None),
    ]


def test_unknown_outcomes_are_told_from_others() -> None:
    """Every error after which a write may have been done is one, those that the driver does not know among them."""
    from cassandra.cluster import NoHostAvailable

    from flask_eventsourcing.cassandra.errors import translated
    from flask_eventsourcing.cassandra.rows import MaybeDoneError, NotDoneError

    for error in maybe_done():
        with pytest.raises(MaybeDoneError), translated():
            raise error
    with pytest.raises(NotDoneError), translated():
        raise NoHostAvailable("no host", {})


def test_what_stays_wrong_is_told_at_once() -> None:
    """A missing table, a missing right, too large a save and other refusals have errors of their own."""
    from cassandra import protocol

    from flask_eventsourcing.cassandra import SaveTooLargeError
    from flask_eventsourcing.cassandra.errors import translated

    for error, expected in (
        (cassandra.InvalidRequest("table bank_log does not exist"), MissingTableError),
        (cassandra.InvalidRequest("Keyspace 'bank' does not exist"), MissingTableError),
        (cassandra.InvalidRequest("CQL Message of size 9 bytes exceeds allowed maximum of 8 bytes"), SaveTooLargeError),
        (cassandra.InvalidRequest("Unset value"), ProgrammingError),
        (cassandra.Unauthorized("no MODIFY permission"), MissingRightError),
        (protocol.ErrorMessage(0x2300, "no such option", None), ProgrammingError),
    ):
        with pytest.raises(expected), translated(9):
            raise error
