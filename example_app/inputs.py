"""Reading what clients send: amounts, notes and account numbers, from forms and from JSON."""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any, NoReturn
from uuid import UUID

from flask import abort, request

from example_app.errors import InvalidAccountNumber, InvalidAmount, InvalidText
from example_app.money import parse_amount


def json_object() -> dict[str, Any]:
    """Return the JSON object that the request brings; its numbers are int or Decimal, never float."""
    if not request.is_json:
        abort(415, "Send a JSON object, with the header Content-Type: application/json.")
    try:
        found = json.loads(request.get_data(), parse_float=Decimal, parse_constant=_no_number)
    except (ValueError, RecursionError):
        abort(400, "The body is not JSON.")
    if not isinstance(found, dict):
        abort(400, "The body is not a JSON object.")
    return found


def _no_number(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


def amount(given: object) -> int:
    """Return the cents of an amount as a client wrote it."""
    if isinstance(given, bool) or not isinstance(given, str | int | Decimal):
        raise InvalidAmount("An amount is a text such as 12.50.")
    try:
        return parse_amount(given)
    except ValueError as error:
        raise InvalidAmount(str(error)) from None


def optional_amount(given: object) -> int:
    """Return the cents of an amount that may be left out."""
    return 0 if given in (None, "") else amount(given)


def text(given: object, what: str) -> str:
    """Return a text that may be left out; what the text may be, the domain says."""
    if given is not None and not isinstance(given, str):
        raise InvalidText(f"{what} is a text.")
    return given or ""


def address(given: object) -> str:
    """Return a mail address as a client wrote it; whether it exists, only a mail can tell."""
    found = text(given, "The mail address").strip()
    if not re.fullmatch(r"[!-?A-~]{1,64}@[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?", found):
        raise InvalidText("A mail address is a text such as ada@example.com.")
    return found


def month(given: object) -> str:
    """Return a month, ``"2026-11"``; the present one, in UTC, if it is left out."""
    found = text(given, "The month") or f"{datetime.now(UTC):%Y-%m}"
    if not re.fullmatch(r"[0-9]{4}-(?:0[1-9]|1[0-2])", found):
        raise InvalidText("A month is a text such as 2026-11.")
    return found


def account_number(given: object) -> UUID:
    """Return the id of an account as a client wrote it."""
    try:
        return UUID(given if isinstance(given, str) else "")
    except ValueError:
        raise InvalidAccountNumber("Choose an account by its number.") from None
