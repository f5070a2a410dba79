"""The extension object."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, Generic, ParamSpec, cast, overload
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import Recording
from flask import Flask, has_app_context
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import orm
from typing_extensions import TypeVar

from .applications.erasure import Erasure, erase
from .cli import group
from .config import Config
from .exceptions import ConfigurationError
from .metadata import MetadataBlock, event_metadata
from .models import Models, SnapshotMixin, StoredEventMixin, TrackingMixin
from .projections.definitions import ModelProjection, check_projection
from .projections.registry import Registrations
from .projections.upkeep.following import Health
from .uow import check_times
from .web import uncommitted
from .web.decorators import in_unit
from .web.making import construct_now, followed_by, made_again, made_state, untouched_on_error
from .web.sessions import check_extension, register_extension, registered_extension
from .web.setup import RecordClasses, constructor_of
from .web.state import EXTENSION, Database, current_state, keep, state_of

P = ParamSpec("P")
R = TypeVar("R")
A = TypeVar("A", bound=Application[Any])
First_co = TypeVar("First_co", bound=Application[Any], default=Application[UUID], covariant=True)
Db_co = TypeVar("Db_co", bound=Database, default=SQLAlchemy, covariant=True)
J = TypeVar("J", bound=ModelProjection)
T = TypeVar("T", bound=Callable[..., Application[Any]])


class EventSourcing(Generic[First_co, Db_co]):
    """Make applications of the ``eventsourcing`` library part of Flask apps.

    Events are stored in the app's own database, in the transaction of ``db.session``: they are committed, or rolled
    back, with your models. Each process has one object of each application class::

        es = EventSourcing(db=db, application=Bank)

    :param app: call :meth:`init_app` with it now.
    :param db: the ``SQLAlchemy`` object of Flask-SQLAlchemy or Flask-SQLAlchemy-Lite. Without it, the object that is
        registered on the app is used, and if there is none, one is made.
    :param application: the application class, a subclass of ``eventsourcing.application.Application``; or a function
        that takes ``env`` and returns an application, if the constructor takes more; its return annotation is the
        class. By default the library's plain ``Application``.
    :param applications: several application classes or functions; each application has its own tables.
    :param stored_event_model: your own record class of events, with the columns of ``StoredEventMixin``.
    :param snapshot_model: your own record class of snapshots, with the columns of ``SnapshotMixin``.
    :param tracking_model: your own record class of positions, with the columns of ``TrackingMixin``.
    :param model_class: the declarative base of the default record classes; by default ``db.Model``, and with
        Flask-SQLAlchemy-Lite a base of its own, see :attr:`metadata`.
    :raises ConfigurationError: when an argument cannot be used.

    One object serves any number of Flask apps. Your own record classes are for the first application. For type checkers
    it is generic over the first application and the ``db`` object: ``EventSourcing[Bank]``.
    """

    def __init__(
        self,
        app: Flask | None = None,
        *,
        db: Db_co | None = None,
        application: Callable[..., First_co] | None = None,
        applications: Iterable[Callable[..., Application[Any]]] = (),
        stored_event_model: type[object] | None = None,
        snapshot_model: type[object] | None = None,
        tracking_model: type[object] | None = None,
        model_class: type[object] | None = None,
    ) -> None:
        self._db: Db_co | None = None if db is None else check_extension(db)
        self._made_db: Any = None
        self._constructors: dict[type[Application[Any]], Any] = {}
        self._stands_in = False
        own_models = {
            "stored_event_model": stored_event_model,
            "snapshot_model": snapshot_model,
            "tracking_model": tracking_model,
        }
        self._records = RecordClasses(own_models, model_class)
        self._registrations = Registrations()
        self._apps: weakref.WeakSet[Flask] = weakref.WeakSet()
        for each in (application, *applications) if application is not None else applications:
            self._add(each)
        if app is not None:
            self.init_app(app)

    def register(self, application: T) -> T:
        """Register an application class, or a factory of one; usable as a decorator, before :meth:`init_app`.

        If there was no class at :meth:`init_app`, the first one that is registered later replaces the library's plain
        ``Application``, unless that was already used.

        :raises ConfigurationError: when it is no application, its name is taken, or an app was initialised already.
        """
        if self._stands_in and self._apps:
            self._replace_plain(application)
            return application
        if self._apps:
            raise ConfigurationError(
                f"{application!r} is registered after es.init_app(app): register it before, as its tables belong "
                "to the app's models."
            )
        self._add(application)
        return application

    def _add(self, given: Any) -> None:
        application_class, constructor = constructor_of(given)
        for other in self._constructors:
            if other.name.lower() == application_class.name.lower():
                raise ConfigurationError(
                    f"Two application classes are called {application_class.name!r}, so they would share their tables: "
                    "set another class attribute 'name' on one of them."
                )
        self._constructors[application_class] = constructor

    def _replace_plain(self, given: Any) -> None:
        former = [state_of(app) for app in self._apps]
        used = any(slot.constructed for state in former for slot in state.slots.values())
        if used or self._records.created or self._registrations.entries:
            raise ConfigurationError(
                f"{given!r} is registered too late: the plain Application, which es.init_app(app) took as there was no "
                "application class, was used already. Register before init_app, or before anything is used."
            )
        application_class, constructor = constructor_of(given)
        constructors = {application_class: constructor}
        with self._records.untouched_on_error():
            states = [made_again(each, constructors, self._records, self._registrations) for each in former]
            for made in states:
                construct_now(made)
        for state, made in zip(former, states, strict=True):
            made.prepare()
            state.take(made)
        self._records.forget(Application.name)
        self._constructors, self._stands_in = constructors, False

    @overload
    def projection(self, projection_class: type[J], /) -> type[J]: ...

    @overload
    def projection(self, /, *, of: type[Application[Any]] | None = None) -> Callable[[type[J]], type[J]]: ...

    def projection(self, projection_class: Any = None, /, *, of: type[Application[Any]] | None = None) -> Any:
        """Register a projection, a subclass of ``ModelProjection``; a decorator, before or after :meth:`init_app`.

        Unless it is inline, the command ``run`` keeps its models up to date, in a process of its own.

        :param of: the application class whose events it follows; not needed if there is only one.
        :raises ConfigurationError: when the class cannot be used; the message says why.
        """

        def decorate(decorated: type[J]) -> type[J]:
            followed = followed_by(decorated, of, list(self._constructors))
            states = [state_of(app) for app in self._apps]
            # All is checked before anything is registered.
            models = check_projection(decorated).models
            for state in states:
                state.check_models(decorated, models, followed)
                state.projections.check_owner(decorated, followed)
            registration = self._registrations.add(decorated, followed)
            for state in states:
                state.projections.add(registration)
            return decorated

        return decorate if projection_class is None else decorate(projection_class)

    def init_app(self, app: Flask) -> None:
        """Register on a Flask app, after ``db.init_app(app)`` and after its configuration is complete.

        Everything is checked before anything is registered; no table is created and no connection opened.

        :raises ConfigurationError: naming the fault and the remedy; the app is left as it was.
        """
        if not isinstance(app, Flask):
            raise ConfigurationError(f"init_app takes a Flask app; found {app!r}.")
        if EXTENSION in app.extensions:
            raise ConfigurationError(
                f"Flask-EventSourcing is registered on the app {app.name!r} already: call init_app once for an app, "
                "and pass several application classes to one EventSourcing(applications=…)."
            )
        config = Config.from_mapping(app.config)
        stands_in = self._stands_in or not self._constructors
        constructors = self._constructors or {Application: Application}
        with untouched_on_error(app), self._records.untouched_on_error():
            db = self._db or registered_extension(app)
            made_db = None if db is not None or config.is_apart else register_extension(app, self._made_db)
            state = made_state(app, db or made_db, config, constructors, self._records, self._registrations)
            construct_now(state)
            uncommitted.install(state)
            app.cli.add_command(group)
            app.shell_context_processor(lambda: {"es": self})
            app.extensions[EXTENSION] = state
            state.prepare()
        # From here on nothing fails.
        uncommitted.connect(state)
        keep(state)
        self._apps.add(app)
        self._made_db, self._constructors, self._stands_in = made_db or self._made_db, constructors, stands_in
        if stands_in:
            self._records.watch(Application.name)

    @property
    def application(self) -> First_co:
        """The single application of the current Flask app and this process, the first one where there are several.

        It is constructed at its first use. Ask for it each time and do not keep it, as another app or a forked process
        has another one.

        :raises NotInitializedError: outside an application context, or before :meth:`init_app`.
        """
        return cast(First_co, current_state().application)

    def __getitem__(self, application_class: type[A]) -> A:
        """Return the single instance of an application class: ``es[Bank]``. There is one for each app and process.

        :raises ConfigurationError: when the class is not registered.
        """
        return current_state()[application_class]  # type: ignore[return-value]

    @property
    def db(self) -> Db_co:
        """The ``SQLAlchemy`` object in use. It was passed, was found on the app, or was made by :meth:`init_app`."""
        db = current_state().db if has_app_context() else self._db or self._made_db
        if db is None:
            raise ConfigurationError("There is no db yet: call es.init_app(app), or use it in an application context.")
        return cast(Db_co, db)

    @property
    def models(self) -> dict[type[Application[Any]], Models]:
        """The record classes by application class. With several, query ``es.models[Bank].StoredEvent``."""
        found = self._known_models()
        return {cls: found[cls.name] for cls in self._constructors}

    @property
    def StoredEvent(self) -> type[StoredEventMixin]:  # noqa: N802
        """The record class of the first application's events. Query it, and let ``save()`` write it."""
        return next(iter(self.models.values())).StoredEvent

    @property
    def Snapshot(self) -> type[SnapshotMixin]:  # noqa: N802
        """The record class of the first application's snapshots. It has no rows unless snapshots are taken."""
        return next(iter(self.models.values())).Snapshot

    @property
    def Tracking(self) -> type[TrackingMixin]:  # noqa: N802
        """The record class of positions. It has rows if the first application follows the logs of others."""
        return next(iter(self.models.values())).Tracking

    @property
    def metadata(self) -> sa.MetaData:
        """The metadata of the record classes, for Alembic and ``create_all`` with Flask-SQLAlchemy-Lite.

        With Flask-SQLAlchemy it is that of ``db``, so that ``db.create_all()`` and Flask-Migrate see the tables.
        """
        return self.StoredEvent.metadata

    def _known_models(self) -> dict[str, Models]:
        if has_app_context():
            state = current_state()
            if state.apart is not None:
                raise ConfigurationError(f"There are no record classes: the events are in {state.apart.store.title}.")
            return dict(state.models)
        return self._records.only()

    def transaction(self) -> AbstractContextManager[orm.Session]:
        """A unit of work: commits ``db.session`` on success, rolls it back on error.

        Within another one it joins that, and the outermost commits. If an inner one fails and its error is caught, the
        outer one is rolled back too.

        :raises NotInitializedError: outside an application context.
        :raises RollbackOnlyError: from the outermost, when an inner one had failed.
        """
        return current_state().current_host.transaction()

    @staticmethod
    def event_metadata(**metadata: str) -> MetadataBlock:
        """Add metadata to the events saved in a block. See :func:`~flask_eventsourcing.metadata.event_metadata`."""
        return event_metadata(**metadata)

    def using(self, session: orm.Session | orm.scoped_session[Any]) -> AbstractContextManager[orm.Session]:
        """A context in which a session of your own is the current one, also as ``db.session``.

        You commit and close it. Blocks may be nested.

        :raises ConfigurationError: when it is for another database than that of the events.
        :raises NotInitializedError: outside an application context.
        """
        return current_state().using(session)

    @overload
    def transactional(self, function: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def transactional(self, /, *, status: bool = True) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def transactional(self, function: Callable[..., Any] | None = None, /, *, status: bool = True) -> Any:
        """Run a function, such as a view, in :meth:`transaction`; a coroutine function is awaited in it.

        In a request, the outermost one is also rolled back if it returns a response with a status of 400 or more.

        :param status: set it to False for a function that is no view, whose return value has no status.
        :raises ConfigurationError: for a generator function.

        .. versionchanged:: 0.1.0 It rolls back for a status of 400 or more, and awaits coroutine functions.
        """
        decorate = partial(in_unit, times=None, status=status, noted=self._registrations.transactional)
        return decorate if function is None else decorate(function)

    @overload
    def retry_on_conflict(self, function: Callable[P, R], /) -> Callable[P, R]: ...

    @overload
    def retry_on_conflict(
        self, /, *, times: int = 3, status: bool = True
    ) -> Callable[[Callable[P, R]], Callable[P, R]]: ...

    def retry_on_conflict(
        self, function: Callable[..., Any] | None = None, /, *, times: int = 3, status: bool = True
    ) -> Any:
        """Run a function as :meth:`transactional` does, and all of it again after an optimistic conflict.

        The next try waits for a short random time, and queues for the aggregates that had the conflict before it reads
        them, so it does not lose the race again. If there were uncommitted events or unflushed models before the
        function began, the conflict is raised at once, as they could not be saved again.

        :param times: how often the function is run again, at most; the last conflict is raised.
        :param status: set it to False for a function that is no view, whose return value has no status.
        :raises ConfigurationError: when *times* is not a whole number from 0 up, or for a generator function.
        """
        check_times(times)
        decorate = partial(in_unit, times=times, status=status)
        return decorate if function is None else decorate(function)

    def wait_for(
        self,
        projection: type[ModelProjection] | str,
        recordings: Iterable[Recording[Any] | int] | int,
        timeout: float = 5.0,
    ) -> None:
        """Block until a projection has handled the events that ``save()`` recorded, so you can read your own writes.

        Call it after the commit, and only where the next page would miss a row: it makes a request as slow as the
        worker.

        :param recordings: what ``Application.save()`` returned, or a position of the log.
        :param timeout: in seconds.
        :raises TimeoutError: when it takes longer.
        :raises UncommittedEventsError: when there are uncommitted events, which no projection can see.
        :raises ProjectionHaltedError: when the projection has halted at an earlier event, or is paused.
        """
        current_state().projections.wait_for(projection, recordings, timeout)

    def health(self) -> Health:
        """Return the state of every projection, with a few queries for each. Let monitoring ask for ``es.health().ok``.

        :raises NotInitializedError: outside an application context.
        """
        return current_state().projections.health()

    def erase(
        self, aggregate_id: UUID | str, application: type[Application[Any]] | None = None, *, redact: bool = False
    ) -> Erasure:
        """Erase an aggregate with your next commit: its events, snapshots and dead letters.

        A last event, :class:`~flask_eventsourcing.AggregateErased`, stays in the log and tells projections.

        :param application: the application class; not needed for the first one.
        :param redact: empty the events rather than delete their rows, so no position of the log is missing.
        :return: how many of each were erased.
        :raises AggregateNotFoundError: when nothing is stored of it.
        :raises IdentifierTypeError: for an id of another type than the application's.
        :raises UncommittedEventsError: when this transaction has events of it already.
        :raises IntegrityError: when another writer saves an event of it meanwhile.
        """
        state = current_state()
        erased = state.application if application is None else state[application]
        return erase(erased, aggregate_id, redact=redact, dead_letters=state.projections.dead_letters_of(erased.name))

    def close(self, app: Flask | None = None) -> None:
        """Close the applications of one Flask app, or of all that this object serves, in this process.

        It may be called again. An application that is used afterwards is constructed again.
        """
        for each in [app] if app is not None else list(self._apps):
            state_of(each).close()
