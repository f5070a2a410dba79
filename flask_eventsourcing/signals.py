"""The signals, made with blinker as Flask's own."""

from __future__ import annotations

from blinker import NamedSignal, Namespace

_signals = Namespace()

events_recorded: NamedSignal = _signals.signal("events-recorded")
"""Sent after a transaction with events was committed, never before and never for a rollback.

The sender is the Flask app; the arguments are ``application``, the ``Application`` object, and ``notifications``, a
tuple of ``eventsourcing.persistence.Notification`` in the order of the log. It is sent once for each application that
recorded events in the transaction. A receiver that names a parameter ``recorded`` is given a tuple of
``flask_eventsourcing.metadata.Recorded`` too, with what is known of each of them beside its state. An exception in a
receiver is logged and does not reach the caller of ``commit()``, for whom the commit has succeeded.
"""

events_discarded: NamedSignal = _signals.signal("events-discarded")
"""Sent when events were saved and then neither committed nor rolled back, with the arguments of
``events_recorded``; what was saved is not stored."""
