"""Filters of the pages."""

from __future__ import annotations

from collections.abc import Mapping
from uuid import UUID

from django import template

from example_app.money import change_text, money_text

register = template.Library()
register.filter("money", money_text)
register.filter("change", change_text)


@register.filter
def number(account_id: UUID) -> str:
    """Return an account's number as people read it: the start of its id, in two groups."""
    return f"{account_id.hex[:4]} {account_id.hex[4:8]}".upper()


@register.filter
def hue(account_id: UUID) -> int:
    """Return one of eight colours for an account, always the same."""
    return account_id.int % 8


@register.filter
def owner_of(account_id: UUID, owners: Mapping[UUID, str]) -> str:
    """Return the owner's name; the account's number where the projection has not come to it yet."""
    return owners.get(account_id) or number(account_id)
