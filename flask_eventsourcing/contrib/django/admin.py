"""The admin of events, checkpoints and dead letters, for each application, where Django's admin is installed.

Everything is read only, for superusers too. The permissions are those of the models, such as
``bank.view_bankstoredevent``. The actions on dead letters have permissions of their own: ``bank.retry_bankdeadletter``
and ``bank.discard_bankdeadletter``.
"""

from __future__ import annotations

from io import StringIO
from typing import Any, ClassVar

from django.contrib import admin, messages
from django.core.exceptions import ValidationError
from django.db.models import Q

from ...commands import CommandError, PlainOutput, UsageError, letters
from ...exceptions import ConfigurationError
from .configuring import configured
from .projecting import projections
from .records import all_records

__all__ = ["CheckpointAdmin", "DeadLetterAdmin", "EventAdmin"]

MOST_ROWS = 10_000
"""The most rows of a list, on all of its pages: to count a whole log takes long, and so do its last pages."""


class _ReadOnly(admin.ModelAdmin):
    """Shows the rows of the database in which the application's events are.

    :param model: the record class.
    :param admin_site: Django's.
    """

    of: ClassVar[str] = ""
    """The name of the application."""
    show_full_result_count = False
    list_per_page = 50

    @property
    def alias(self) -> str | None:
        """The alias of the database, if the setting has the application."""
        try:
            found = configured().get(self.of)
        except ConfigurationError:
            # The system checks report it. A router decides.
            return None
        return None if found is None else found.alias

    def get_queryset(self, request: Any) -> Any:
        """Return the rows of that database, even if a router names another one for reads."""
        return super().get_queryset(request).using(self.alias)

    def get_paginator(self, request: Any, queryset: Any, *arguments: Any, **options: Any) -> Any:
        """Return the pages of the first rows; a search finds the others."""
        return super().get_paginator(request, queryset[:MOST_ROWS], *arguments, **options)

    def lookup_allowed(self, lookup: str, value: Any, request: Any = None) -> bool:
        """Refuse to filter rows by a column that is not shown, because the result would reveal its values."""
        return lookup.partition("__")[0] not in (self.exclude or ()) and bool(
            super().lookup_allowed(lookup, value, request)
        )

    def has_add_permission(self, request: Any) -> bool:
        """Return False: rows are not added here."""
        return False

    def has_change_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: rows are not changed here."""
        return False

    def has_delete_permission(self, request: Any, obj: Any = None) -> bool:
        """Return False: rows are not deleted here."""
        return False

    def has_view_permission(self, request: Any, obj: Any = None) -> bool:
        """Show them to users with the permission to view. A permission to change is not enough."""
        return self._may(request, "view")

    def _may(self, request: Any, what: str) -> bool:
        return bool(request.user.has_perm(f"{self.opts.app_label}.{what}_{self.opts.model_name}"))


class EventAdmin(_ReadOnly):
    """Show events without their states, which may be encrypted or secret.

    Rows cannot be added, changed or deleted, since the aggregate could not be read then.
    """

    list_display = ("notification_id", "originator_id", "originator_version", "topic", "recorded_at")
    exclude = ("state",)
    ordering = ("-notification_id",)
    search_fields = ("originator_id", "correlation_id")
    search_help_text = "The id of an aggregate, or of a correlation, or a topic."

    def get_list_display(self, request: Any) -> Any:
        """Return the columns that the record class has."""
        names = {each.name for each in self.opts.local_concrete_fields}
        return [each for each in self.list_display if each in names]

    def get_search_results(self, request: Any, queryset: Any, search_term: str) -> tuple[Any, bool]:
        """Find rows that have exactly this value, with an index if there is one."""
        term = search_term.strip()
        if not term:
            return queryset, False
        fields = {each.name: each for each in self.opts.local_concrete_fields}
        found = Q(topic=term)
        for name in self.search_fields:
            if name in fields:
                try:
                    match = Q(**{name: fields[name].to_python(term)})
                except ValidationError:
                    # The search term is no id.
                    continue
                if name == "originator_id" and queryset.filter(match).exists():
                    # The other columns have no index.
                    return queryset.filter(match), False
                found |= match
        return queryset.filter(found), False


class CheckpointAdmin(_ReadOnly):
    """Show how far each projection is, which process runs it, and what stopped it.

    Rows cannot be changed: the commands do it, and note who asked for it.
    """

    list_display = ("name", "state", "position", "runner", "error", "changed_by", "reason")
    # A user with that permission could put any text into the name of the runner.
    exclude = ("token",)


class DeadLetterAdmin(_ReadOnly):
    """Show the events that were set aside. Actions apply them again or discard them."""

    list_display = (
        "id",
        "projection",
        "position",
        "originator_id",
        "originator_version",
        "error",
        "attempts",
        "failed_at",
    )
    list_filter = ("projection",)
    ordering = ("projection", "position")
    actions = ("retry", "discard")

    def has_retry_permission(self, request: Any) -> bool:
        """Whether the user may apply events again."""
        return self._may(request, "retry")

    def has_discard_permission(self, request: Any) -> bool:
        """Whether the user may discard events."""
        return self._may(request, "discard")

    @admin.action(permissions=["retry"], description="Apply again, with those that wait behind them")
    def retry(self, request: Any, queryset: Any) -> None:
        """Do what ``manage.py eventsourcing dead-letters retry`` does."""
        self._call(request, queryset, letters.retry_letters)

    @admin.action(permissions=["discard"], description="Give up: the read model will never have these events")
    def discard(self, request: Any, queryset: Any) -> None:
        """Do what ``manage.py eventsourcing dead-letters discard --yes`` does."""
        self._call(request, queryset, letters.discard_letters, yes=True)

    def _call(self, request: Any, queryset: Any, command: Any, **options: Any) -> None:
        said = StringIO()
        # A letter that waits for an earlier one is applied, or stays, together with it.
        ids = list(queryset.exclude(error=None).order_by("projection", "position").values_list("pk", flat=True))
        try:
            if not ids:
                raise UsageError("These wait for an earlier one of their aggregate: choose that one.")
            place = configured()[self.of].place
            status = command(projections().subject(place), PlainOutput(said), ids, **options)
        except (ConfigurationError, CommandError, UsageError) as error:
            self.message_user(request, str(error), messages.ERROR)
            return
        self.message_user(request, said.getvalue().strip(), messages.WARNING if status else messages.SUCCESS)


def register(site: admin.AdminSite = admin.site) -> None:
    """Register the record classes of all applications, except those that you have registered yourself.

    Django calls it for its own admin site. Call it with a site of your own to show them there too.
    """
    for name, records in all_records().items():
        for model, kind in (
            (records.StoredEvent, EventAdmin),
            (records.Projection, CheckpointAdmin),
            (records.DeadLetter, DeadLetterAdmin),
        ):
            if model is not None and not site.is_registered(model):
                site.register(model, kind, of=name)


register()
