"""The end of a rebuild: the live projection takes over its position and its dead letters."""

from __future__ import annotations

from sqlalchemy.engine import Connection

from ..exceptions import RebuildError
from . import shadow
from .consumers import Consumer
from .control import ACTIVE, SWAPPING
from .dead_letters import DeadLetters


def hand_over(live: Consumer, rebuild: Consumer, connection: Connection) -> None:
    """Give the live projection the position and the dead letters of its rebuild, which ends with that."""
    row = rebuild.control.read(connection)
    if row is None:
        raise RebuildError(f"The rebuild of {live.name} has no row.")
    letters = DeadLetters(live.host.models.tables["dead_letters"])
    letters.remove_all(connection, live.name)
    letters.rename(connection, rebuild.name, live.name)
    live.control.set_position(connection, row.position, row.applied)
    rebuild.control.remove(connection)


def settle(live: Consumer) -> None:
    """Finish, or take back, a swap on MySQL that was interrupted."""
    row = live.control.read()
    if row is None or row.state != SWAPPING:
        return
    rebuild = live.of_kind("rebuild")
    with live.host.engine.begin() as connection:
        live.control.hold(connection)
        row = live.control.read(connection)
        if row is None or row.state != SWAPPING:
            return
        tables = live.projection_class.tables()
        if any(shadow.exists(connection, table, shadow.NEW) for table in tables):
            live.control.set_state(connection, ACTIVE)
        else:
            hand_over(live, rebuild, connection)
