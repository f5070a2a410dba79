"""Refuses to save an aggregate object whose state is not stored.

``save()`` takes an object's pending events. If they are rolled back afterwards, a second ``save()`` would store
nothing, or the next event behind a gap. So ``Application._record()``, which sees objects and events, is wrapped, and
the objects whose events were lost are remembered by identity: aggregates are not hashable, and an attribute on them
would get into snapshots.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, ExitStack, suppress
from functools import partial
from typing import Any

from eventsourcing.application import Application, ProcessingEvent
from sqlalchemy import orm

from .._patches import application_method
from ..exceptions import ConfigurationError, FlaskEventSourcingError, SharedAggregateError, StaleAggregateError
from ..persistence import SQLAlchemyAggregateRecorder
from ..persistence.describing import saving
from ..uow import Unit
from ..uow.pending import AfterRollback

UsingSession = Callable[[orm.Session], AbstractContextManager[object]]

HELD = 1_000
"""How many objects that cannot be referenced weakly are remembered."""
NOT_STORED = "its events could not be stored"
ROLLED_BACK = "its events were rolled back"
READ_UNCOMMITTED = "it was read with events that were rolled back"
REMEDY = "so its state is not stored: read it again, or make it again if it is new, within the function that is retried"
SESSION = "call application.save(…, session=…) of the extension's own application, not super().save(…, session=…)"
TWINS = "both have changes, and their versions would collide: read the aggregate once, and change that object"
SHARED = (
    "it is the cached object, which all callers share: read it without deepcopy_from_cache=False, or remove "
    "DEEPCOPY_FROM_AGGREGATE_CACHE from the environment"
)


class RefusedObjects:
    """The objects that must not be saved, each with its error. It keeps no object alive that can be referenced weakly.

    :param held: how many of the others are remembered.
    """

    def __init__(self, held: int = HELD) -> None:
        self._found: dict[int, tuple[Callable[[], Any], type[FlaskEventSourcingError], str]] = {}
        self._held: deque[int] = deque()
        self._bound = held

    def add(self, obj: Any, error: type[FlaskEventSourcingError], reason: str) -> None:
        """Refuse an object from now on."""
        key = id(obj)
        try:
            self._found[key] = weakref.ref(obj, lambda _: self._found.pop(key, None)), error, reason
        except TypeError:
            self._found[key] = (lambda: obj), error, reason
            self._held.append(key)
            if len(self._held) > self._bound:
                self._found.pop(self._held.popleft(), None)

    def check(self, obj: Any) -> None:
        """Refuse an object if it is one of these.

        :raises FlaskEventSourcingError: naming the aggregate and the remedy.
        """
        found = self._found.get(id(obj))
        if found is not None and found[0]() is obj:
            raise found[1](f"{type(obj).__name__} {getattr(obj, 'id', '')} cannot be saved: {found[2]}.")

    def is_shared(self, obj: Any) -> bool:
        """Whether an object is refused because the cache shares it."""
        found = self._found.get(id(obj))
        return found is not None and found[0]() is obj and found[1] is SharedAggregateError

    def __contains__(self, obj: object) -> bool:
        found = self._found.get(id(obj))
        return found is not None and found[0]() is obj


refused: RefusedObjects = RefusedObjects()


def lose(obj: Any, reason: str) -> None:
    """Refuse an object from now on, because its state is not stored."""
    if obj not in refused:
        refused.add(obj, StaleAggregateError, f"{reason}, {REMEDY}")


def share(obj: Any) -> None:
    """Refuse an object from now on, because the cache shares it."""
    refused.add(obj, SharedAggregateError, SHARED)


def lost_with(unit: Unit, objects: Iterable[Any], reason: str) -> None:
    """Refuse objects if the current work is rolled back."""
    for obj in objects:
        unit.on_rollback(_losing(obj, reason))


def _losing(obj: Any, reason: str) -> Callable[[], None]:
    return partial(_lose_referenced, _reference(obj), reason)


def _reference(obj: Any) -> Callable[[], Any]:
    try:
        return weakref.ref(obj)
    except TypeError:
        return lambda: obj


def _lose_referenced(reference: Callable[[], Any], reason: str) -> None:
    obj = reference()
    if obj is not None:
        lose(obj, reason)


def unit_of(recorder: Any) -> Unit | None:
    """Return the unit of work that a recorder joins now."""
    unit = recorder.datastore.unit() if isinstance(recorder, SQLAlchemyAggregateRecorder) else None
    return unit if isinstance(unit, Unit) else None


def watch(recorder: Any, aggregate: Any, aggregate_id: Any) -> None:
    """Refuse an aggregate that was read with uncommitted events, if they are rolled back."""
    unit = unit_of(recorder)
    if unit is not None and unit.has_saved(aggregate_id) and unit.pending.has_events_of(aggregate_id):
        unit.pending.add_beside(aggregate_id, AfterRollback(_losing(aggregate, READ_UNCOMMITTED)))


class Records:
    """Called as ``Application._record()`` of one application."""

    def __init__(self, application: Application[Any]) -> None:
        # The application refers to this object. With a reference back, only the garbage collector would free both.
        self._reference = weakref.ref(application)

    def __call__(self, processing_event: ProcessingEvent[Any]) -> Any:
        """Record, and note whose events these are.

        :raises ConfigurationError: when a session was given that would not be used.
        :raises StaleAggregateError: when the state of an object is not stored.
        :raises SharedAggregateError: when an object is the cache's own.
        """
        application: Any = self._reference()
        unit = unit_of(application.recorder)
        if unit is not None:
            # Other code may have ended the transaction without the session.
            unit.look()
        aggregates = processing_event.aggregates
        ids = {each.originator_id for each in processing_event.events}
        changed = [obj for key, obj in aggregates.items() if key in ids]
        # After any error: save() has removed the events from the object.
        with ExitStack() as failed:
            failed.callback(_give_up, application, changed)
            if processing_event.saved_kwargs.get("session") is not None:
                raise ConfigurationError(f"A session is given to save() of {application.name} itself: {SESSION}.")
            for obj in aggregates.values():
                refused.check(obj)
            if ids:
                _note(unit, changed, ids)
            with saving(processing_event.events):
                recordings = type(application)._record(application, processing_event)
            failed.pop_all()
        return recordings


def _give_up(application: Application[Any], changed: list[Any]) -> None:
    for obj in changed:
        lose(obj, NOT_STORED)
        if refused.is_shared(obj) or not application.repository.fastforward:
            # It was changed, or is older than the stored events.
            evict(application.repository.cache, obj.id)


def _note(unit: Unit | None, changed: list[Any], ids: set[Any]) -> None:
    if unit is not None:
        lost_with(unit, changed, ROLLED_BACK)
        unit.note_saved(ids)


def evict(cache: Any, key: Any) -> None:
    """Remove an aggregate from a cache, if there is a cache and it has the aggregate."""
    if cache is not None:
        with suppress(KeyError):
            getattr(cache, "inner", cache).get(key, evict=True)


def distinct(objs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Return one object for each aggregate: of two objects, the one that has changes.

    The library would know only the last one, even if the events of both are saved.

    :raises StaleAggregateError: when both have changes, of which one cannot follow the other; both stay as they are.
    """
    found: dict[Any, Any] = {}
    dropped = []
    for obj in objs if len(objs) > 1 else ():
        if not hasattr(obj, "collect_events"):
            continue
        other = found.setdefault(obj.id, obj)
        if other is obj:
            continue
        unchanged = [each for each in (obj, other) if not getattr(each, "pending_events", True)]
        if not unchanged:
            raise StaleAggregateError(f"Two objects of {type(obj).__name__} {obj.id} cannot be saved: {TWINS}.")
        dropped.append(id(unchanged[0]))
        found[obj.id] = other if unchanged[0] is obj else obj
    return tuple(obj for obj in objs if id(obj) not in dropped) if dropped else objs


