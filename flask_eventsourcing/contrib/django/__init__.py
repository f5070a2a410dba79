"""Event sourcing in a Django project: events are rows of the transaction that ``atomic()`` has begun.

Add ``"flask_eventsourcing.contrib.django"`` to ``INSTALLED_APPS``; ``docs/django.md`` has the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .hosting import close_application, get_application, init_application
    from .projecting import wait_for
    from .retrying import retry_on_conflict
    from .task_site import project_site

__all__ = ["close_application", "get_application", "init_application", "project_site", "retry_on_conflict", "wait_for"]

_PLACES = {
    "close_application": "hosting",
    "get_application": "hosting",
    "init_application": "hosting",
    "project_site": "task_site",
    "retry_on_conflict": "retrying",
    "wait_for": "projecting",
}


def __getattr__(name: str) -> Any:
    # Django imports this module before the settings exist.
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
