"""Many writers, readers and workers at once, some of them killed, and a count of what went wrong.

``make torture`` runs each for a minute or more, and ``make test`` for a moment. ``LogUnderLoad`` starts the writers
and readers of one log; ``ledger.py`` is an app in whose read model an event that is applied twice shows.
"""
