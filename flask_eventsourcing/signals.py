"""The signals, made with blinker as Flask's own."""

from __future__ import annotations

from blinker import NamedSignal, Namespace

_signals = Namespace()

events_recorded: NamedSignal = _signals.signal("events-recorded")
"""Sent after a transaction with events was committed, never before and never for a rollback.

The sender is the Flask app; the arguments are ``application``, the ``Application`` object, and ``notifications``, a
tuple of ``eventsourcing.persistence.Notification`` in the order of the log. It is sent once for each application that
recorded events in the transaction. A receiver with a parameter ``recorded`` also gets a tuple of
``flask_eventsourcing.metadata.Recorded``: what was recorded of each event beside its state. An exception in a receiver
is logged. It does not reach the caller of ``commit()``, as the commit has succeeded::

    @events_recorded.connect_via(app)
    def log_events(sender, application, notifications, **further):
        sender.logger.info("%d events", len(notifications))
"""

events_discarded: NamedSignal = _signals.signal("events-discarded")
"""Sent when events were saved and then neither committed nor rolled back, so they are not stored.

The arguments are those of ``events_recorded``. It is not sent for a rollback that your code asked for, which is no
mistake. Connect a receiver to be alerted where no response can tell the client, as in a task or a command.
"""
