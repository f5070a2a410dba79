"""Constructs the library's applications on a datastore, with a repository and cache that follow the unit of work.

The library's ``project_aggregate()`` checks with ``isinstance()`` that each event has the attributes of a protocol. Up
to Python 3.11 this takes four times as long as reading and applying the event. Here only the first event of each class
is checked.

The library's repository puts an aggregate into its cache when it is saved or read, before anything is committed, and
fast-forwards the cached object itself. Here an aggregate with uncommitted events is not cached, and a copy is
cached after the commit.

A leader of the library's ``System`` prompts its followers within ``save()``. Followers that run in the caller's thread
are part of its transaction. The others are prompted after the commit, in the order of the log: a receiver that was
prompted for an event never reads earlier ones.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from copy import deepcopy
from dataclasses import fields, is_dataclass
from functools import partial
from itertools import chain
from threading import Lock, RLock, Thread
from typing import Any, TypeVar

from eventsourcing.application import (
    Application,
    Cache,
    ProjectorFunction,
    Repository,
    project_aggregate,
)
from eventsourcing.persistence import PersistenceError
from eventsourcing.system import (
    Leader,
    NewSingleThreadedRunner,
    RecordingEvent,
    RecordingEventReceiver,
    SingleThreadedRunner,
)
from eventsourcing.utils import TopicError

from .._patches import application_method, leader_lead, repository_cache, repository_class
from ..exceptions import AggregateErasedError, SnapshotError
from ..persistence import Datastore, SQLAlchemyAggregateRecorder, SQLAlchemyApplicationRecorder
from ..persistence.dialects.event_tables import LATEST_FIRST_VERSION, EventTable
from ..uow import Unit
from .erasure import refusing_erased
from .library_env import check_environment, environment
from .stale import Saves, UsingSession, evict, refuse_stale_aggregates, share, unit_of, watch
from .upstream import note_upstream

__all__ = [
    "CheckedRepository",
    "CommittedCache",
    "CommittedReceiver",
    "check_environment",
    "construct",
    "environment",
    "install_cache",
    "install_repository",
    "project_checked",
    "refuse_stale_aggregates",
    "take_snapshot",
]

A = TypeVar("A", bound=Application[Any])

logger: logging.Logger = logging.getLogger(__name__)

LONGEST_PAUSE = 0.25
"""The most seconds between two checks whether an event can be read in the log."""


def construct(
    application_class: type[A],
    datastore: Datastore,
    env: Mapping[str, str],
    unit: Callable[[], Unit | None],
    using_session: UsingSession | None = None,
) -> A:
    """Construct an application whose recorders use a datastore.

    :param unit: returns the unit of work of the caller, or None.
    :param using_session: makes a session the current one in a ``with`` block, for ``save(…, session=…)``.
    """
    application = application_class(env=environment(datastore, env, application_class.name))
    install_repository(application)
    install_cache(application, unit)
    refuse_stale_aggregates(application)
    application_method(application, "save", Saves(application, using_session))
    return application


_checked: set[type[Any]] = set()
"""Classes of events are kept for ever, as in the library's own cache of topics."""


def project_checked(aggregate: Any, domain_events: Iterable[Any]) -> Any:
    """Do what ``project_aggregate()`` does, with its check once for each class of events.

    :raises AssertionError: as that does, for an object that is no event of an aggregate.
    """
    for domain_event in domain_events:
        if type(domain_event) in _checked:
            aggregate = domain_event.mutate(aggregate)
        else:
            aggregate = project_aggregate(aggregate, (domain_event,))
            _checked.add(type(domain_event))
    return aggregate


UNFIT = (AttributeError, KeyError, TypeError, ValueError, TopicError)
"""The errors of a snapshot whose class has changed since: an attribute, an upcast or the class itself is missing."""


