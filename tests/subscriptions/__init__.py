"""Waiting for new events: notifications on PostgreSQL, polling elsewhere."""
