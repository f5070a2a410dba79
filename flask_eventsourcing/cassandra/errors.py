"""Tells what an error of the driver means: the work was not done, the outcome is unknown, or another try is useless."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import cassandra
from cassandra.cluster import NoHostAvailable
from cassandra.connection import ConnectionException
from cassandra.protocol import ErrorMessage, RequestExecutionException, ServerError
from eventsourcing.persistence import DataError, ProgrammingError

from ..exceptions import EventValueError, MissingRightError, MissingTableError
from .rows import MaybeDoneError, NotDoneError

CAS_WRITE_UNKNOWN = 0x1700
"""An error of the server for which the driver has no class."""
UNKNOWN: tuple[type[Exception], ...] = (
    cassandra.Timeout,
    cassandra.Unavailable,
    cassandra.CoordinationFailure,
    cassandra.OperationTimedOut,
    ConnectionException,
    ServerError,
    # Those for which the driver has no exception, such as Overloaded and CDC_WRITE_FAILURE.
    RequestExecutionException,
)
"""After these a write may have been done, or may be completed by the next request for the row."""


class SaveTooLargeError(EventValueError, DataError):
    """A save has more bytes than the nodes accept in one statement: save fewer or smaller events at a time."""


@contextmanager
def translated(size: int = 0) -> Iterator[None]:
    """Raise the errors of the protocol instead of the driver's.

    :param size: the bytes that are written.
    :raises NotDoneError: when it was not done, and can be tried again.
    :raises MaybeDoneError: when it is unknown whether it was done.
    :raises SaveTooLargeError: when the nodes accept fewer bytes.
    :raises MissingTableError: when keyspace or table are missing.
    :raises MissingRightError: when the role may not do it.
    :raises ProgrammingError: when the nodes refuse it for another reason.
    """
    try:
        yield
    except NoHostAvailable as error:
        raise NotDoneError(_first_line(error)) from error
    except UNKNOWN as error:
        raise MaybeDoneError(_first_line(error)) from error
    except cassandra.Unauthorized as error:
        raise MissingRightError(_first_line(error)) from error
    except cassandra.InvalidRequest as error:
        raise _refusal(error, size) from error
    except ErrorMessage as error:
        if error.code == CAS_WRITE_UNKNOWN:
            raise MaybeDoneError(_first_line(error)) from error
        raise ProgrammingError(f"Cassandra refused a statement: {_first_line(error)}") from error
    except cassandra.DriverException as error:
        raise MaybeDoneError(_first_line(error)) from error


def _refusal(error: Exception, size: int) -> Exception:
    text = str(error)
    if "too large" in text or "exceeds" in text:
        return SaveTooLargeError(f"A save of {size} bytes is too large for the nodes: save less ({text[-120:]}).")
    if "ndefined column" in text:
        return ProgrammingError(f"{_first_line(error)}: the table was altered; run the command 'check'.")
    if "table" in text.lower() or "eyspace" in text:
        return MissingTableError(f"{_first_line(error)}: run the command 'init-db'.")
    return ProgrammingError(f"Cassandra refused a statement: {_first_line(error)}")


def _first_line(error: object) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:300]
