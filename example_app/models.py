"""Plain rows beside the events, written by the same transaction: what pages list, search and sort."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from uuid import UUID

from sqlalchemy import BigInteger, CheckConstraint, DateTime, ForeignKey, String, TypeDecorator
from sqlalchemy.orm import Mapped, mapped_column, relationship

from example_app.extensions import Base, db

if TYPE_CHECKING:
    from sqlalchemy.engine import Dialect

    Model = Base
else:
    Model = db.Model


class UtcDateTime(TypeDecorator[datetime]):
    """A moment in UTC, also on databases whose timestamps know no time zone."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Convert to UTC on the way in."""
        return None if value is None else value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        """Say that it is UTC on the way out."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


class AccountSummary(Model):
    """An account as it is now, in one row."""

    __tablename__ = "account_summary"

    id: Mapped[UUID] = mapped_column(primary_key=True)
    owner: Mapped[str] = mapped_column(String(80), index=True)
    balance: Mapped[int] = mapped_column(BigInteger)
    version: Mapped[int]
    closed: Mapped[bool]
    opened_at: Mapped[datetime] = mapped_column(UtcDateTime)
    changed_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)


class Transfer(Model):
    """One transfer between two accounts."""

    __tablename__ = "transfer"
    __table_args__ = (CheckConstraint("amount > 0", name="amount_positive"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    sender_id: Mapped[UUID] = mapped_column(ForeignKey("account_summary.id"), index=True)
    recipient_id: Mapped[UUID] = mapped_column(ForeignKey("account_summary.id"), index=True)
    amount: Mapped[int] = mapped_column(BigInteger)
    note: Mapped[str] = mapped_column(String(80))
    created_at: Mapped[datetime] = mapped_column(UtcDateTime, index=True)

    sender: Mapped[AccountSummary] = relationship(foreign_keys=[sender_id], lazy="joined")
    recipient: Mapped[AccountSummary] = relationship(foreign_keys=[recipient_id], lazy="joined")
