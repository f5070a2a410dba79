"""Events that other packages for Django have stored, taken over into the tables of an application.

Each application is one transaction, checked event for event before it is committed. Positions are kept.
"""

from __future__ import annotations

from .event_journal import Converted, JournalEvent, import_event_journal
from .landing import Imported
from .stored_events import import_eventsourcing_django

__all__ = ["Converted", "Imported", "JournalEvent", "import_event_journal", "import_eventsourcing_django"]
