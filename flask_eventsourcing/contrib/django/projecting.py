"""Runs the projections of a Django project: makes its databases hosts, and binds the projections to them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache, partial
from typing import Any, TypeVar

import sqlalchemy as sa
from django.db import connections, router, transaction
from django.utils.module_loading import autodiscover_modules
from eventsourcing.application import Application
from sqlalchemy import orm
from sqlalchemy.engine import Connection

from ...applications.apart import ApartHost, EventStore
from ...commands import Subject
from ...exceptions import ConfigurationError, HandlerError, RebuildError
from ...lifecycle import ApplicationSlot, HostSlot
from ...persistence import Datastore
from ...projections.consumers import ProjectedApart, ProjectedApplication
from ...projections.registry import BoundProjections, Registrations
from ...uow import Run
from .configuring import PROGRAM, SETTING
from .hosting import Database, Site, get_application, site
from .in_cassandra import is_engine
from .lending import refresh, sqlalchemy_errors
from .lent_connections import looking_for_tables
from .own_records import place_of
from .projections import USING, ModelProjection, registered
from .records import records_of
from .retrying import run_again
from .rewriting import Rewrite
from .transactions import DjangoUnit, nothing

R = TypeVar("R")

SWALLOWED = (
    "A handler went on after an error that marks the transaction for a rollback: let the error pass, or put what may "
    "fail into an atomic() block of its own."
)


class FieldType(sa.types.UserDefinedType[Any]):
    """The type of a column, as Django writes it.

    :param text: the name of the type in the database.
    """

    cache_ok: bool | None = True

    def __init__(self, text: str) -> None:
        self.text = text

    def get_col_spec(self, **_: Any) -> str:
        """Return the text."""
        return self.text


@cache
def _table_of(model: Any, alias: str) -> sa.Table:
    fields = [(each, each.db_type(connections[alias])) for each in model._meta.local_concrete_fields]
    columns = [
        sa.Column(each.column, FieldType(kind), primary_key=each.primary_key, nullable=each.null)
        for each, kind in fields
        if kind is not None
    ]
    schema, name = place_of(model._meta.db_table)
    return sa.Table(name, sa.MetaData(), *columns, schema=schema)


def call_each(functions: list[Any]) -> None:
    """Have Django log what fails of the functions for after the commit, and call those of the other events too.

    The transaction is stored then, and the position with it.
    """
    functions[:] = [(savepoints, function, True) for savepoints, function, *_ in functions]


class DjangoHost:
    """One of Django's databases as the host of projections. Each transaction is a block of ``atomic()``."""

    def __init__(self, database: Database) -> None:
        self._database = database
        self._alias = database.alias

    @property
    def datastore(self) -> Datastore:
        """The database of the events, the projections and their models."""
        return self._database.datastore

    @contextmanager
    def context(self) -> Iterator[None]:
        """The context of a piece of work that is not a request: its end closes the connection of its thread."""
        try:
            with looking_for_tables(connections[self._alias]):
                yield
        finally:
            wrapper: Any = connections[self._alias]
            if not wrapper.in_atomic_block:
                wrapper.close()

    def unit(self) -> Any:
        """The unit of work of this thread's connection."""
        return self._database.units.current()

    def open_unit(self) -> Any:
        """The same."""
        return self._database.units.current()

    def unit_of(self, session: orm.Session) -> Any:
        """The same, whatever the session."""
        return self._database.units.current()

    @contextmanager
    def transaction(self, *, queueing: bool = False, run: Run | None = None) -> Iterator[orm.Session]:
        """A block, with a session of SQLAlchemy's on Django's connection.

        :raises HandlerError: when it was marked for a rollback, and no error has left it.
        """
        unit: DjangoUnit = self._database.units.current()
        refresh(unit.wrapper)
        with sqlalchemy_errors(self.datastore.engine), transaction.atomic(using=self._alias):
            # So that the transaction is recognized after a savepoint of the handler's was rolled back.
            unit.on_commit(nothing)
            with orm.Session(bind=unit.connection(), info={USING: self._alias}) as session:
                yield session
            if unit.wrapper.needs_rollback:
                raise HandlerError(SWALLOWED)
            if len(unit.wrapper.atomic_blocks) == 1:
                call_each(unit.wrapper.run_on_commit)

    def retry(self, function: Callable[[], R], times: int, *, lenient: bool = False) -> R:
        """Call a function in a block, and again after a conflict, *times* times at most."""
        found: R = run_again(function, times, self._alias)
        return found

    def using(self, connection: Connection) -> AbstractContextManager[orm.Session]:
        """Refuse to write to other tables.

        :raises RebuildError: always.
        """
        raise RebuildError("In a Django project, a projection is rebuilt in one transaction.")

    def using_session(self, session: orm.Session) -> AbstractContextManager[orm.Session]:
        """Refuse a session of SQLAlchemy's.

        :raises ConfigurationError: always.
        """
        raise ConfigurationError("In a Django project, events are saved on Django's connection and no session.")

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """The tables of a model: its own, those of the models that it extends, and those of its relations to many."""
        return _tables_of(model, self._alias)


