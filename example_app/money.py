"""Amounts of money: whole cents inside, decimal text outside, binary floating point nowhere."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from decimal import Decimal

CURRENCY = "EUR"
SYMBOL = "€"

_MINUS = "\N{MINUS SIGN}"
_AMOUNT = re.compile(r"([0-9]{1,15})(?:[.,]([0-9]{1,2}))?")


def parse_amount(given: str | int | Decimal) -> int:
    """Return the cents of an amount such as ``"12"``, ``"12.5"``, ``"12,50"`` or ``Decimal("12.50")``.

    A comma counts as the decimal separator, because the number pad of many phones has nothing else. Signs, exponents,
    thousands separators and more than two decimals raise ValueError instead of being guessed at.
    """
    match = _AMOUNT.fullmatch(str(given).strip())
    if match is None:
        raise ValueError("An amount is written like 12.50: digits, and at most two decimals.")
    return int(match[1]) * 100 + int((match[2] or "").ljust(2, "0"))


def decimal_text(cents: int) -> str:
    """Return cents as plain decimal text for machines: ``-123450`` is ``"-1234.50"``."""
    whole, rest = divmod(abs(cents), 100)
    return f"{'-' if cents < 0 else ''}{whole}.{rest:02d}"


def money_text(cents: int) -> str:
    """Return cents as text for people, with currency sign and thousands separators: ``"€1,234.50"``."""
    whole, rest = divmod(abs(cents), 100)
    return f"{_MINUS if cents < 0 else ''}{SYMBOL}{whole:,}.{rest:02d}"


def change_text(cents: int) -> str:
    """Return a change of a balance as text for people, with its sign: ``"+€5.00"``."""
    return f"{'+' if cents > 0 else ''}{money_text(cents)}"
