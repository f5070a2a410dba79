"""What projections need of a database: that one process at a time runs each of them, and that tables are swapped.

Some databases have locks that belong to a connection and end with it, so that a killed process frees its own at once.
Elsewhere, and behind a proxy that shares connections among clients, there is a lease that is renewed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

from ..subscriptions import Waiter

NAMESPACE = "flask_eventsourcing"


def utc_now() -> datetime:
    """The time in UTC, without a time zone, as the tables of projections have it."""
    return datetime.now(UTC).replace(tzinfo=None)


class RunnerLock(ABC):
    """The right to run one projection.

    :param name: of the table and the projection.
    """

    leased = False
    """Whether the right is a lease, kept in the projection's row, rather than a lock of the server."""

    def __init__(self, engine: Engine, name: str) -> None:
        self.engine = engine
        self.name = name

    @abstractmethod
    def acquire(self) -> bool:
        """Take the lock if nobody has it, and return whether it is held now."""

    @abstractmethod
    def check(self) -> None:
        """Raise an error when the lock was lost since it was taken."""

    @abstractmethod
    def release(self) -> None:
        """Give the lock back."""

    @abstractmethod
    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Whether somebody has the lock now."""


class Lease(RunnerLock):
    """No lock: the claim in the projection's row holds until its time is over."""

    leased = True

    def acquire(self) -> bool:
        """Nothing to take: the claim decides."""
        return True

    def check(self) -> None:
        """Nothing to look at: renewing the lease shows whether it was lost."""

    def release(self) -> None:
        """Nothing to give back: the claim is released."""

    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Whether the lease is valid."""
        return leased_until is not None and leased_until > utc_now()


class SessionLock(RunnerLock):
    """A lock of the server that belongs to a connection of its own."""

    take = ""
    give = ""
    look = ""

    def __init__(self, engine: Engine, name: str) -> None:
        super().__init__(engine, name)
        self._connection: Connection | None = None

    @abstractmethod
    def parameters(self) -> dict[str, Any]:
        """Return what the statements need to name the lock."""

    def acquire(self) -> bool:
        """Take the lock if nobody has it; the connection that holds it is kept, and a lost one is replaced."""
        if self._connection is None:
            connection = self.engine.connect().execution_options(isolation_level="AUTOCOMMIT")
            # Out of the pool, which is for those who come and go.
            connection.detach()
            self._connection = connection
        try:
            return bool(self._connection.execute(sa.text(self.take), self.parameters()).scalar())
        except sa.exc.SQLAlchemyError:
            self._drop()
            raise

    def check(self) -> None:
        """See whether the connection still lives, which keeps it from being closed for idleness too."""
        if self._connection is not None:
            self._connection.execute(sa.text("SELECT 1"))

    def release(self) -> None:
        """Give the lock back and close the connection."""
        if self._connection is None:
            return
        try:
            # As often as it was taken: a server counts that, and sees only later that the connection is closed.
            while self._connection.execute(sa.text(self.give), self.parameters()).scalar() == 1:
                pass
        except sa.exc.SQLAlchemyError:
            # The connection is lost, and the lock with it.
            pass
        finally:
            self._drop()

    def _drop(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()

    def is_held(self, connection: Connection, leased_until: datetime | None) -> bool:
        """Ask the server whether somebody has the lock."""
        return bool(connection.execute(sa.text(self.look), self.parameters()).scalar())


class AdvisoryLock(SessionLock):
    """An advisory lock of a connection, in the space of two 32-bit keys."""

    take = "SELECT pg_try_advisory_lock(hashtext(:namespace), hashtext(:name))"
    give = "SELECT pg_advisory_unlock_all()"
    look = (
        "SELECT EXISTS (SELECT 1 FROM pg_locks WHERE locktype = 'advisory' AND objsubid = 2 AND granted "
        "AND database = (SELECT oid FROM pg_database WHERE datname = current_database()) "
        "AND classid::bigint = hashtext(:namespace)::bigint & 4294967295 "
        "AND objid::bigint = hashtext(:name)::bigint & 4294967295)"
    )

    def parameters(self) -> dict[str, Any]:
        """The two keys are hashes, made by the server."""
        return {"namespace": NAMESPACE, "name": self.name}


class ForProjections:
    """The part of a dialect that projections use."""

    engine: Engine
    batch_seconds = 0.5
    """Seconds that a batch of a projection takes at most, roughly: a longer one keeps SIGTERM waiting."""
    longest_name = 63
    """The most characters of a table's name."""
    swaps_in_transaction = True
    """Whether tables change their names in a transaction that does other things too."""
    refuses_old_snapshot = False
    """Whether a transaction that began before tables were swapped sees the new ones as they were at its beginning."""

    @staticmethod
    def passes(driver_error: BaseException) -> bool:
        """Whether a driver's error is one after which the same may be tried again."""
        return False

    def runner_lock(self, name: str) -> RunnerLock:
        """Return the lock that lets one process run a projection; here there is none but the lease."""
        return Lease(self.engine, name)

    def update_and_notify(self, connection: Connection, table: sa.Table, change: sa.Update, message: str) -> int:
        """Update rows of a table, tell those who wait for that, and return how many rows were changed."""
        return connection.execute(change).rowcount

    def update_waiter(self, table: sa.Table) -> Waiter:
        """Return what waits for updates of a table; here it polls."""
        return Waiter()

    def limit_ddl_waiting(self, connection: Connection, seconds: int) -> None:
        """Limit how long DDL waits for those who use a table, to the end of the transaction or the connection."""

    def qualified(self, table: sa.Table, name: str) -> str:
        """Return the quoted name of what is in the schema of a table."""
        quote = self.engine.dialect.identifier_preparer.quote
        return f"{quote(table.schema)}.{quote(name)}" if table.schema else quote(name)

    def name_shadow(self, table: sa.Table, shadow: sa.Table, suffix: str) -> None:
        """Name the indexes and constraints of a copy of a table after those of the original, with a suffix."""
        # By their columns, as names may be made of the table's name.
        originals = {(index.unique, *index.columns.keys()): index.name for index in table.indexes}
        for index in shadow.indexes:
            original = originals.get((index.unique, *index.columns.keys()), index.name)
            index.name = sa.sql.quoted_name(self.shadow_index_name(str(original), suffix), None)
        for constraint in shadow.constraints:
            self.name_shadow_constraint(constraint, suffix)

    def shadow_index_name(self, name: str, suffix: str) -> str:
        """Return the name of an index of a shadow table; here they are unique in the schema."""
        return f"{name}{suffix}"

    def name_shadow_constraint(self, constraint: sa.Constraint, suffix: str) -> None:
        """Name a constraint of a shadow table; here its name may be that of the original."""

    def swap_tables(self, connection: Connection, tables: Sequence[sa.Table], new: str, old: str) -> None:
        """Give tables the suffix *old*, and those with the suffix *new* their names."""
        for table in tables:
            self._rename_table(connection, table, table.name, table.name + old)
            self._rename_table(connection, table, table.name + new, table.name)
            self.rename_parts(connection, table, new, old)

    def _rename_table(self, connection: Connection, table: sa.Table, name: str, renamed: str) -> None:
        quoted = self.engine.dialect.identifier_preparer.quote(renamed)
        connection.exec_driver_sql(f"ALTER TABLE {self.qualified(table, name)} RENAME TO {quoted}")

    def rename_parts(self, connection: Connection, table: sa.Table, new: str, old: str) -> None:
        """Give what belongs to swapped tables, and has not changed its name with them, the names to be expected."""
