"""Every error as one thing: problem details (RFC 9457) under /api, a page elsewhere."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from eventsourcing.persistence import IntegrityError, PersistenceError
from flask import current_app, make_response, render_template, request
from flask_wtf.csrf import CSRFError
from sqlalchemy.exc import DBAPIError
from werkzeug.exceptions import HTTPException

from example_app.errors import (
    AccountClosed,
    AccountNotEmpty,
    AccountNotFound,
    BankError,
    InsufficientFunds,
    MailUnavailable,
    VersionNotFound,
)
from example_app.money import decimal_text

if TYPE_CHECKING:
    from flask import Flask, Response

STATUSES: dict[type[BankError], int] = {
    AccountNotFound: 404,
    VersionNotFound: 404,
    AccountClosed: 409,
    AccountNotEmpty: 409,
    MailUnavailable: 503,
}
UNPROCESSABLE = 422


@dataclass(frozen=True)
class Problem:
    """What went wrong, with the members that RFC 9457 names."""

    status: int
    title: str
    detail: str
    type: str = "about:blank"
    extra: dict[str, str] = field(default_factory=dict)

    def as_json(self) -> dict[str, str | int]:
        """Return the object for ``application/problem+json``."""
        return {
            "type": self.type,
            "title": self.title,
            "status": self.status,
            "detail": self.detail,
            "instance": request.path,
            **self.extra,
        }


def bank_problem(error: BankError) -> Problem:
    """Describe a refusal of the bank."""
    name = re.sub(r"(?<!^)(?=[A-Z])", "-", type(error).__name__).lower()
    extra: dict[str, str] = {}
    if isinstance(error, InsufficientFunds):
        extra = {"balance": decimal_text(error.balance), "amount": decimal_text(error.amount)}
    status = STATUSES.get(type(error), UNPROCESSABLE)
    return Problem(status, error.title, str(error), f"urn:example:bank:{name}", extra)


def respond(problem: Problem, response: Response | None = None) -> Response:
    """Answer with a problem, keeping the headers of a response that was made already."""
    response = make_response() if response is None else response
    response.status_code = problem.status
    if request.path.startswith("/api/"):
        response.set_data(current_app.json.dumps(problem.as_json()))
        response.content_type = "application/problem+json"
    else:
        response.set_data(render_template("error.html", problem=problem))
        response.content_type = "text/html; charset=utf-8"
    return response


def init_app(app: Flask) -> None:
    """Register the error handlers."""

    @app.errorhandler(BankError)
    def _refused(error: BankError) -> Response:
        return respond(bank_problem(error))

    @app.errorhandler(IntegrityError)
    def _too_many(error: IntegrityError) -> Response:
        detail = "Others keep changing the same account at this moment. Nothing was changed; please try again."
        return respond(Problem(409, "Somebody else was faster", detail, "urn:example:bank:conflict"))

    @app.errorhandler(PersistenceError)
    @app.errorhandler(DBAPIError)
    def _no_database(error: Exception) -> Response:
        app.logger.error("The database failed.", exc_info=error)
        detail = "Nothing was changed. A new installation needs its tables: run flask --app example_app db upgrade."
        response = respond(Problem(503, "The database does not answer", detail))
        response.headers["Retry-After"] = "5"
        return response

    @app.errorhandler(CSRFError)
    def _form_from_elsewhere(error: CSRFError) -> Response:
        detail = "This form is too old or comes from elsewhere. Nothing was changed; go back, reload and try again."
        return respond(Problem(400, "Bad Request", detail))

    @app.errorhandler(HTTPException)
    def _http_error(error: HTTPException) -> Response:
        response: Response = app.make_response(error.get_response())
        return respond(Problem(response.status_code, error.name, error.description or ""), response)