def _tables_of(model: Any, alias: str) -> Sequence[sa.Table]:
    """Return the tables of a model: its own, those that it extends, and those of its relations to many."""
    options = model._meta
    through = [each.remote_field.through for each in options.local_many_to_many]
    related = [*options.all_parents, *(each for each in through if each._meta.auto_created)]
    return [_table_of(each, alias) for each in (options.concrete_model, *related)]


class DjangoApart(ApartHost):
    """The host of applications whose events are apart, with the methods that commands call.

    :param alias: of the database in which projections have their models.
    """

    def __init__(self, store: EventStore, alias: str) -> None:
        super().__init__(store, nullcontext)
        self._alias = alias

    def tables_of(self, model: Any) -> Sequence[sa.Table]:
        """The tables of a model."""
        return _tables_of(model, self._alias)


class Projections:
    """The projections of the project, by the database of their applications."""

    def __init__(self) -> None:
        autodiscover_modules("projections")
        self.site: Site = site()
        self._registrations = Registrations()
        self.bound: dict[str, BoundProjections] = {}
        for alias, database in self.site.databases.items():
            host: Any = DjangoHost(database)
            self.bound[alias] = BoundProjections(host, self._maker(host), _check_nothing)
        for name, one in self.site.apart.items():
            each = self.site.configured[name]
            apart: Any = DjangoApart(one.store, each.alias)
            self.bound.setdefault(each.place, BoundProjections(apart, self._follow_apart, _check_nothing))
        for cls, of in registered:
            self._bind(cls, of)

    def _maker(self, host: Any) -> Callable[[type[Application[Any]]], ProjectedApplication]:
        def make(of: type[Application[Any]]) -> ProjectedApplication:
            records = self.site.database(of.name).records[of.name]
            models, lease = records.mirror.projections, self.site.configured[of.name].lease
            return ProjectedApplication(host, of.name, lambda: get_application(of), models, lease, rebuild_with=Rewrite)

        return make

    def _follow_apart(self, of: type[Application[Any]]) -> ProjectedApplication:
        """Make what the projections of one application share, if its events are apart."""
        one = self.site.configured[of.name]
        host: Any = DjangoHost(self.site.projected(one.alias))
        models = records_of(of.name, projected=True).mirror.projections
        store = self.site.apart[of.name].store
        find = partial(get_application, of)
        return ProjectedApart(host, of.name, find, models, one.lease, rebuild_with=Rewrite, store=store)

    def _bind(self, cls: type[ModelProjection], of: type[Application[Any]] | str | None) -> None:
        name = self.site.name_of(of)
        application_class = self.site.configured[name].application_class()
        one = self.site.configured[name]
        if is_engine(one.alias):
            raise ConfigurationError(
                f"Projection {cls.__name__} needs a relational database for its models and its position, and "
                f"DATABASES[{one.alias!r}] is Cassandra: name a relational database there."
            )
        _check_router(cls, one.alias)
        cls.engine = self.site.projected(one.alias).datastore.engine
        for place, bound in self.bound.items():
            if place != one.place:
                bound.check_owner(cls, application_class)
        self.bound[one.place].add(self._registrations.add(cls, application_class))

    def subject(self, place: str) -> Subject:
        """Return the subject of commands in one database, or in one cluster with the database of its projections."""
        if place not in self.site.databases:
            return self._subject_apart(place)
        database = self.site.databases[place]
        return Subject(
            commit_mode="atomic",
            datastore=database.datastore,
            application_tables=[
                (name, table) for name, records in database.records.items() for table in records.mirror.tables.values()
            ],
            applications=lambda: {name: slot.get() for name, slot in database.slots.items()},
            projections=self.bound[place],
        )

    def _subject_apart(self, place: str) -> Subject:
        found = {name: each for name, each in self.site.apart.items() if self.site.configured[name].place == place}
        followed = [each.datastore for each in self.bound[place].applications.values()]
        return Subject(
            commit_mode="save",
            datastore=next(iter(followed), None),
            application_tables=[],
            applications=lambda: {name: each.slot.get() for name, each in found.items()},
            projections=self.bound[place],
            store=next(each.store for each in found.values()),
            program=PROGRAM,
        )

    def bound_to(self, projection: type[ModelProjection] | str) -> BoundProjections:
        """Return the projections of the database that has one, or the first where none has it."""
        name = projection if isinstance(projection, str) else projection.name
        having = (each for each in self.bound.values() if any(found.name == name for found in each))
        found = next(having, None) or next(iter(self.bound.values()), None)
        if found is None:
            raise ConfigurationError(f"There is no projection {name!r}, as {SETTING} has no application.")
        return found

    def close(self) -> None:
        """Close the connections that wait for positions."""
        for each in self.bound.values():
            each.close()


