"""The app of the package, for ``INSTALLED_APPS``; it has no models of its own, and writes no migration."""

from __future__ import annotations

import os

from django.apps import AppConfig
from django.core import checks
from django.core.signals import setting_changed
from django.db.backends.signals import connection_created

from ...applications.known_sites import add_kind


class EventSourcingConfig(AppConfig):
    """Register the system checks, and the project as a site of task queues.

    Django finds it by ``"flask_eventsourcing.contrib.django"`` in ``INSTALLED_APPS``.
    """

    name = "flask_eventsourcing.contrib.django"
    label = "eventsourcing"
    verbose_name = "Event sourcing"

    def ready(self) -> None:
        """Register the system checks; nothing is constructed, and no database is asked."""
        from .hosting import reset
        from .lending import close_before_fork, leave_after_fork, note_process
        from .system_checks import check_databases, check_setting
        from .task_site import DjangoSites

        checks.register(check_setting, "eventsourcing")
        checks.register(check_databases, checks.Tags.database)
        add_kind(DjangoSites(), last=True)
        setting_changed.connect(reset, dispatch_uid="flask_eventsourcing")
        connection_created.connect(note_process, dispatch_uid="flask_eventsourcing")
        os.register_at_fork(before=close_before_fork, after_in_child=leave_after_fork)
