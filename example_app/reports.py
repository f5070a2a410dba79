"""The pages that show the read models of ``projections.py``, each with how far behind it is, and the health check."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING

from eventsourcing.persistence import PersistenceError
from flask import Blueprint, current_app, render_template
from sqlalchemy.exc import SQLAlchemyError

from example_app import queries
from example_app.domain import Bank
from example_app.extensions import es
from example_app.projections import Balances, FraudWatch, MonthlyStatements

if TYPE_CHECKING:
    from uuid import UUID

    from flask.typing import ResponseReturnValue

    from flask_eventsourcing.projections import ModelProjection
    from flask_eventsourcing.projections.upkeep.following import ProjectionStatus

reports = Blueprint("reports", __name__)


@reports.get("/balances")
def balances() -> ResponseReturnValue:
    """List what the open accounts hold, the largest first."""
    # How far it is first: the figures may then have more than is said, never less.
    progress = _progress(Balances)
    return render_template(
        "balances.html", progress=progress, found=queries.balances(), total=queries.total_of_balances()
    )


@reports.get("/accounts/<uuid:account_id>/months")
def months(account_id: UUID) -> ResponseReturnValue:
    """Show an account month by month."""
    account = es[Bank].get_account(account_id)
    progress = _progress(MonthlyStatements)
    return render_template("months.html", account=account, progress=progress, months=queries.months(account_id))


@reports.get("/alerts")
def alerts() -> ResponseReturnValue:
    """List what the fraud watch has noted."""
    progress = _progress(FraudWatch)
    found = queries.alerts()
    owners = queries.owners(alert.account_id for alert in found.items)
    return render_template("alerts.html", progress=progress, found=found, owners=owners)


@reports.get("/healthz")
def healthz() -> ResponseReturnValue:
    """Tell a monitor how the projections are: 200 if all is well, 503 if not."""
    try:
        health = es.health()
    except (PersistenceError, SQLAlchemyError) as error:
        current_app.logger.error("The health check failed.", exc_info=error)
        return {"ok": False, "detail": "The database does not answer."}, 503
    return health.to_dict(), 200 if health.ok else 503


def _progress(projection: type[ModelProjection]) -> ProjectionStatus:
    return next(each for each in es.health().projections if each.name == projection.name)


@reports.app_template_filter()
def month_name(month: str) -> str:
    """Return ``"2026-11"`` as people say it."""
    return f"{datetime.strptime(month, '%Y-%m').replace(tzinfo=UTC):%B %Y}"
