"""A bank to start from: Flask, Flask-SQLAlchemy and the eventsourcing library, held together by Flask-EventSourcing.

Its domain is that of ``examples/pyramid_site`` too, which has no Flask: nothing is imported here before it is used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Flask


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the app. It keeps its data in ``bank.db`` in the instance folder, or where ``DATABASE_URL`` says.

    What ``config`` has goes before everything else.
    """
    from example_app import factory

    return factory.create_app(config)
