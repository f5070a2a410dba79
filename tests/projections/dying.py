"""A process whose handlers end it at a poisoned event, without a word."""

from __future__ import annotations

import os
import sys
import time
from typing import Any

from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, checkpoint, consumers, on
from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.projections import desk as desks
from tests.projections.desk import Created, Deposited, Desk
from tests.projections.desk_hosts import make_desk

DIED = 9
RETRIES = 1


class Slow(ModelProjection):
    """Has always an event in progress, and is blamed for it at once."""

    on_failure = "dead-letter"
    retries = 0

    @on(Created, Deposited)
    def seen(self, event: Any, session: orm.Session) -> None:
        """Take a while."""
        time.sleep(0.05)


def make(uri: str, on_failure: str) -> Desk:
    """Make the desk of this process and of the test."""
    desk = make_desk(uri)
    desk.balances(on_failure=on_failure, retries=RETRIES)
    desk.reacting(on_failure=on_failure, retries=RETRIES)
    desk.register(Slow)
    return desk


def die(text: str) -> Exception:
    """End the process, as a lack of memory or an error in a C library does."""
    os._exit(DIED)


if __name__ == "__main__":
    desks.PoisonError = die  # type: ignore[assignment, misc]
    # So that the next process need not wait for long.
    checkpoint.LEASE, checkpoint.BEAT = 0.5, 0.1
    DESK = make(sys.argv[1], sys.argv[2])
    if "corrected" in sys.argv:
        consumers.Consumer.fingerprint = "corrected"  # type: ignore[assignment]
    else:
        DESK.poison.add(13)
    if "rebuild" in sys.argv:
        Rebuild(DESK.consumer()).run()
    elif "run" in sys.argv:
        sys.exit(DESK.command("run", "--all", "--once").exit_code)
    else:
        sys.exit(len(DESK.run_once()))