def _check_nothing(projection_class: Any, table: sa.Table) -> None:
    """Do nothing: a model has no table in SQLAlchemy, and ``_check_router`` checks its database."""


def _check_router(cls: type[ModelProjection], alias: str) -> None:
    """Check that handlers write the database of the events, where position and models are committed together.

    :raises ConfigurationError: naming the model, and both databases.
    """
    if all(USING in inspect.signature(each).parameters for each in cls.handlers.functions.values()):
        return
    for model in cls.models:
        found = router.db_for_write(model)
        if found != alias:
            raise ConfigurationError(
                f"Projection {cls.__name__} writes {model._meta.label}, which is in {found!r}, and its position is in "
                f"{alias!r}: name 'using' in its handlers and pass it on, or let your router send the model there."
            )


_projections: ApplicationSlot[Projections] = HostSlot(Projections)


def projections() -> Projections:
    """Return the projections of the project, which are looked for at the first call in a process.

    :raises ConfigurationError: when one of them cannot be used.
    """
    found = _projections.get()
    if found.site is not site():
        # The setting was changed, as tests do.
        _projections.close()
        found = _projections.get()
    return found


def wait_for(projection: type[ModelProjection] | str, recordings: Any, timeout: float = 5.0) -> None:
    """Block until a projection has handled the events that ``save()`` recorded, so you can read your own writes.

    Call it after the commit: no worker sees events before that.

    :param projection: its class or its name.
    :param recordings: what ``Application.save()`` returned, or a position of the log.
    :param timeout: in seconds.
    :raises TimeoutError: when it takes longer.
    :raises UncommittedEventsError: inside an ``atomic()`` block that has saved events, which no projection can see.
    :raises ProjectionHaltedError: when the projection has halted at an earlier event, or is paused.
    :raises ConfigurationError: when there is no such projection.
    """
    projections().bound_to(projection).wait_for(projection, recordings, timeout)
