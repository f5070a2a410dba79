"""The ``flask eventsourcing`` commands."""

from __future__ import annotations

from flask.cli import AppGroup

from .database import check, init_db
from .dead_letters import dead_letters
from .projections import run, status
from .rebuild import rebuild

group = AppGroup("eventsourcing", help="Event-sourced applications: their tables, events and projections.")

for command in (init_db, check, run, status, rebuild, dead_letters):
    group.add_command(command)
