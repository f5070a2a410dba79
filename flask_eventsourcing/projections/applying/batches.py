"""Batches that handlers cannot observe: each event finds the session as if it were alone in its transaction.

At the beginning of each event, the objects in the session must be as in the database. To flush and expire the session
after each event ensures this, but is slow. For *plain* models both can wait: a value that the database returns
unchanged need not be read again, and a flush that no code asked for can be done before the next statement. Each class
and each value that is set is checked; what is not known to be plain is flushed and expired. So is a row with which the
database might do more than to store it. A row that it might refuse is flushed after each event that adds it, or sets
a column that a constraint is about: otherwise a later event might change it, and no error would tell. It is not
expired.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification
from sqlalchemy import orm
from sqlalchemy.engine import Connection
from sqlalchemy.orm.attributes import instance_state
from sqlalchemy_utils.aggregates import manager

from ..._patches import session_methods
from ...exceptions import HandlerError
from ...persistence import Dialect
from ...persistence.dialects.catalogs import Checks, check_now, checks_of
from ...persistence.dialects.event_values import PlainColumn, plain_columns
from ...persistence.tables import UUIDType
from ..consumers import load_rows
from .pages import ObservedError

PREFETCH_FROM = 8
"""Fewer events than this are not worth a query for the rows of all their aggregates."""
MOST_KEPT = 5000
"""The rows that are kept from one event to the next."""
SCALARS = frozenset({UUID, int, str})
_KEY = "flask_eventsourcing.batch"

_OF_SAVEPOINTS = ("SAVEPOINT", "RELEASE", "ROLLBACK TO")
_watched: weakref.WeakKeyDictionary[type[Any], set[str]] = weakref.WeakKeyDictionary()
"""The classes that are listened to, with the attributes of which a batch is told at each value."""


class _Plain(NamedTuple):
    """A plain class."""

    columns: Sequence[PlainColumn]
    checked: frozenset[str] | None
    """The attributes that constraints are about, None where the database has none."""
    is_gotten: bool
    """Whether a session finds its rows by one value, and does not read them again."""


class Batches:
    """The batches of one consumer.

    :param id_keys: the models whose primary key can be the id of an aggregate, with that column.
    :param ended: what is said when a handler ends the transaction.
    :param look: called with each statement before it is executed, and its context.
    """

    def __init__(
        self,
        dialect: Dialect,
        models: Sequence[Any],
        id_keys: Sequence[tuple[Any, Any]],
        ended: str,
        look: Callable[[str, Any], None],
    ) -> None:
        self.dialect = dialect
        self.look = look
        self._id_keys = id_keys
        self.ended = ended
        self.flushes_each = False
        """Whether to flush after each event, because the handlers were found to need it."""
        self.last: Batch | None = None
        """The last one, to describe it when it has failed."""
        self.checks: Checks | None = None
        """What the database does with rows, once it was looked at."""
        # Until then, and of all other models, no row waits.
        self.plain: dict[type[Any], _Plain | None] = dict.fromkeys(models)

    def look_at(self, connection: Connection, tables: Sequence[sa.Table], suffix: str) -> Checks:
        """Look what the database does with the rows of some tables, and of their shadows with a suffix."""
        self.checks = checks_of(connection, self.dialect, tables, suffix)
        for model in self.plain:
            found = plain_columns(model, UUIDType)
            names = None if found is None else self.checks.tables.get(sa.inspect(model).local_table.key, frozenset())
            if found is not None and names is not None:
                checked = frozenset(each.key for each in found if each.name in names)
                is_gotten = sum(each.is_key for each in found) == 1 and not sa.inspect(model).always_refresh
                self.plain[model] = _Plain(found, checked if names else None, is_gotten)
                _watch(model, found, checked)
        return self.checks

    @contextmanager
    def applying(
        self, session: orm.Session, connection: Connection, notifications: Sequence[Notification]
    ) -> Iterator[Batch]:
        """Apply a batch in the block."""
        # Also the objects that handlers have kept, and those of a session that does not expire them at a commit.
        session.expire_all()
        batch = self.last = Batch(self, session, connection)
        if len(notifications) >= PREFETCH_FROM and not self.flushes_each:
            batch.keep(load_rows(session, [key for key in self._id_keys if self.is_plain(key[0])], notifications))
        with batch.listening():
            yield batch

    def is_plain(self, model: type[Any]) -> bool:
        """Whether flushing the rows of a class later, and not reading them again, cannot be observed."""
        return self.plain.get(model) is not None

    def keeps(self, value: Any) -> bool:
        """Whether the database keeps the microseconds of a value, if it has some."""
        return self.dialect.keeps_microseconds or getattr(value, "microsecond", 0) == 0

    def keeps_row(self, instance: Any) -> bool:
        """Whether a row and each of its values can be flushed later without being observed."""
        plain = self.plain.get(type(instance))
        if plain is None:
            return False
        loaded = sa.inspect(instance).dict
        return all(
            each.may_lack if (value := loaded.get(each.key)) is None else each.check(value) and self.keeps(value)
            for each in plain.columns
        )


class Batch:
    """One batch: what is done before and after each of its events, and each of the handlers' statements."""

    def __init__(self, batches: Batches, session: orm.Session, connection: Connection) -> None:
        self._batches = batches
        self._session: Any = session
        self._connection = connection
        self._begun = session.get_transaction(), connection.get_transaction()
        self._state = _State(batches.flushes_each or not session.autoflush or _has_flush_listeners(session))
        self._flushes = self._state.always_flushes
        """Whether the present event is flushed, and the session's objects expired."""
        self._kept: list[Any] = []
        self._added: list[Any] = []
        """What was added in the present event."""

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Listen to the session and the connection in the block."""
        if self._session not in _heard:
            # For all later batches: to add a listener takes longer than its calls in one batch.
            _heard.add(self._session)
            for name, listener in _OF_SESSIONS.items():
                sa.event.listen(self._session, name, listener)
        # Not to the engine: other threads use it.
        heard = {"before_cursor_execute": self._before_statement, "after_cursor_execute": self._after_statement}
        for target in heard.items():
            sa.event.listen(self._connection, *target)
        self._session.info[_KEY] = self
        try:
            with session_methods(orm.Session, self._session, self._get, self.observe):
                yield
        finally:
            del self._session.info[_KEY]
            for target in heard.items():
                sa.event.remove(self._connection, *target)
            # The last batch is kept until the next one, which may come much later.
            self._kept.clear()
            self._added.clear()

    def _get(self, entity: Any, ident: Any, *, identity_token: Any = None, **options: Any) -> Any:
        """Do what ``Session.get()`` does, which makes twenty calls for a row that the session has."""
        plain = self._batches.plain.get(entity)
        if plain is not None and plain.is_gotten and type(ident) in SCALARS and identity_token is None:
            found = self._session.identity_map.get((entity, (ident,), None))
            if found is not None and not instance_state(found).expired and not any(options.values()):
                return found
        return orm.Session.get(self._session, entity, ident, identity_token=identity_token, **options)

    @property
    def has_failed(self) -> bool:
        """Whether the last statement of its connection has failed."""
        return self._state.is_waiting

    def end_event(self) -> None:
        """Called after the handler of each event.

        :raises HandlerError: when it has ended the transaction.
        :raises ObservedError: when the batch is to begin again.
        """
        if (self._session.get_transaction(), self._connection.get_transaction()) != self._begun:
            raise HandlerError(self._batches.ended)
        if self._state.is_observed:
            raise ObservedError
        # Not the property ``deleted``, which makes a set for each event.
        if self._session._deleted or len(self._kept) > MOST_KEPT:
            self._flushes = True
        for instance in self._added:
            self._look_at_added(instance)
        self._state.has_waiting = not (self._flushes or self._state.sends)
        if not self._state.has_waiting:
            self._send()
        self._added.clear()
        # For models of a host's own ORM, nothing tells whether a statement was sent.
        if self._batches.checks is not None:
            check_now(self._connection, self._batches.checks)

    def _look_at_added(self, instance: Any) -> None:
        plain = self._batches.plain.get(type(instance))
        if plain is None or not self._batches.keeps_row(instance):
            self._flushes = True
        elif plain.checked is not None:
            self._state.sends = True

    def _send(self) -> None:
        self._session.flush()
        if self._state.is_observed:
            raise ObservedError
        self._state.sends = False
        if self._flushes:
            self._forget()
            models = {type(instance) for instance in self._session.identity_map.values()}
            self._flushes = self._state.always_flushes or not all(map(self._batches.is_plain, models))

    def keep(self, instances: Sequence[Any]) -> None:
        """Keep references to loaded objects, as the session has weak ones and would load them again."""
        self._kept += instances

    def noted(self, model: type[Any], key: str, value: Any, *, accepted: bool) -> None:
        """Hear of a value that is set in a row of a plain class, which may be one to flush it for."""
        if not accepted or not self._batches.keeps(value):
            self._flushes = True
        elif (plain := self._batches.plain.get(model)) is not None and key in (plain.checked or ()):
            self._state.sends = True

    def _add(self, instance: Any) -> None:
        self._added.append(instance)

    def _inserted(self, instance: Any) -> None:
        self._kept.append(instance)
        if not self._flushes and not self._batches.keeps_row(instance):
            # A default has given it a value that the database may return changed. An earlier event may have added the
            # row.
            # The error is not raised here, while the session finishes a flush.
            self._flushes = True
            self._state.is_observed = self._state.has_waiting

    def _loaded(self, instance: Any) -> None:
        self._kept.append(instance)
        if not self._flushes and not self._batches.is_plain(type(instance)):
            self._flushes = True

    def _before_flush(self, context: Any, instances: Any) -> None:
        self._state.is_flushing = True
        if self._session.deleted:
            # The database may delete and change further rows with it.
            self._flushes = True
            self._state.is_observed = self._state.is_observed or self._replaces_deleted()

    def _replaces_deleted(self) -> bool:
        """Whether a row that an earlier event has added would take the place of one that is deleted only now."""
        new = [each for each in self._session.new if all(each is not added for added in self._added)]
        keys = {sa.inspect(each).key for each in self._session.deleted}
        return any(sa.inspect(type(each)).identity_key_from_instance(each) in keys for each in new)

    def _after_flush(self, context: Any) -> None:
        self._state.is_flushing = False

    def _forget(self) -> None:
        """Expire the objects that are not being changed, so that they are read again."""
        dirty = self._session.dirty
        for instance in list(self._session.identity_map.values()):
            if instance not in dirty:
                orm.Session.expire(self._session, instance)
        self._kept.clear()

    def _before_statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        self._batches.look(statement, context)
        self._state.is_waiting = True
        if self._state.is_flushing or statement.startswith(_OF_SAVEPOINTS):
            return
        compiled = getattr(context, "compiled", None)
        is_text = compiled is None or isinstance(getattr(compiled, "statement", None), sa.TextClause)
        dialect = self._batches.dialect
        if (is_text and dialect.ends_transaction(statement)) or dialect.commits_implicitly(statement):
            raise HandlerError(self._batches.ended)
        session = self._session
        # A bulk operation has the session marked as flushing, without a flush.
        if session.autoflush and not session._flushing:
            session.flush()
        else:
            self.observe()

    def observe(self) -> None:
        """Called where it would show that changes of earlier events were not flushed, or these would be lost."""
        if self._state.has_waiting and (self._session.new or self._session.dirty):
            # Noted, too: handlers catch errors.
            self._state.is_observed = True
            raise ObservedError

    def _after_statement(
        self, connection: Connection, cursor: Any, statement: str, parameters: Any, context: Any, many: bool
    ) -> None:
        self._state.is_waiting = False
        if not self._state.is_flushing and self._batches.dialect.changes_rows(statement):
            self._forget()


Listener = Callable[..., None]
_heard: weakref.WeakSet[orm.Session] = weakref.WeakSet()


def _telling(method: Callable[..., None]) -> Listener:
    """Return a listener that tells the batch of a session, while there is one."""

    def heard(session: orm.Session, *what: Any) -> None:
        batch = session.info.get(_KEY)
        if batch is not None:
            method(batch, *what)

    return heard


_OF_SESSIONS: Mapping[str, Listener] = {
    "transient_to_pending": _telling(Batch._add),
    # These two as in the recipe "Creating a Strong Referencing Identity Map" of SQLAlchemy's documentation.
    "pending_to_persistent": _telling(Batch._inserted),
    "loaded_as_persistent": _telling(Batch._loaded),
    "before_flush": _telling(Batch._before_flush),
    "after_flush_postexec": _telling(Batch._after_flush),
    "after_soft_rollback": _telling(Batch._after_flush),
}


@dataclass
class _State:
    always_flushes: bool
    sends: bool = False
    """Whether the present event is flushed, as the database may refuse what it has set."""
    has_waiting: bool = False
    """Whether what earlier events have changed may wait to be flushed."""
    is_flushing: bool = False
    is_waiting: bool = False
    """Whether a statement was sent and not answered, or with an error."""
    is_observed: bool = False


def _watch(model: type[Any], columns: Sequence[PlainColumn], checked: frozenset[str]) -> None:
    """Listen to the values that are set in rows of a class, and tell the batch of those that it watches."""
    if model in _watched:
        _watched[model].update(checked)  # Another database may check other columns.
        return
    _watched[model] = {*checked}
    for each in columns:
        # With all that SQLAlchemy offers, as it puts nothing around such a function.
        listener = _setter(each, _watched[model])
        sa.event.listen(each.attribute, "set", listener, raw=True, retval=True, include_key=True)
        sa.event.listen(each.attribute, "remove", listener, raw=True)


def _setter(column: PlainColumn, checked: set[str]) -> Callable[..., Any]:
    name, check, is_key = column.key, column.check, column.is_key
    is_nullable = column.attribute.property.columns[0].nullable
    is_moment = isinstance(column.attribute.type, sa.DateTime)

    def noted(state: Any, value: Any, *before: Any, **key: Any) -> Any:
        # What is removed has no value before, and becomes NULL.
        new = value if len(before) > 1 else None
        # The key of a stored row may be that of another one.
        is_moved = is_key and state.key is not None
        accepted = not is_moved and (is_nullable if new is None else check(new))
        if not accepted or is_moment or name in checked:
            session = state.session
            batch: Batch | None = None if session is None else session.info.get(_KEY)
            if batch is not None:
                batch.noted(state.class_, name, new, accepted=accepted)
        return value

    return noted


def _has_flush_listeners(session: orm.Session) -> bool:
    """Whether other code listens to flushes, and so can observe how many there are."""
    dispatch: Any = session.dispatch
    listeners = [each for name in _FLUSHES for each in getattr(dispatch, name) if each not in _OWN]
    # SQLAlchemy-Utils has one on each session, which does nothing without aggregated attributes.
    return any(each != manager.construct_aggregate_queries or manager.generator_registry for each in listeners)


_FLUSHES = ("before_flush", "after_flush", "after_flush_postexec")
_OWN = tuple(_OF_SESSIONS.values())
