"""The applications of a Django project: one object of each in a process, on the connections of Django."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, overload

from eventsourcing.application import Application

from ...applications import check_environment, construct
from ...applications.apart import ApartHost, id_type_of
from ...exceptions import ApplicationInitializedError, ConfigurationError
from ...host import by_application, recordings_of, send_each, send_recorded
from ...lifecycle import ApplicationSlot, HostSlot
from ...persistence import Datastore
from ...persistence.datastore import Read
from ...signals import events_discarded, events_recorded
from ...uow import Batch
from .configuring import EXAMPLE, SETTING, Configured, configured, options_of
from .in_cassandra import ApartApplication, new_store
from .lending import is_shared, make_engine
from .of_requests import make_collector
from .records import Records, records_of
from .transactions import DjangoUnit, DjangoUnits

A = TypeVar("A", bound=Application[Any])

logger: logging.Logger = logging.getLogger(__name__)

NAMED = 5
REMEDY = (
    "let an error leave its atomic() block, put code that may fail into an atomic() block of its own, and commit if "
    "you have switched autocommit off"
)


@dataclass(frozen=True, eq=False)
class DjangoDatastore(Datastore):
    """A database that is used on Django's connections: recorders always join the thread's connection."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # The user's tests may count statements.
        self.dialect.looks_again = False

    def prepare(self) -> None:
        """Do nothing: Django has set up the connections."""

    def reading(self, *, join: bool = True) -> Read:
        """Return a connection for a reader: the thread's, unless its transaction hides commits of others.

        In a test case it is always the thread's, because no other connection sees the rows of the test.
        """
        unit: Any = self.unit()
        return Read(self, unit if join or not _has_own_transaction(unit) else None)


def _has_own_transaction(unit: DjangoUnit) -> bool:
    return unit.in_transaction and not is_shared(unit.wrapper)


class Database:
    """The applications whose events are in one of Django's databases.

    :param beside: the applications that have only their projections there.
    """

    def __init__(self, alias: str, found: Sequence[Configured], beside: Sequence[Configured] = ()) -> None:
        self.alias = alias
        self.records: dict[str, Records] = {each.name: records_of(each.name) for each in found}
        engine = make_engine(alias)
        tables = {name: records.mirror.tables for name, records in self.records.items()}
        plain = DjangoDatastore(engine, options_of([*found, *beside]), tables.get, metadata=make_collector(found))
        for each in tables.values():
            plain.dialect.check_names(each.values())
        self.units = DjangoUnits(alias, plain, self._publish, self.lose)
        self.datastore = plain.joining(self.units.current)
        self.slots: dict[str, ApplicationSlot[Application[Any]]] = {
            each.name: HostSlot(partial(self._construct, each)) for each in found
        }

    def _construct(self, one: Configured) -> Application[Any]:
        application_class = one.application_class()
        check_environment(one.env, [application_class], f"{SETTING}[{one.name!r}]['ENV']")
        return construct(application_class, self.datastore, dict(one.env), self.units.current)

    def _publish(self, batches: Sequence[Batch]) -> None:
        if events_recorded.receivers:
            for name, notifications in by_application(batches).items():
                application = self.slots[name].get()
                send_recorded(application, application, notifications, partial(recordings_of, batches, name))

    def lose(self, batches: Sequence[Batch]) -> None:
        """Log that events were lost although no code asked for a rollback, and send ``events_discarded``."""
        logger.error("%s", lost_text(batches))
        for name, notifications in by_application(batches).items():
            application = self.slots[name].get()
            send_each(events_discarded, application, application=application, notifications=notifications)


def lost_text(batches: Sequence[Batch]) -> str:
    """Return the message for events that were saved and are not stored."""
    events = [f"{each.originator_id} version {each.originator_version}" for batch in batches for each in batch.events]
    named = ", ".join(events[:NAMED]) + (", …" if len(events) > NAMED else "")
    return f"{len(events)} events were saved but are not stored, although no code rolled them back ({named}): {REMEDY}."


def make_apart(found: Sequence[Configured]) -> dict[str, ApartApplication]:
    """Make the applications whose events are in Cassandra; those in one keyspace share a store.

    :raises ConfigurationError: when a class cannot be imported, or the driver cannot be used.
    """
    groups: dict[str, list[Configured]] = {}
    for each in found:
        first = groups.setdefault(each.place, [each])[0]
        if (first.cassandra, first.alias) != (each.cassandra, each.alias):
            raise ConfigurationError(
                f"{SETTING}[{first.name!r}] and {SETTING}[{each.name!r}] have their events in one place, "
                f"{each.place!r}: write the same for CASSANDRA and DATABASE in both."
            )
        if each is not first:
            groups[each.place].append(each)
    made: dict[str, ApartApplication] = {}
    for group in groups.values():
        classes = {each.name: each.application_class() for each in group}
        for each in group:
            check_environment(each.env, [classes[each.name]], f"{SETTING}[{each.name!r}]['ENV']")
        id_types = {each.name: id_type_of(classes[each.name], each.env) for each in group}
        store = new_store(group[0].cassandra, make_collector(group), id_types)
        made |= {each.name: ApartApplication(classes[each.name], store, dict(each.env)) for each in group}
    return made


