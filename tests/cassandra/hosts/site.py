"""The bank of the issue: a Flask app whose events are in Cassandra, and no database beside it."""

from __future__ import annotations

import gc
import os
from typing import Any
from uuid import UUID

from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, event


class Account(Aggregate):
    """An account."""

    class Closed(Aggregate.Event):
        """It was closed."""

    @event("Opened")
    def __init__(self, owner: str) -> None:
        self.owner = owner
        self.balance = 0

    @event("Deposited")
    def deposit(self, amount: int) -> None:
        """Put money in."""
        self.balance += amount


class Bank(Application[UUID]):
    """Keeps accounts."""

    def open_account(self, owner: str) -> Account:
        """Open an account."""
        account = Account(owner)
        self.save(account)
        return account

    def deposit(self, account_id: UUID, amount: int) -> None:
        """Put money into one."""
        account: Account = self.repository.get(account_id)
        account.deposit(amount)
        self.save(account)


made_in: list[int] = []


class CountedBank(Bank):
    """Notes in which process it was constructed."""

    name = "Bank"

    def __init__(self, env: Any = None) -> None:
        super().__init__(env)
        made_in.append(os.getpid())


def opened(bank: Bank, owner: str) -> dict[str, Any]:
    """Open an account, and return its id, and how many applications the process has constructed."""
    account = bank.open_account(owner)
    return {"id": str(account.id), "pid": os.getpid(), "constructed": made_in.count(os.getpid())}


def sessions_of_process() -> dict[str, Any]:
    """Return how many sessions of the driver the process has."""
    from cassandra.cluster import Session

    return {"pid": os.getpid(), "sessions": [type(each) for each in gc.get_objects()].count(Session)}


def settings(server: str, keyspace: str, **others: Any) -> dict[str, Any]:
    """Return the settings with which an app finds a node."""
    host, _, port = server.partition(":")
    return {
        "EVENTSOURCING_PERSISTENCE": "cassandra",
        "EVENTSOURCING_CASSANDRA_CONTACT_POINTS": [host],
        "EVENTSOURCING_CASSANDRA_PORT": int(port),
        "EVENTSOURCING_CASSANDRA_KEYSPACE": keyspace,
        "EVENTSOURCING_CASSANDRA_REPLICATION": 1,
        # A machine under load may take longer than that of a user.
        "EVENTSOURCING_CASSANDRA_PATIENCE": 60,
    } | {f"EVENTSOURCING_{name}": value for name, value in others.items()}
