"""Listens to sessions and to the events' engines, and tells units of work of every end of a transaction.

The listeners are on SQLAlchemy's session class, so every session factory has them. They return at once if no recorder
has joined the session.
"""

from __future__ import annotations

import re
import weakref
from typing import Any

import sqlalchemy as sa
from sqlalchemy import orm
from sqlalchemy.engine import Connection, Engine, ExceptionContext

from ..exceptions import CommitOutcomeUnknownError, FlaskEventSourcingError
from ..persistence.dialects.calls import is_own, root_engine
from .commit_gate import joined_late
from .pending import Batch, known_state, state_of
from .unit import INFO_KEY, SessionUnits, UnitOfWork

_QUOTED = re.compile(
    r"--[^\n]*|/\*.*?\*/|'(?:[^']|'')*'|\"(?:[^\"]|\"\")*\"|`[^`]*`|(?P<tag>\$\w*\$).*?(?P=tag)", re.DOTALL
)
"""Parts of a text in which a semicolon does not end a statement."""
COMMITS = re.compile(r"(?:\A\s*(?:COMMIT|END)|;\s*COMMIT)\b(?!\s+PREPARED)", re.IGNORECASE)
ROLLS_BACK = re.compile(r"(?:\A|;)\s*(?:ROLLBACK|ABORT)\b(?![^;]*\bTO\b)(?!\s+PREPARED)", re.IGNORECASE)
"""Statements that commit, or roll back, a whole transaction, also among several statements in a text."""
ENDS = re.compile(r"\b(COMMIT|ROLLBACK|END|ABORT|RELEASE|SAVEPOINT|BEGIN|START|PREPARE|CALL)\b", re.IGNORECASE)
"""Words that may end a transaction or a savepoint in a textual statement. In some databases, a procedure may too."""

_followed: weakref.WeakSet[Engine] = weakref.WeakSet()


def follow(engine: Engine) -> None:
    """Listen to an engine; calling it again does nothing."""
    engine = root_engine(engine)
    if engine in _followed:
        return
    _followed.add(engine)
    for name, function in (
        ("begin", _begin),
        ("commit", _commit),
        ("rollback", _rollback),
        ("savepoint", _savepoint),
        ("release_savepoint", _release_savepoint),
        ("rollback_savepoint", _rollback_savepoint),
        ("prepare_twophase", _prepare_twophase),
        ("commit_twophase", _commit_twophase),
        ("rollback_twophase", _rollback_twophase),
        ("handle_error", _handle_error),
        ("before_cursor_execute", _before_statement),
        ("after_cursor_execute", _after_statement),
    ):
        sa.event.listen(engine, name, function)


# ------------------------------------------------------------------------------------------------ of engines


def _begin(connection: Connection) -> None:
    _forget_savepoints(connection)
    for unit in joined(connection):
        if unit.following.is_committing:
            unit.committed()


def joined(connection: Connection) -> list[UnitOfWork]:
    """Return the units that have joined a connection's transaction, or run in it."""
    state = known_state(connection)
    found = () if state is None else [each() for each in state.units]
    return [unit for unit in found if unit is not None and unit.following.connection() is connection]


def _forget_savepoints(connection: Connection) -> None:
    state = known_state(connection)
    if state is not None:
        state.savepoints.clear()


def _commit(connection: Connection) -> None:
    for unit in joined(connection):
        if not unit.shared.is_committing:
            # Other code commits, and not the session.
            unit.look()
            try:
                unit.gate.check()
            except FlaskEventSourcingError:
                # SQLAlchemy takes the transaction for ended. The connection's next user would commit it.
                if not unit.dialect.roll_back(connection):
                    connection.invalidate()
                raise
        unit.following.is_committing = True


def _rollback(connection: Connection) -> None:
    _forget_savepoints(connection)
    for unit in joined(connection):
        unit.look_for_commit(connection)
        unit.rolled_back(0)


def _savepoint(connection: Connection, name: str | None) -> None:
    state_of(connection).opened(name)


def _release_savepoint(connection: Connection, name: str, context: None) -> None:
    level = state_of(connection).left(name)
    for unit in joined(connection):
        unit.released(level)


def _rollback_savepoint(connection: Connection, name: str, context: None) -> None:
    level = state_of(connection).left(name)
    for unit in joined(connection):
        # If other code has ended the transaction without SQLAlchemy, the savepoint does not exist any more.
        unit.look()
        unit.rolled_back(level)


def _prepare_twophase(connection: Connection, xid: Any) -> None:
    for unit in joined(connection):
        unit.following.is_committing = unit.following.is_prepared = True


def _commit_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    _commit(connection)


def _rollback_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    if not (is_prepared and connection.invalidated):
        _rollback(connection)
        return
    # SQLAlchemy reports a rollback that it cannot do: the server keeps what was prepared until an operator decides.
    for unit in joined(connection):
        unit.unknown()


def _handle_error(context: ExceptionContext) -> None:
    connection = context.connection
    if connection is None:
        return
    committing = [unit for unit in joined(connection) if unit.following.is_committing and unit.pending.has(Batch)]
    if committing and context.is_disconnect:
        for unit in committing:
            unit.unknown()
        if context.sqlalchemy_exception is not None:
            raise CommitOutcomeUnknownError from context.original_exception
    elif context.statement is None and context.sqlalchemy_exception is not None:
        _refused([unit for unit in committing if not unit.following.is_prepared], connection)
        if committing:
            _end_first_phase(context, connection)
    # An error that is not the driver's, such as one of a signal handler, passes as it is.


