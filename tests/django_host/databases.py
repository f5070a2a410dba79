"""What ``DATABASES`` says of the databases of the tests; needs no settings of Django's."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

SAFE = {"transaction_mode": "IMMEDIATE", "init_command": "PRAGMA journal_mode=WAL;", "timeout": 30}
ENGINES = {"sqlite": "sqlite3", "postgresql": "postgresql", "mysql": "mysql", "mariadb": "mysql"}


def database_settings(url: str, **further: Any) -> dict[str, Any]:
    """Return what ``DATABASES`` says of the database of a SQLAlchemy address."""
    found = sa.make_url(url)
    backend = found.get_backend_name()
    options = dict(SAFE) if backend == "sqlite" else dict(found.query)
    return {
        "ENGINE": f"django.db.backends.{ENGINES[backend]}",
        "NAME": found.database,
        "USER": found.username or "",
        "PASSWORD": found.password or "",
        "HOST": found.host or "",
        "PORT": found.port or "",
        "OPTIONS": options,
        **further,
    }
