"""One process at a time for each projection, by the means of the database.

Some databases have locks that belong to a connection and end with it, so that a killed process frees its own at once.
Elsewhere, and behind a proxy that shares connections among clients, there is a lease that is renewed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from datetime import UTC, datetime
from typing import Any

import sqlalchemy as sa
from sqlalchemy.engine import Connection, Engine

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
