"""Read models that a worker keeps up to date with the events: ``flask --app example_app eventsourcing run --all``.

The rows in ``models.py`` are written by the request itself. These here are made from the log alone: they can be changed
at any time and rebuilt from the first event on. Every amount is a whole number of cents.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from email.message import EmailMessage
from typing import TYPE_CHECKING
from uuid import UUID

from flask import current_app
from sqlalchemy import BigInteger, String, select
from sqlalchemy.orm import Mapped, Session, mapped_column

from example_app.domain import Account, Bank
from example_app.extensions import db, es
from example_app.mail import deliver
from example_app.models import Model, UtcDateTime
from example_app.money import money_text
from flask_eventsourcing.projections import ModelProjection, on, reaction

if TYPE_CHECKING:
    MoneyIn = Account.Deposited | Account.TransferReceived
    MoneyOut = Account.Withdrawn | Account.TransferSent

LARGE = 1_000_000
SEVERAL = 3
SHORT_TIME = timedelta(minutes=1)
MAIL_RECIPIENT = "fraud-desk@example.com"


class Balance(Model):
    """What an account holds."""

    __tablename__ = "balance"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80))
    amount: Mapped[int] = mapped_column(BigInteger, index=True)
    closed: Mapped[bool]
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime)


class MonthlyStatement(Model):
    """A month of an account, in UTC, from its first entry in that month on."""

    __tablename__ = "monthly_statement"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    month: Mapped[str] = mapped_column(String(7), primary_key=True)
    opening: Mapped[int] = mapped_column(BigInteger)
    paid_in: Mapped[int] = mapped_column(BigInteger)
    paid_out: Mapped[int] = mapped_column(BigInteger)
    closing: Mapped[int] = mapped_column(BigInteger)
    entries: Mapped[int]


class FraudAlert(Model):
    """Something that a person should look at: the version of the account at which it was seen."""

    __tablename__ = "fraud_alert"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    version: Mapped[int] = mapped_column(primary_key=True)
    reason: Mapped[str] = mapped_column(String(80))
    amount: Mapped[int] = mapped_column(BigInteger)
    seen_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Outflow(Model):
    """How often money has left an account since the first time within a short time."""

    __tablename__ = "outflow"

    account_id: Mapped[UUID] = mapped_column(primary_key=True)
    since: Mapped[datetime] = mapped_column(UtcDateTime)
    times: Mapped[int]


@es.projection(of=Bank)
class Balances(ModelProjection):
    """What accounts hold."""

    models = (Balance,)

    @on(Account.Opened)
    def opened(self, event: Account.Opened, session: Session) -> None:
        """Begin with an empty account."""
        session.add(
            Balance(
                account_id=event.originator_id, owner=event.owner, amount=0, closed=False, changed_at=event.timestamp
            )
        )

    @on(Account.Deposited, Account.TransferReceived)
    def came_in(self, event: MoneyIn, session: Session) -> None:
        """Add the amount."""
        self._change(event.originator_id, event.amount, event.timestamp, session)

    @on(Account.Withdrawn, Account.TransferSent)
    def went_out(self, event: MoneyOut, session: Session) -> None:
        """Take the amount off."""
        self._change(event.originator_id, -event.amount, event.timestamp, session)

    @on(Account.Closed)
    def closed(self, event: Account.Closed, session: Session) -> None:
        """Keep the row, which is 0 now."""
        balance = session.get_one(Balance, event.originator_id)
        balance.closed, balance.changed_at = True, event.timestamp

    def _change(self, account_id: UUID, change: int, time: datetime, session: Session) -> None:
        balance = session.get_one(Balance, account_id)
        balance.amount += change
        balance.changed_at = time


@es.projection(of=Bank)
class MonthlyStatements(ModelProjection):
    """What came in and went out in each month of each account."""

    models = (MonthlyStatement,)

    @on(Account.Deposited, Account.TransferReceived)
    def came_in(self, event: MoneyIn, session: Session) -> None:
        """Add to what was paid in."""
        month = self._month(event.originator_id, event.timestamp, session)
        month.paid_in += event.amount
        month.closing += event.amount

    @on(Account.Withdrawn, Account.TransferSent)
    def went_out(self, event: MoneyOut, session: Session) -> None:
        """Add to what was paid out."""
        month = self._month(event.originator_id, event.timestamp, session)
        month.paid_out += event.amount
        month.closing -= event.amount

    def _month(self, account_id: UUID, time: datetime, session: Session) -> MonthlyStatement:
        """Count an entry, in the month of its time; a new month opens with what the latest one closed with."""
        query = select(MonthlyStatement).where(MonthlyStatement.account_id == account_id)
        latest = session.scalars(query.order_by(MonthlyStatement.month.desc()).limit(1)).first()
        name = f"{time:%Y-%m}"
        # Clocks of several machines may differ a little at the turn of a month: entries stay in their order.
        if latest is None or latest.month < name:
            opening = latest.closing if latest is not None else 0
            latest = MonthlyStatement(
                account_id=account_id, month=name, opening=opening, paid_in=0, paid_out=0, closing=opening, entries=0
            )
            session.add(latest)
        latest.entries += 1
        return latest


@es.projection(of=Bank)
class FraudWatch(ModelProjection):
    """Notes large amounts that leave an account, and several within a minute, and reports them by mail."""

    models = (FraudAlert, Outflow)

    @on(Account.Withdrawn, Account.TransferSent)
    def watch(self, event: MoneyOut, session: Session) -> None:
        """Note what should be looked at; by the times of the events, so that a rebuild comes to the same result."""
        reasons = []
        if event.amount > LARGE:
            reasons.append(f"More than {money_text(LARGE)} at once")
        if self._times(event, session) == SEVERAL:
            reasons.append(f"{SEVERAL} times within a minute")
        if reasons:
            session.add(
                FraudAlert(
                    account_id=event.originator_id,
                    version=event.originator_version,
                    reason="; ".join(reasons),
                    amount=event.amount,
                    seen_at=event.timestamp,
                )
            )

    # From now on: nobody wants to be told of what happened before there was a watch.
    @reaction(Account.Withdrawn, Account.TransferSent, start="end")
    def report(self, event: MoneyOut, key: str) -> None:
        """Send a mail; it has the same number whenever it is sent again, so that it replaces itself."""
        alert = db.session.get(FraudAlert, (event.originator_id, event.originator_version))
        if alert is None:
            return
        number = key.replace("/", "-")
        message = EmailMessage()
        message["From"] = current_app.config["MAIL_SENDER"]
        message["To"] = MAIL_RECIPIENT
        message["Subject"] = f"Please look at account {alert.account_id}"
        message["Message-ID"] = f"<{number}@alerts.invalid>"
        message.set_content(f"{alert.reason}: {money_text(alert.amount)} at {alert.seen_at:%d %b %Y, %H:%M} UTC\n")
        deliver(message, number)

    def _times(self, event: MoneyOut, session: Session) -> int:
        outflow = session.get(Outflow, event.originator_id)
        if outflow is None:
            outflow = Outflow(account_id=event.originator_id, since=event.timestamp, times=0)
            session.add(outflow)
        elif event.timestamp - outflow.since > SHORT_TIME:
            outflow.since, outflow.times = event.timestamp, 0
        outflow.times += 1
        return outflow.times
