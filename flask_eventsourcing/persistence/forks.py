"""Connections that a forked process inherits are never used in it, nor closed.

The check at each checkout is a recipe of SQLAlchemy's documentation ("Using Connection Pools with Multiprocessing").
"""

from __future__ import annotations

import os
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Engine

PID = "flask_eventsourcing.pid"

# Finalizers of inherited connections could end the parent's sessions on the server, so the objects are kept.
_inherited: list[Any] = []


def drop_inherited_connections(engine: Engine) -> None:
    """Make a pool give up, in a forked process, the connections that were opened before the fork.

    It works for all who use the engine, and without ``os.register_at_fork``, which uWSGI does not run. The one
    connection of an in-memory database is the database, and a forked process keeps its own copy of that.
    """
    if isinstance(engine.pool, sa.pool.StaticPool) or sa.event.contains(engine, "checkout", _check_process):
        return
    sa.event.listen(engine, "connect", _note_process)
    sa.event.listen(engine, "checkout", _check_process)


def _note_process(driver: Any, record: Any) -> None:
    record.info[PID] = os.getpid()


def _check_process(driver: Any, record: Any, fairy: Any) -> None:
    pid = os.getpid()
    # Connections from before the listeners were installed belong to the process that installed them.
    if record.info.setdefault(PID, pid) != pid:
        _inherited.append(driver)
        record.dbapi_connection = fairy.dbapi_connection = None
        raise sa.exc.DisconnectionError("The connection belongs to the process from which this one was forked.")