class Saves:
    """Called as ``Application.save()`` of one application.

    :param using_session: makes a session the current one in a ``with`` block, or None if that is not possible.
    """

    def __init__(self, application: Application[Any], using_session: UsingSession | None) -> None:
        # As in Records, the application can be freed as soon as no code uses it.
        self._reference = weakref.ref(application)
        self._using_session = using_session

    def __call__(self, *objs: Any, session: Any = None, **kwargs: Any) -> Any:
        """Save, on the current session or another one, as ``eventsourcing-sqlalchemy`` has it.

        :raises ConfigurationError: when no other session can be used here.
        :raises StaleAggregateError: when two objects of one aggregate have changes.
        :raises TypeError: when it is no session of SQLAlchemy.
        """
        application: Any = self._reference()
        save = type(application).save
        objs = distinct(objs)
        if session is None:
            return save(application, *objs, **kwargs)
        if self._using_session is None:
            raise ConfigurationError(
                f"save(session=…) of {application.name} cannot use another session here: leave the argument out, and "
                "the current session is used."
            )
        if isinstance(session, orm.scoped_session):
            session = session()
        if not isinstance(session, orm.Session):
            raise TypeError(f"save(session=…) takes a session of SQLAlchemy; found {session!r}.")
        with self._using_session(session):
            return save(application, *objs, **kwargs)


def refuse_stale_aggregates(application: Application[Any]) -> None:
    """Let an application's ``save()`` refuse aggregate objects whose events were lost.

    The applications of the extension and of ``PlainHost`` do this already, and so do leaders in the library's runners.
    Call it for an application that you construct yourself; a second call does nothing.
    """
    if not isinstance(vars(application).get("_record"), Records):
        application_method(application, "_record", Records(application))
        application_method(application, "save", Saves(application, None))