class Site:
    """All applications of the project.

    :raises ConfigurationError: when the setting cannot be used.
    """

    def __init__(self) -> None:
        self.configured = configured()
        by_alias: dict[str, list[Configured]] = {}
        for each in self.configured.values():
            if not each.is_apart:
                by_alias.setdefault(each.alias, []).append(each)
        self.databases = {alias: Database(alias, found) for alias, found in by_alias.items()}
        self.apart = make_apart([each for each in self.configured.values() if each.is_apart])
        """The applications whose events are in no database of Django's, by their names."""
        self._beside: dict[str, Database] = {}

    def database(self, name: str) -> Database:
        """Return the database of an application.

        :raises ConfigurationError: when its events are in none of Django's.
        """
        if name in self.apart:
            title = self.apart[name].store.title
            raise ConfigurationError(f"The events of {name} are in {title}, and in no database of Django's.")
        return self.databases[self.configured[name].alias]

    def projected(self, alias: str) -> Database:
        """Return a database in which projections have their models, with or without events."""
        if alias not in self.databases and alias not in self._beside:
            beside = [each for each in self.configured.values() if each.is_apart and each.alias == alias]
            self._beside[alias] = Database(alias, (), beside)
        return self.databases.get(alias) or self._beside[alias]

    def slot(self, name: str) -> ApplicationSlot[Application[Any]]:
        """Return the slot that holds the single object of an application."""
        return self.apart[name].slot if name in self.apart else self.database(name).slots[name]

    def host_apart(self, context: Callable[[], AbstractContextManager[object]] = nullcontext) -> ApartHost | None:
        """Return the host of units of work if no database of Django's has events, so that no event can be rolled back.

        :param context: returns the context of a piece of work.
        """
        stores = [each.store for each in self.apart.values()]
        return ApartHost(stores[0], context) if stores and not self.databases else None

    def name_of(self, application: type[Application[Any]] | str | None) -> str:
        """Return the name of an application, given by its class or name; None means the only one.

        :raises ConfigurationError: when the setting does not have it.
        """
        known = ", ".join(map(repr, self.configured)) or "none"
        if application is None:
            if len(self.configured) == 1:
                return next(iter(self.configured))
            raise ConfigurationError(f"{SETTING} has several applications ({known}): say which one.")
        name = application if isinstance(application, str) else application.name
        if name not in self.configured:
            raise ConfigurationError(f"{SETTING} has no application {name!r} (there are: {known}).")
        if not isinstance(application, str) and self.configured[name].application_class() is not application:
            raise ConfigurationError(
                f"{SETTING}[{name!r}] is {self.configured[name].path!r}, and not {application.__module__}."
                f"{application.__qualname__}."
            )
        return name

    def close(self) -> None:
        """Close the applications of this process."""
        for each in self.apart.values():
            each.slot.close()
            each.store.close()
        for database in (*self.databases.values(), *self._beside.values()):
            for slot in database.slots.values():
                slot.close()
            # The connections that it has beside Django's own.
            database.datastore.engine.dispose()

    def units(self) -> Mapping[str, DjangoUnit]:
        """Return the units of work of this thread, by the alias of the database."""
        return {alias: database.units.current() for alias, database in self.databases.items()}


_site: ApplicationSlot[Site] = HostSlot(Site)


def site() -> Site:
    """Return the applications of the project; the first call in a process makes them.

    :raises ConfigurationError: when the setting cannot be used.
    """
    return _site.get()


def reset(*, setting: str = SETTING, **_: Any) -> None:
    """Close the applications and read the setting again, after it was changed, as tests do."""
    if setting in (SETTING, "DATABASES"):
        _site.close()


def init_application() -> Application[Any]:
    """Construct all applications of the project, and return the first one.

    You need not call it, since :func:`get_application` constructs an application at its first use. Call it where the
    first request should not wait for that, for example in a server's hook for a new worker.

    :raises ApplicationInitializedError: when one was constructed already in this process.
    """
    found = site()
    slots = [found.slot(name) for name in found.configured]
    if any(slot.constructed for slot in slots):
        raise ApplicationInitializedError
    made = [slot.init() for slot in slots]
    if not made:
        raise ConfigurationError(f"{SETTING} has no application: write for example {EXAMPLE}.")
    return made[0]


@overload
def get_application(application: type[A]) -> A: ...
@overload
def get_application(application: str | None = None) -> Any: ...
def get_application(application: type[Application[Any]] | str | None = None) -> Any:
    """Return the single object of an application in this process; the first call constructs it.

    Its events are rows of the transaction that ``atomic()`` has begun, and are rolled back with it::

        with transaction.atomic():
            get_application(Bank).open_account(owner)
            Note.objects.create(text="opened")

    :param application: its class or its name; not needed if there is only one.
    :raises ConfigurationError: when the setting ``EVENTSOURCING`` has no such application, or cannot be used.
    """
    found = site()
    return found.slot(found.name_of(application)).get()


def close_application() -> None:
    """Close the applications of this process.

    It may be called again. An application that is used afterwards is constructed again.
    """
    if _site.constructed:
        _site.get().close()
