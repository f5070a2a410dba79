"""Wrong uses: a type checker must find an error in each line that ends with ``# wrong``, and in no other."""

from __future__ import annotations

from uuid import UUID

from eventsourcing.application import Application
from sqlalchemy.orm import Session

from flask_eventsourcing import EventSourcing, events_recorded
from flask_eventsourcing.lifecycle import ApplicationSlot, init_application
from flask_eventsourcing.projections import ModelProjection, on, reaction

from .bank import Account, Balances, Bank, Shop, db, es


class Wrong(ModelProjection):
    """Handlers for other events than those that they take."""

    @on(Account.Opened)  # wrong
    def opened(self, event: Account.Deposited, session: Session) -> None:
        """Take another event."""

    @on(Account.Deposited, Account.Withdrawn)  # wrong
    def moved(self, event: Account.Deposited, session: Session) -> None:
        """Take one of two events."""

    @on(Account.Deposited)  # wrong
    def keyed(self, event: Account.Deposited, key: str) -> None:
        """Take a key in the place of the session."""

    @reaction(Account.Deposited)  # wrong
    def thank(self, event: Account.Deposited, session: Session) -> None:
        """Take a session in the place of the key."""

    @on(Account.Deposited)  # wrong
    def short(self, event: Account.Deposited) -> None:
        """Take no session."""

    @on("Deposited")  # wrong
    def named(self, event: Account.Deposited, session: Session) -> None:
        """Take an event by its name."""

    @on(Account.Closed)  # wrong
    def closed(self, event: object, session: Session) -> None:
        """Take an event that there is not."""

    @reaction(Account.Opened, start="middle")  # wrong
    def started(self, event: Account.Opened, key: str) -> None:
        """Start in the middle."""


def use(account_id: UUID) -> None:
    """Use what is not there, or give what is not taken."""
    es.application.opne_account("Ada")  # wrong
    es.application.open_account(5)  # wrong
    es[Shop].open_account("Ada")  # wrong
    es[str]  # wrong
    es.StoredEvent.position  # wrong
    es.wait_for(Balances, "all of them")  # wrong
    es.wait_for(Account, 5)  # wrong
    es.erase(5)  # wrong
    es.retry_on_conflict(times="three")  # wrong
    es.transaction(5)  # wrong
    es.close("bank")  # wrong
    EventSourcing(db="sqlite://", application=Bank)  # wrong
    EventSourcing(db=db, application=Account)  # wrong
    EventSourcing(db=db, aplication=Bank)  # wrong
    EventSourcing[str](db=db)  # wrong
    shop: Shop = EventSourcing(db=db, application=Bank).application  # wrong
    plain: Application[str] = EventSourcing(db=db).application  # wrong
    bank: Bank = ApplicationSlot(Shop).get()  # wrong
    made: Shop = init_application(Bank)  # wrong
    events_recorded.sned(None)  # wrong
    es.application.account(account_id).deposit("five")  # wrong
    print(shop, plain, bank, made)
