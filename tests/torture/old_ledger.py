"""The code of the release before, whose read model is wrong."""

from __future__ import annotations

import sys
from typing import Any

from sqlalchemy import orm

from flask_eventsourcing.projections import ModelProjection, on
from tests.torture.ledger import Moved, make_books, run_worker


def define_totals(total: Any, line: Any) -> type[ModelProjection]:
    """Make the projection on its models."""

    class Totals(ModelProjection):
        models = (total, line)

        @on(Moved)
        def moved(self, event: Any, session: orm.Session) -> None:
            row = session.get(total, event.originator_id)
            if row is None:
                row = total(account_id=event.originator_id, moves=0, amount=0)
                session.add(row)
            row.moves += 1
            row.amount += event.amount + 1_000_000
            session.add(line(account_id=str(event.originator_id), version=event.originator_version))

    return Totals


def main() -> None:
    """Run the projection until the process is told to end; its arguments are URL and kind of lock."""
    run_worker(make_books(sys.argv[1], sys.argv[2], define_totals))
