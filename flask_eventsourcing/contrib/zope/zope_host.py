"""Applications on sessions that zope.sqlalchemy has registered."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, TypeVar

import sqlalchemy as sa
from eventsourcing.application import Application
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ...exceptions import ConfigurationError
from ...host import PlainHost, redirected_session
from ...metadata import Provider
from ...models import Models
from ...persistence import DialectOptions
from ...uow import Batch, Run, UnitOfWork, same_database
from .participant import ManagerCommits, TransientConflictError
from .registered import IMPLICIT, REGISTER, current_transaction, has_owner, of_thread, registration_of, watch

R = TypeVar("R")
Sessions = orm.scoped_session[Any] | orm.sessionmaker[Any] | Callable[[], orm.Session]


class ZopeHost(PlainHost):
    """Applications on sessions that take part in the transactions of a transaction manager.

    :param session: a ``scoped_session``, a ``sessionmaker``, or a function that returns the current session.
    :param models: the record classes of each application class.
    :param session_factory: a ``sessionmaker`` for the sessions of workers, which commit by themselves unless they are
        registered too; by default *session*, if it is not a function.
    :param options: options of the database.
    :param env: what the library reads from the environment of an application.
    :param metadata: functions that return metadata for the events of each save; with False none are stored.
    :raises ConfigurationError: when an argument cannot be used.
    """

    def __init__(
        self,
        session: Sessions,
        models: Mapping[type[Application[Any]], Models],
        *,
        session_factory: orm.sessionmaker[Any] | None = None,
        options: DialectOptions | None = None,
        env: Mapping[str, str] | None = None,
        metadata: Sequence[Provider] | Literal[False] = (),
    ) -> None:
        self._session = session
        factory: Any = session if session_factory is None else session_factory
        if not isinstance(factory, orm.scoped_session | orm.sessionmaker):
            raise ConfigurationError(
                f"session_factory={factory!r} must be a sessionmaker, for the sessions of workers, where session is "
                "neither that nor a scoped_session."
            )
        self._conflicts: weakref.WeakKeyDictionary[Any, dict[Any, Any]] = weakref.WeakKeyDictionary()
        commits = ManagerCommits(self)
        super().__init__(
            factory,
            models,
            options=replace(options or DialectOptions(), ends=("transaction.commit()", "transaction.abort()")),
            env=env,
            metadata=metadata,
            commits=commits,
            conflict_error=TransientConflictError,
        )
        for each in (session, factory):
            if isinstance(each, orm.scoped_session | orm.sessionmaker):
                watch(each)
                sa.event.listen(each, "after_begin", self._begun)
                sa.event.listen(each, "after_transaction_end", commits.ended, insert=True)

    # ------------------------------------------------------------------------------------------- the host

    def is_at_work(self) -> bool:
        """Whether a transaction of the sessions' manager has begun in this thread."""
        manager = manager_of(self._session)
        return manager is not None and current_transaction(manager) is not None

    @contextmanager
    def context(self) -> Iterator[None]:
        """A context that leaves no transaction open if there was none at its beginning."""
        managers = {id(each): each for each in map(manager_of, (self._session, self._factory)) if each is not None}
        free = [manager for manager in managers.values() if current_transaction(manager) is None]
        try:
            yield
        finally:
            for manager in free:
                if current_transaction(manager) is not None:
                    manager.abort()

    @contextmanager
    def session(self) -> Iterator[orm.Session]:
        """A context in which a session of the factory is the current one; the caller or its manager commits it."""
        with self.context(), super().session() as session:
            yield session

    @contextmanager
    def using(self, connection: Connection) -> Iterator[orm.Session]:
        """A context in which a new session on *connection* is the current one. It takes part in no transaction.

        :raises ConfigurationError: when there is no such session.
        """
        maker = self._maker()
        if registration_of(maker()) is not None:
            # The class behind that of the factory, to which zope.sqlalchemy listens.
            maker = orm.sessionmaker(class_=maker.class_.__mro__[1], **maker.kw)
        session = redirected_session(maker, self.datastore.engine, connection)
        if registration_of(session) is not None:
            raise ConfigurationError(
                f"Every session of {maker.class_!r} is registered with a transaction manager: pass session_factory=…, "
                "a sessionmaker whose sessions are not registered."
            )
        with self._made_current(session):
            self.unit_of(session).route.bind_arguments = {"bind": connection}
            yield session

    def unit(self) -> UnitOfWork | None:
        """The unit of work to join; in a retry it queues for the aggregates that had conflicts."""
        unit = super().unit()
        if unit is not None:
            self._queue(unit)
        return unit

    def retry(self, function: Callable[[], R], times: int, *, lenient: bool = False) -> R:
        """Call a function in :meth:`transaction`, and again after a conflict, *times* times at most.

        Within a transaction that other code has begun it is called once: the owner has to try again.
        """
        with self._open_session():
            session = self._required().session
            registered = registration_of(session)
            if registered is None or not has_owner(session, registered.transaction_manager):
                return self._runner.retry(function, times, lenient=lenient)
            with self._runner.transaction(run=Run(lenient=lenient)):
                return function()

    # ------------------------------------------------------------------------------------------- sessions

    def _current_session(self) -> orm.Session | None:
        return self._find(make=True)

    def _used_session(self) -> orm.Session | None:
        return self._find(make=False)

    def _find(self, *, make: bool) -> orm.Session | None:
        session = self._session
        if isinstance(session, orm.scoped_session):
            found: orm.Session | None = session() if make or session.registry.has() else None
            return found
        if not isinstance(session, orm.sessionmaker):
            return session()
        manager = manager_of(session)
        if manager is None:
            raise ConfigurationError(f"The sessions of {session!r} take part in no transaction: {REGISTER}.")
        transaction = current_transaction(manager)
        if transaction is None:
            # Outside of an explicit transaction, each save commits on its own, as it does with the bare library.
            if manager.explicit or not make:
                return None
            found = _session_of(manager.get(), session)
            if found is not None:
                found.info[IMPLICIT] = weakref.ref(manager.get())
            return found
        return _session_of(transaction, session, make=make)

    # ------------------------------------------------------------------------------------------- transactions

    def expected_manager(self) -> Any:
        """Return the manager that the session must have, or None if any manager will do."""
        return None

    def committing(self, manager: Any) -> None:
        """See ``Managed``."""

    def doomed(self) -> None:
        """See ``Managed``."""

    def dropped(self, batches: Sequence[Batch], session: orm.Session | None) -> None:
        """See ``Managed``."""

    def memory(self, manager: Any) -> dict[Any, Any]:
        """Return where the conflicts of a manager's transactions are kept until one is committed."""
        return self._conflicts.setdefault(of_thread(manager), {})

    def _may_be_repeated(self) -> bool:
        """Whether a first try queues for aggregates that had conflicts lately."""
        return False

    def _begun(self, session: orm.Session, _: object, connection: Connection) -> None:
        """Queue before the first read of a transaction that is tried again, because that read may fix its snapshot."""
        registered = registration_of(session)
        if registered is None or not self.memory(registered.transaction_manager):
            return
        if same_database(connection.engine, self.datastore.engine):
            self._queue(self.unit_of(session), connection)

    def _queue(self, unit: UnitOfWork, connection: Connection | None = None) -> None:
        registered = registration_of(unit.session)
        if registered is None or unit.shared.depth:
            return
        memory, queue = self.memory(registered.transaction_manager), unit.queue
        queue.remembers = True
        if queue.conflicts is not memory:
            queue.conflicts = memory
        queue.forget_old()
        queue.active = bool(memory) or self._may_be_repeated()
        if memory and not unit.pending and not queue.has_joined:
            with unit.dialect.translated:
                queue.join_conflicting(connection or unit.connection())


def manager_of(factory: Any) -> Any:
    """Return the transaction manager with which a factory of sessions was registered, or None."""
    maker = factory.session_factory if isinstance(factory, orm.scoped_session) else factory
    registered = registration_of(maker()) if isinstance(maker, orm.sessionmaker) else None
    return None if registered is None else registered.transaction_manager


def _session_of(transaction: Any, factory: orm.sessionmaker[Any], *, make: bool = True) -> orm.Session | None:
    """Return the session of a factory in a transaction, which has one."""
    try:
        found: orm.Session | None = transaction.data(factory)
    except KeyError:
        found = factory() if make else None
        if found is not None:
            transaction.set_data(factory, found)
    return found
