"""Amounts."""

from __future__ import annotations

from decimal import Decimal

import pytest

from example_app.money import change_text, decimal_text, money_text, parse_amount


@pytest.mark.parametrize(
    ("given", "cents"),
    [
        ("12", 1200),
        ("12.5", 1250),
        ("12,50", 1250),
        (" 0.07 ", 7),
        (3, 300),
        (Decimal("19.99"), 1999),
        ("123456789012.34", 12345678901234),
    ],
)
def test_amounts_are_read_exactly(given: str | int | Decimal, cents: int) -> None:
    """An amount as people and programs write it becomes the cents it names."""
    assert parse_amount(given) == cents


@pytest.mark.parametrize(
    "given",
    ["", "-1", "+1", "1e3", "1.234", "1,234", "1,234.50", "1.", ".5", "€5", "NaN", "٣", "1\n2", Decimal("1E+999999")],
)
def test_what_is_no_amount_is_refused(given: str | Decimal) -> None:
    """Signs, exponents, thousands separators and the like are refused, never guessed at."""
    with pytest.raises(ValueError, match=r"written like 12\.50"):
        parse_amount(given)


def test_amounts_are_written_for_machines() -> None:
    """Machines get plain decimals with two digits."""
    assert [decimal_text(cents) for cents in (0, 5, -5, -123450)] == ["0.00", "0.05", "-0.05", "-1234.50"]


def test_amounts_are_written_for_people() -> None:
    """People get a currency sign, separators and, for a change, its sign."""
    assert money_text(123456789) == "€1,234,567.89"
    assert [change_text(cents) for cents in (500, 0, -123450)] == ["+€5.00", "€0.00", "\N{MINUS SIGN}€1,234.50"]
