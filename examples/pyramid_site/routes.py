"""Where each view is."""

from __future__ import annotations

from typing import Any


def includeme(config: Any) -> None:
    """Add the routes."""
    config.add_route("home", "/")
    config.add_route("accounts", "/accounts")
    config.add_route("account", "/accounts/{id}")
    config.add_route("deposits", "/accounts/{id}/deposits")
    config.add_route("withdrawals", "/accounts/{id}/withdrawals")
    config.add_route("transfers", "/transfers")
