"""Measures this package beside the library's own recorders and ``eventsourcing-sqlalchemy``; ``make bench`` runs it."""
