"""What eventsourcing-django 0.6 has stored: the events of all applications in one table, with one row of positions."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from django.db.models import Max
from eventsourcing.application import Application

from ....exceptions import ConfigurationError, ImportedEventsError
from ..hosting import site
from .landing import (
    Imported,
    Landing,
    by_position,
    check_tables,
    notification_tracking,
    snapshots,
    stored_events,
)

COLUMNS = ("originator_id", "originator_version", "topic", "state")


def import_eventsourcing_django(
    *applications: type[Application[Any]] | str, using: str = "default", dry_run: bool = False
) -> Iterator[Imported]:
    """Take over what eventsourcing-django has stored, one application after the other.

    Events keep their positions, with gaps, because all applications shared one sequence; so the positions of followers
    stay right. Snapshots are taken over unchanged. Each event is compared, and read with the application.

    :param applications: the names of the applications; by default all that the table has.
    :param using: the alias of the database with ``stored_events``.
    :param dry_run: whether to roll back at the end of each application.
    :raises ConfigurationError: when the tables, or an application in the setting, are not there.
    :raises ImportedEventsError: when an event differs or cannot be read; the application's tables are as before.
    """
    check_tables(using, (stored_events(), snapshots(), notification_tracking()))
    for name in _names(applications, using):
        yield _Former(name, using).take_over(dry_run=dry_run)


def _names(applications: Sequence[type[Application[Any]] | str], using: str) -> Sequence[str]:
    known = site()
    stored = stored_events().objects.using(using).order_by("application_name")
    found = list(stored.values_list("application_name", flat=True).distinct())
    if applications:
        names = [known.name_of(each) for each in applications]
        wanted: str | None = next((each for each in names if each not in found), None)
        text = f"Table stored_events of {using!r} has no events of {wanted!r}: it has {_listed(found)}."
    else:
        names = found
        wanted = next((each for each in found if each not in known.configured), None)
        text = (
            f"Table stored_events of {using!r} has events of {wanted!r}, which EVENTSOURCING does not have: add it "
            f"there, or name the applications to take over, of {_listed(found)}."
        )
    if wanted is not None:
        raise ConfigurationError(text)
    return names


def _listed(names: Sequence[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


class _Former:
    """One application in the tables of that package."""

    def __init__(self, name: str, using: str) -> None:
        self._landing: Landing[Any] = Landing(name, self._made, self._differs)
        self._name, self._using = self._landing.name, using
        self._records = self._landing.records

    def take_over(self, *, dry_run: bool) -> Imported:
        """Take the application over."""
        last = self._of(stored_events()).aggregate(last=Max("pk"))["last"]
        return self._landing.land(lambda: by_position(self._of(stored_events())), last, self._beside, dry_run=dry_run)

    def _of(self, model: Any) -> Any:
        return model.objects.using(self._using).filter(application_name=self._name)

    def _made(self, row: Any) -> Any:
        values = {name: getattr(row, name) for name in COLUMNS}
        return self._records.StoredEvent(notification_id=row.pk, **values)

    def _differs(self, row: Any, event: Any) -> str | None:
        for name in COLUMNS:
            if getattr(row, name) != getattr(event, name):
                return f"has another {name} than in stored_events"
        self._landing.read(event)
        return None

    def _beside(self, was_there: bool) -> Sequence[int]:
        return self._copy_snapshots(was_there), self._copy_tracking(was_there)

    def _copy_snapshots(self, was_there: bool) -> int:
        taken = 0
        own = self._records.Snapshot.objects.using(self._landing.alias)
        for row in by_position(self._of(snapshots())):
            values = {name: getattr(row, name) for name in COLUMNS}
            key = {name: values.pop(name) for name in COLUMNS[:2]}
            if not was_there:
                own.get_or_create(**key, defaults=values)
            taken += 1
        return taken

    def _copy_tracking(self, was_there: bool) -> int:
        own = self._records.Tracking.objects.using(self._landing.alias)
        found = self._of(notification_tracking()).values("upstream_application_name").order_by()
        positions = found.annotate(last=Max("notification_id")).values_list("upstream_application_name", "last")
        for upstream, last in positions:
            if not was_there:
                own.update_or_create(application_name=upstream, defaults={"notification_id": last})
            elif not own.filter(application_name=upstream, notification_id__gte=last).exists():
                raise ImportedEventsError(
                    f"{self._name} had processed {upstream} up to position {last}, and its tracking table does not "
                    "say so. Empty the application's tables, and take them over again."
                )
        return len(positions)