class CheckedRepository(Repository[Any]):
    """The library's repository, with another default function that applies events.

    An aggregate whose snapshot does not fit its class any more is read from its events.
    """

    def get(
        self,
        aggregate_id: Any,
        *,
        version: int | None = None,
        projector_func: ProjectorFunction[Any, Any] = project_aggregate,
        fastforward_skipping: bool = False,
        deepcopy_from_cache: bool = True,
    ) -> Any:
        """See ``Repository.get()``.

        :raises AggregateErasedError: for an aggregate that was erased, which is an ``AggregateNotFoundError``.
        """
        try:
            aggregate = super().get(
                aggregate_id,
                version=version,
                projector_func=_projector(projector_func),
                fastforward_skipping=fastforward_skipping,
                deepcopy_from_cache=deepcopy_from_cache,
            )
        except AggregateErasedError:
            # Another process may have erased it.
            evict(self.cache, aggregate_id)
            raise
        if self.cache is not None and version is None and not (deepcopy_from_cache and self.deepcopy_from_cache):
            share(aggregate)
        watch(self.event_store.recorder, aggregate, aggregate_id)
        return aggregate

    def _reconstruct_aggregate(self, aggregate_id: Any, version: int | None, projector_func: Any) -> Any:
        found = None
        try:
            found = super()._reconstruct_aggregate(aggregate_id, version, projector_func)
            if self.snapshot_store is not None:
                _check_fields(found)
            return found
        except UNFIT as error:
            aggregate = self._without_snapshot(aggregate_id, version, projector_func, error)
            if aggregate is not None:
                return aggregate
            if found is None:
                raise
            # The event lacks a field, and the snapshot is not the reason.
            return found

    def _without_snapshot(self, aggregate_id: Any, version: int | None, projector_func: Any, error: Exception) -> Any:
        """Return an aggregate that has a snapshot from its events alone, or None."""
        recorder: Any = None if self.snapshot_store is None else self.snapshot_store.recorder
        snapshots = [] if recorder is None else recorder.select_events(aggregate_id, lte=version, desc=True, limit=1)
        aggregate = self.from_events(aggregate_id, version, projector_func) if snapshots else None
        if aggregate is not None and type(aggregate) not in _warned:
            _warned.add(type(aggregate))
            logger.warning(
                "The snapshot of %s %s at version %d no longer fits the class, so the aggregate is read from its "
                "events. This may be so for others: take new snapshots with %s. %s: %s",
                type(aggregate).__qualname__,
                aggregate_id,
                snapshots[0].originator_version,
                recorder.dialect.command("snapshots take --all") if hasattr(recorder, "dialect") else "take_snapshot()",
                type(error).__name__,
                error,
            )
        return aggregate

    def from_events(
        self, aggregate_id: Any, version: int | None = None, projector_func: Any = project_aggregate
    ) -> Any:
        """Make an aggregate from its events alone, without snapshot and cache; None if its first events are missing."""
        events = self.event_store.get(aggregate_id, lte=version)
        first = next(events, None)
        if first is None or first.originator_version > LATEST_FIRST_VERSION:
            return None
        return _projector(projector_func)(None, chain((first,), events))


_warned: set[type[Any]] = set()
"""The classes of aggregates for whose snapshots a warning was logged."""


def _check_fields(aggregate: Any) -> None:
    if is_dataclass(aggregate):
        for field in fields(aggregate):
            # An attribute with a default in the class counts as present.
            getattr(aggregate, field.name)


def _projector(given: Any) -> Any:
    return project_checked if given in (project_aggregate, project_checked) else partial(refusing_erased, given)


def take_snapshot(application: Application[Any], aggregate_id: Any) -> int:
    """Take a snapshot of an aggregate from all of its events, and return its version. Later reads begin there.

    :raises AggregateNotFoundError: when there is no such aggregate, or it was erased.
    :raises SnapshotError: when the application takes no snapshots, or has no class for them.
    """
    if application.snapshots is None:
        raise SnapshotError(
            f"{application.name} takes no snapshots: set is_snapshotting_enabled = True on its class, or "
            "IS_SNAPSHOTTING_ENABLED in EVENTSOURCING_ENV."
        )
    repository = application.repository
    aggregate = repository.from_events(aggregate_id) if isinstance(repository, CheckedRepository) else None
    if aggregate is None:
        aggregate = repository.get(aggregate_id)
    snapshot_class: Any = getattr(type(aggregate), "Snapshot", application.snapshot_class)
    if snapshot_class is None:
        raise SnapshotError(
            f"Neither {type(aggregate).__qualname__} nor {type(application).__qualname__} has a class of snapshots: "
            "define a nested class Snapshot, or the class attribute snapshot_class."
        )
    application.snapshots.put([snapshot_class.take(aggregate)])
    version: int = aggregate.version
    return version


def install_repository(application: Application[Any]) -> None:
    """Give an application a repository of this class, unless it has one of its own."""
    if type(application.repository) is Repository:
        repository_class(application.repository, CheckedRepository)


