"""psycopg and psycopg2: a connection's state, error codes, and error texts without values."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine, ExceptionContext

from .calls import AUTOCOMMIT, ask, count_calls, is_own

IDLE, ACTIVE, INERROR, UNKNOWN = 0, 1, 3, 4
"""``PQTRANS_…`` of libpq: there is no transaction; a statement is running; the transaction has failed and a commit
would be a rollback; no connection."""
BINARY = 1
"""psycopg's format of results."""
LOST_PREPARED = ("42P05", "26000")
"""The codes for a prepared statement that is there already, and for one that is not there."""
OUTDATED = ("0A000", "RevalidateCachedQuery")
"""The code, and the function of the server, of a prepared statement whose columns a migration has changed since."""
QUOTES = '["«»„“”「」『』]'
"""What the server puts around names and values; it depends on its language."""
VALUE = re.compile(rf" ?[:\uff1a] ?{QUOTES}")
SET_INSTEAD = (
    ". A pooler gives the server's connections to others in between, as PgBouncer does in transaction mode: set "
    'SQLALCHEMY_ENGINE_OPTIONS = {"connect_args": {"prepare_threshold": None}}, so that psycopg prepares no statements.'
)


def code_of(driver_error: Any) -> object:
    """Return the SQLSTATE, which the drivers call differently."""
    return getattr(driver_error, "sqlstate", None) or getattr(driver_error, "pgcode", None)


def text_of(driver_error: Any, code: object = None) -> str:
    """Return what the server says without its detail, and what to set where prepared statements get lost.

    :param code: the SQLSTATE, where what is given is the text of an error.
    """
    primary = getattr(getattr(driver_error, "diag", None), "message_primary", None)
    text = str(primary or str(driver_error).split("\nDETAIL:")[0]).strip()
    code = code or code_of(driver_error)
    if str(code).startswith("22"):
        # A value that its column does not take stands at the end.
        return VALUE.split(text)[0]
    return text + SET_INSTEAD if code in LOST_PREPARED else text


def is_outdated(driver_error: Any) -> bool:
    """Whether a connection has prepared a statement that would return other columns now, and refuses it each time."""
    diagnosis: Any = getattr(driver_error, "diag", None)
    return (code_of(driver_error), getattr(diagnosis, "source_function", None)) == OUTDATED


def told(driver_connection: Any, name: str) -> str | None:
    """Return a setting of the session, if it is one that the server tells by itself."""
    found: str | None = driver_connection.info.parameter_status(name)
    return found


def search_path_of(driver_connection: Any) -> str | None:
    """Return the schemas in which a connection looks for tables. Servers before version 18 have to be asked."""
    if driver_connection.closed:
        return None
    found = told(driver_connection, "search_path")
    return str(ask(driver_connection, "SELECT current_setting('search_path')")[0][0]) if found is None else found


@contextmanager
def begun(connection: Connection, modify: Callable[[Connection, str], object]) -> Iterator[None]:
    """A transaction, which is rolled back on an error, if the connection commits each statement; else nothing.

    Drivers and pools take such a connection for one without a transaction, and may not roll it back.

    :param modify: runs a statement.
    """
    if connection.get_execution_options().get("isolation_level") != AUTOCOMMIT:
        yield
        return
    modify(connection, "BEGIN")
    with ExitStack() as failed:
        failed.callback(_roll_back, connection, modify)
        yield
        failed.pop_all()
    modify(connection, "COMMIT")


def _roll_back(connection: Connection, modify: Callable[[Connection, str], object]) -> None:
    # The server rolls back what a connection has left that is lost.
    if not connection.invalidated:
        modify(connection, "ROLLBACK")


def prepare_connections(engine: Engine) -> None:
    """Count what ends transactions without SQLAlchemy, and get binary values with psycopg 3, as text is longer.

    Connections of psycopg2 take no attributes, those of a class derived from theirs do. One that the user asks for by
    ``connection_factory`` is left as it is.
    """
    if engine.driver == "psycopg":
        sa.event.listen(engine, "before_cursor_execute", _ask_for_binary)
    elif engine.driver == "psycopg2":
        plain = engine.dialect.loaded_dbapi.extensions.connection
        derived = type("Connection", (plain,), {"__doc__": plain.__doc__, "__module__": __name__})

        @sa.event.listens_for(engine, "do_connect")
        def derive(dialect: Any, record: Any, arguments: Any, parameters: dict[str, Any]) -> None:
            parameters.setdefault("connection_factory", derived)

    sa.event.listen(engine, "connect", count_calls)
    sa.event.listen(engine, "handle_error", _give_up_outdated)


def _give_up_outdated(context: ExceptionContext) -> None:
    # The driver forgets what it has prepared with a rollback, and in autocommit there is none.
    context.is_disconnect = context.is_disconnect or is_outdated(context.original_exception)


def _ask_for_binary(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    # A cursor that puts the parameters into the statement gets text only.
    if is_own(context) and not isinstance(cursor, connection.dialect.dbapi.ClientCursor):  # type: ignore[union-attr]
        cursor.format = BINARY