def _end_first_phase(context: ExceptionContext, connection: Connection) -> None:
    if getattr(connection.get_transaction(), "_is_prepared", None) is False:
        # The first of two phases has failed, and has ended the transaction. Drivers take it for prepared, and their
        # error about that would hide this one, which may be a conflict.
        context.is_disconnect, context.invalidate_pool_on_disconnect = True, False


def _refused(units: list[UnitOfWork], connection: Connection) -> None:
    """Note that the database has refused a commit, for a deferred constraint or another writer: nothing is stored."""
    for unit in units:
        unit.following.is_committing = False
    if units:
        # Some databases leave the transaction open, but SQLAlchemy takes it for ended: the connection's next user would
        # commit it.
        units[0].dialect.roll_back(connection)


def _before_statement(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    state = known_state(connection)
    if state is None:
        return
    state.statements += 1
    # The recorders have checked it, or are asking what became of the events.
    for unit in () if is_own(context) else joined(connection):
        # If other code has ended this transaction without SQLAlchemy, the statement would begin another one.
        unit.look()
        if _is_text(context) and _has(COMMITS, statement):
            unit.gate.check()


def _after_statement(
    connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, executemany: bool
) -> None:
    units = [] if is_own(context) else joined(connection)
    if not units:
        return
    is_text = _is_text(context)
    if (is_text and ENDS.search(statement)) or units[0].dialect.commits_implicitly(statement):
        # The statements of a two-phase commit are SQLAlchemy's own.
        for unit in [each for each in units if not each.following.is_prepared]:
            unit.following.suspect()
            # After COMMIT AND CHAIN there is another transaction.
            unit.look(is_over=is_text and _has(COMMITS, statement))
            if is_text and _has(ROLLS_BACK, statement):
                unit.note_rollback_in_run()


def _has(ends: re.Pattern[str], text: str) -> bool:
    # Most texts have no such word, and need no closer look.
    return ENDS.search(text) is not None and ends.search(_QUOTED.sub(" ", text)) is not None


def _is_text(context: Any) -> bool:
    compiled = getattr(context, "compiled", None)
    return compiled is None or isinstance(getattr(compiled, "statement", None), sa.TextClause)


# ----------------------------------------------------------------------------------------------- of sessions


def _units_of(session: orm.Session) -> tuple[SessionUnits, list[UnitOfWork]] | None:
    shared: SessionUnits | None = session.info.get(INFO_KEY)
    return None if shared is None else (shared, list(shared.units.values()))


@sa.event.listens_for(orm.Session, "after_begin")
def _after_begin(session: orm.Session, transaction: orm.SessionTransaction, connection: Connection) -> None:
    joined_late(session)
    found = _units_of(session)
    if found is not None:
        for unit in found[1]:
            unit.begun(connection)


@sa.event.listens_for(orm.Session, "before_commit")
def _before_commit(session: orm.Session) -> None:
    joined_late(session)
    found = _units_of(session)
    if found is None or not found[1]:
        return
    shared, units = found
    in_savepoint = session.in_nested_transaction()
    shared.is_committing = False
    shared.turns.commit(units[0].dialect.options.lock_timeout)
    try:
        for unit in units:
            unit.look()
            unit.gate.check(in_savepoint=in_savepoint)
        shared.is_committing = not in_savepoint
    finally:
        if not shared.is_committing:
            shared.turns.committing = None


# Before the user's own listeners, whose error would leave a commit unnoticed.
@sa.event.listens_for(orm.Session, "after_commit", insert=True)
def _after_commit(session: orm.Session) -> None:
    found = _units_of(session)
    if found is not None:
        found[0].committed = session.get_nested_transaction() or session.get_transaction()


@sa.event.listens_for(orm.Session, "after_rollback")
def _after_rollback(session: orm.Session) -> None:
    found = _units_of(session)
    if found is not None:
        found[0].asked = True


@sa.event.listens_for(orm.Session, "after_soft_rollback")
def _after_soft_rollback(session: orm.Session, ended: orm.SessionTransaction) -> None:
    found = _units_of(session)
    if found is None:
        return
    shared, units = found
    # A flush that fails rolls back and leaves the end to the caller, who may not notice.
    shared.has_half_ended = not (ended.parent is None or ended.nested)
    shared.asked = shared.is_committing = False
    shared.turns.committing = None
    if not shared.has_half_ended:
        for unit in units:
            unit.resolve(asked=True)


@sa.event.listens_for(orm.Session, "after_transaction_end")
def _after_transaction_end(session: orm.Session, ended: orm.SessionTransaction) -> None:
    found = _units_of(session)
    if found is None:
        return
    shared, units = found
    committed, shared.committed = shared.committed is ended, None
    if ended.parent is not None:
        return
    for unit in units:
        if unit.following.is_prepared and not committed:
            # Its connection is lost, so an operator has to decide about it.
            unit.unknown()
        elif committed or unit.following.is_committing:
            unit.committed()
        else:
            unit.rolled_back(0)
            unit.note_rollback_in_run()
            if shared.asked:
                unit.resolve(asked=True)
            elif not shared.has_half_ended:
                run = shared.run()
                # A unit of work that is running fails because of it, and may be run again.
                unit.resolve(asked=run is not None and run.rollback_only is not None)
    shared.asked = shared.has_half_ended = shared.is_committing = False
    shared.turns.committing = None
