"""A project as it was with eventsourcing-django and djangoevents, and dumps of what they have stored."""
