"""A user's project for type checkers: ``everything.py`` has no error, and ``wrong.py`` those that it marks."""
