"""What the pages and the API read from the plain rows."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from flask import abort, request
from flask_sqlalchemy.pagination import Pagination
from sqlalchemy import func, select

from example_app.domain import Bank, Entry
from example_app.extensions import db, es
from example_app.models import AccountSummary, Transfer
from example_app.projections import Balance, FraudAlert, MonthlyStatement

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from uuid import UUID

    from sqlalchemy import Select

    from example_app.domain import Statement

MOST_RECIPIENTS = 500
MOST_PER_PAGE = 100
LAST_PAGE = 1_000_000
NO_SUCH_PAGE = "There is no such page of the list."


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
    return _paged(query)


def transfers() -> Pagination:
    """Return the page of transfers that the request asks for, the latest first."""
    return _paged(select(Transfer).order_by(Transfer.created_at.desc(), Transfer.id))


def balances() -> Pagination:
    """Return the page of open accounts that the request asks for, by what they hold, from the read model."""
    query = select(Balance).where(~Balance.closed)
    return _paged(query.order_by(Balance.amount.desc(), Balance.account_id))


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
    return _paged(query)


class Entries(Pagination):
    """The entries of a statement, page by page. An account has as many entries as versions."""

    def _query_items(self) -> list[Entry]:
        statement: Statement = self._query_args["statement"]
        if self._query_args["latest_first"]:
            last = statement.version - self._query_offset
            first = max(1, last - self.per_page + 1)
        else:
            first = self._query_offset + 1
            last = min(statement.version, first + self.per_page - 1)
        if not 1 <= first <= last:
            return []
        found = list(es[Bank].entries(statement.account_id, first, last))
        return found[::-1] if self._query_args["latest_first"] else found

    def _query_count(self) -> int:
        statement: Statement = self._query_args["statement"]
        return statement.version


def entries(statement: Statement, *, latest_first: bool = False) -> Pagination:
    """Return the page of a statement's entries that the request asks for."""
    page, per_page = _page()
    return Entries(page, per_page, MOST_PER_PAGE, statement=statement, latest_first=latest_first)


def _paged(query: Select[Any]) -> Pagination:
    page, per_page = _page()
    found = db.paginate(query, page=page, per_page=per_page, max_per_page=MOST_PER_PAGE, error_out=False)
    if page > 1 and not found.items:
        abort(404, NO_SUCH_PAGE)
    return found


def _page() -> tuple[int, int]:
    page, per_page = _whole_number("page", 1), _whole_number("per_page", 20)
    if not 1 <= page <= LAST_PAGE or per_page < 1:
        abort(404, NO_SUCH_PAGE)
    return page, per_page


def _whole_number(name: str, default: int) -> int:
    """Return a number of the query; of one with very many digits only that it is too large."""
    given = request.args.get(name)
    if given is None:
        return default
    if not re.fullmatch(r"-?[0-9]+", given):
        abort(400, f"The {name.replace('_', ' ')} is not a whole number.")
    return int(given[:19])


def search_text() -> str:
    """Return the part of a name that the request looks for."""
    return "".join(character for character in request.args.get("search", "") if character.isprintable()).strip()


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
