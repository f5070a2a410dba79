"""A process that rebuilds, or runs projections, to be killed.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import sys

from flask_eventsourcing.projections.rebuilding import Rebuild
from tests.projections.desk import Desk
from tests.projections.desk_hosts import make_desk


def make(uri: str) -> Desk:
    """Make the desk of this process and of the test."""
    desk = make_desk(uri)
    desk.balances(batch_size=20)
    return desk


if __name__ == "__main__":
    DESK = make(sys.argv[1])
    print("begun", flush=True)  # noqa: T201
    if "run" in sys.argv:
        DESK.worker().run()
    else:
        Rebuild(DESK.consumer()).run()
    print("ended", flush=True)  # noqa: T201