class CommittedCache(Cache[Any, Any]):
    """Wraps the repository's cache: it has copies of committed aggregates, and never replaces one by an older one.

    :param inner: the cache that the library made, with its size.
    :param unit: returns the unit of work in which the caller is, or None.
    :param events_table: the table of the aggregates' events, where there are units of work.
    """

    def __init__(
        self, inner: Cache[Any, Any], unit: Callable[[], Unit | None], events_table: EventTable | None
    ) -> None:
        super().__init__()
        self.inner = inner
        self.cache: dict[Any, Any] = inner.cache
        self._unit = unit
        self._events_table = events_table
        self._lock = Lock()

    def get(self, key: Any, *, evict: bool = False) -> Any:
        """Return a cached aggregate.

        :raises KeyError: when there is none, or this unit of work has uncommitted events of it.
        """
        unit = self._unit()
        if unit is not None and unit.pending.has_events_of(key):
            raise KeyError(key)
        if unit is not None and self._events_table is not None and unit.queue.active:
            # Before the library takes the aggregate's fast-forward lock: a unit that waited in the queue with that lock
            # would be in the way of the one that is first in it.
            with unit.dialect.translated:
                unit.before_read(unit.connection(), self._events_table, key)
        return self.inner.get(key, evict=evict)

    def put(self, key: Any, value: Any) -> None:
        """Cache a copy of an aggregate, after the commit if it has uncommitted events."""
        if value is None:
            return
        # A copy, as the caller may go on changing the aggregate.
        kept = deepcopy(value)
        unit = self._unit()
        if unit is None or not unit.pending.has_events_of(key):
            self._keep(key, kept)
        else:
            unit.on_commit(partial(self._keep, key, kept))

    def _keep(self, key: Any, kept: Any) -> None:
        # The first to commit need not be the first here, and a reader may have an older snapshot.
        with self._lock:
            try:
                is_older = kept.version < self.inner.get(key).version
            except KeyError:
                is_older = False
            if not is_older:
                share(kept)
                self.inner.put(key, kept)


def install_cache(application: Application[Any], unit: Callable[[], Unit | None]) -> None:
    """Wrap the cache of an application's repository, if it has one."""
    cache = application.repository.cache
    recorder = application.recorder
    if cache is not None and isinstance(recorder, SQLAlchemyAggregateRecorder):
        repository_cache(application.repository, CommittedCache(cache, unit, recorder.events_table))


class CommittedReceiver(RecordingEventReceiver[Any]):
    """Passes saved events to a receiver with threads or queues, once the log can be read up to them.

    :param receiver: the receiver that the leader was to prompt.
    :param leader: whose events they are.
    """

    def __init__(self, receiver: RecordingEventReceiver[Any], leader: Leader[Any]) -> None:
        self.receiver = receiver
        self._closing = leader.closing
        self._recorder: Any = leader.recorder
        # A receiver may save again in this thread.
        self._lock = RLock()
        self._waiting: list[RecordingEvent[Any]] = []
        self._told = 0
        self._thread: Thread | None = None

    def receive_recording_event(self, new_recording_event: RecordingEvent[Any]) -> None:
        """Called by the leader within ``save()``."""
        unit = unit_of(self._recorder)
        first = new_recording_event.recordings[0].notification
        if unit is not None and unit.has_saved(first.originator_id):
            unit.on_commit(partial(self._committed, new_recording_event))
        else:
            self._committed(new_recording_event)

    def _committed(self, event: RecordingEvent[Any]) -> None:
        with self._lock:
            self._waiting.append(event)
            self._waiting.sort(key=_last_position)
        if self._tell():
            return
        with self._lock:
            if self._thread is None:
                # An event before it belongs to a transaction that is still open, perhaps in another process.
                self._thread = Thread(target=self._tell_later, daemon=True, name="eventsourcing-prompts")
                self._thread.start()

    def _tell(self) -> bool:
        """Pass on the events that can be read, and return whether these were all."""
        try:
            high_water_mark = self._recorder.high_water_mark()
        except PersistenceError as error:
            logger.warning("The followers of an application are prompted later, as its log cannot be read: %s", error)
            return False
        with self._lock:
            while self._waiting and _last_position(self._waiting[0]) <= high_water_mark:
                self._pass_on(self._waiting.pop(0))
            return not self._waiting

    def _pass_on(self, event: RecordingEvent[Any]) -> None:
        first, last = event.recordings[0].notification.id, _last_position(event)
        if last <= self._told:
            return
        # Without a previous position the receiver reads the events between, for example those of other processes. The
        # position that the leader knows may be of events that were rolled back.
        previous = self._told if first == self._told + 1 and self._told else None
        self._told = last
        self.receiver.receive_recording_event(RecordingEvent(event.application_name, event.recordings, previous))

    def _tell_later(self) -> None:
        pause = 0.005
        while not self._closing.wait(pause):
            pause = min(LONGEST_PAUSE, 2 * pause)
            with self._lock:
                if not self._waiting:
                    self._thread = None
                    return
            self._tell()


def _last_position(event: RecordingEvent[Any]) -> int:
    return event.recordings[-1].notification.id


_lead = Leader.lead


def lead(self: Leader[Any], follower: RecordingEventReceiver[Any]) -> None:
    """Add a follower, see ``Leader.lead()``; one that does not run in the caller's thread waits for the commit."""
    if isinstance(self.recorder, SQLAlchemyApplicationRecorder):
        refuse_stale_aggregates(self)
        if not isinstance(follower, SingleThreadedRunner | NewSingleThreadedRunner):
            follower = CommittedReceiver(follower, self)
    _lead(self, follower)


leader_lead(Leader, lead)
note_upstream()
