"""The library's own projection on PostgreSQL, with a view that does what this package's read model does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import sqlalchemy as sa
from eventsourcing.domain import DomainEventProtocol
from eventsourcing.persistence import Tracking
from eventsourcing.postgres import PostgresDatastore, PostgresTrackingRecorder
from eventsourcing.projection import Projection, ProjectionRunner
from psycopg.sql import SQL, Identifier

from .contenders import OwnPostgreSQL

__all__ = ["BalancesProjection", "BalancesView", "ProjectionRunner", "environment"]


class BalancesView(PostgresTrackingRecorder):
    """The balance of each account."""

    def __init__(self, datastore: PostgresDatastore, **kwargs: Any) -> None:
        super().__init__(datastore, **kwargs)
        schema = Identifier(datastore.schema)
        self.sql_create_statements.append(
            SQL("CREATE TABLE IF NOT EXISTS {0}.balances (account_id uuid PRIMARY KEY, amount bigint NOT NULL)").format(
                schema
            )
        )
        self.upsert = SQL(
            "INSERT INTO {0}.balances AS b VALUES (%s, %s) "
            "ON CONFLICT (account_id) DO UPDATE SET amount = b.amount + excluded.amount"
        ).format(schema)

    def add(self, account_id: Any, amount: int, tracking: Tracking) -> None:
        """Add an amount to a balance, and record the position."""
        with self.datastore.transaction(commit=True) as cursor:
            self._insert_tracking(cursor, tracking)
            cursor.execute(self.upsert, (account_id, amount), prepare=True)


class BalancesProjection(Projection[BalancesView]):
    """Adds up what was moved."""

    name = "balances"

    def process_event(self, domain_event: DomainEventProtocol[Any], tracking: Tracking) -> None:
        """Add an amount to a balance."""
        self.view.add(domain_event.originator_id, getattr(domain_event, "amount", 0), tracking)


def environment(url: sa.URL) -> Mapping[str, str]:
    """The environment of application and view."""
    return OwnPostgreSQL.env(OwnPostgreSQL.__new__(OwnPostgreSQL), url, 5)
