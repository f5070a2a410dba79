"""What the pages and the API read from the plain rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from flask import abort, request
from sqlalchemy import func, select

from example_app.extensions import db
from example_app.models import AccountSummary, Transfer
from example_app.projections import Balance, FraudAlert, MonthlyStatement

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from flask_sqlalchemy.pagination import Pagination

MOST_RECIPIENTS = 500
LAST_PAGE = 1_000_000


@dataclass(frozen=True)
class Totals:
    """The bank in two numbers."""

    accounts: int
    money: int


def accounts() -> Pagination:
    """Return the accounts that the request asks for (``?search=ada&page=2``), those that changed last first."""
    query = select(AccountSummary).order_by(AccountSummary.closed, AccountSummary.changed_at.desc(), AccountSummary.id)
    if search := search_text():
        query = query.where(AccountSummary.owner.icontains(search, autoescape=True))
    return db.paginate(query, page=_page_number(), max_per_page=100)


def transfers() -> Pagination:
    """Return the page of transfers that the request asks for, the latest first."""
    query = select(Transfer).order_by(Transfer.created_at.desc(), Transfer.id)
    return db.paginate(query, page=_page_number(), max_per_page=100)


def balances() -> Pagination:
    """Return the page of open accounts that the request asks for, by what they hold, from the read model."""
    query = select(Balance).where(~Balance.closed)
    return db.paginate(query.order_by(Balance.amount.desc(), Balance.account_id), page=_page_number(), max_per_page=100)


def total_of_balances() -> int:
    """Return what the read model has in all."""
    return int(db.session.scalar(select(func.coalesce(func.sum(Balance.amount), 0))) or 0)


def months(account_id: UUID) -> Sequence[MonthlyStatement]:
    """Return the months of an account, the latest first."""
    query = select(MonthlyStatement).where(MonthlyStatement.account_id == account_id)
    return db.session.scalars(query.order_by(MonthlyStatement.month.desc())).all()


def alerts() -> Pagination:
    """Return the page of alerts that the request asks for, the latest first."""
    query = select(FraudAlert).order_by(FraudAlert.seen_at.desc(), FraudAlert.account_id, FraudAlert.version.desc())
    return db.paginate(query, page=_page_number(), max_per_page=100)


def search_text() -> str:
    """Return the part of a name that the request looks for."""
    return "".join(character for character in request.args.get("search", "") if character.isprintable()).strip()


def _page_number() -> int:
    page = request.args.get("page", 1, type=int)
    if not 1 <= page <= LAST_PAGE:
        abort(404, "There is no such page of the list.")
    return page


def totals() -> Totals:
    """Count the open accounts and what they hold."""
    query = select(func.count(), func.coalesce(func.sum(AccountSummary.balance), 0))
    count, money = db.session.execute(query.where(~AccountSummary.closed)).one()
    return Totals(count, int(money))


def recipients(sender_id: UUID) -> Sequence[AccountSummary]:
    """Return the open accounts that a transfer from this one can go to, by owner; a form lists no more than 500."""
    query = select(AccountSummary).where(~AccountSummary.closed, AccountSummary.id != sender_id)
    return db.session.scalars(query.order_by(AccountSummary.owner, AccountSummary.id).limit(MOST_RECIPIENTS)).all()


def owners(account_ids: Iterable[UUID | None]) -> dict[UUID, str]:
    """Return the owners of these accounts."""
    ids = {account_id for account_id in account_ids if account_id}
    query = select(AccountSummary.id, AccountSummary.owner).where(AccountSummary.id.in_(ids))
    return {row.id: row.owner for row in db.session.execute(query)}
