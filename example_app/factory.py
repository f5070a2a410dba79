"""Makes the Flask app."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flask import Flask

from example_app import models, problems, projections
from example_app.api import api
from example_app.extensions import csrf, db, es, migrate
from example_app.pages import pages
from example_app.reports import reports

if TYPE_CHECKING:
    from collections.abc import Mapping

    from flask import Response

__all__ = ["create_app", "models", "projections"]

SECURITY_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; frame-ancestors 'none'; form-action 'self'; base-uri 'none'",
    "Referrer-Policy": "same-origin",
    "X-Content-Type-Options": "nosniff",
}


def create_app(config: Mapping[str, Any] | None = None) -> Flask:
    """Make the app. It keeps its data in ``bank.db`` in the instance folder, or where ``DATABASE_URL`` says.

    What ``config`` has goes before everything else.
    """
    app = Flask("example_app", instance_relative_config=True)
    app.config.from_mapping(
        MAIL_SENDER=os.environ.get("MAIL_SENDER", "Harbour Bank <bank@example.com>"),
        MAIL_SERVER=os.environ.get("MAIL_SERVER"),
        MAX_CONTENT_LENGTH=64 * 1024,
        REDIS_URL=os.environ.get("REDIS_URL", "redis://127.0.0.1:6379/0"),
        SESSION_COOKIE_SAMESITE="Lax",
        SQLALCHEMY_DATABASE_URI=os.environ.get("DATABASE_URL", "sqlite:///bank.db"),
        STATEMENT_QUEUE=os.environ.get("STATEMENT_QUEUE"),
        # A form may stay open for as long as its session lasts.
        WTF_CSRF_TIME_LIMIT=None,
    )
    app.config.from_mapping(config or {})
    if not app.config["SECRET_KEY"]:
        app.config["SECRET_KEY"] = os.environ.get("SECRET_KEY") or _kept_secret(Path(app.instance_path))
    db.init_app(app)
    migrate.init_app(app, db)
    es.init_app(app)
    csrf.init_app(app)
    csrf.exempt(api)
    app.register_blueprint(api)
    app.register_blueprint(pages)
    app.register_blueprint(reports)
    problems.init_app(app)
    app.after_request(_add_security_headers)
    return app


def _add_security_headers(response: Response) -> Response:
    for name, value in SECURITY_HEADERS.items():
        response.headers.setdefault(name, value)
    return response


def _kept_secret(folder: Path) -> str:
    """Return the key that signs the sessions, made at the first start and the same in every process after it."""
    path = folder / "secret_key"
    folder.mkdir(parents=True, exist_ok=True)
    # A file of its own first, linked into place: of several processes that start together all get one whole key.
    draft = folder / f"secret_key.{os.getpid()}.{secrets.token_hex(4)}"
    if not path.exists():
        draft.touch(mode=0o600)
        draft.write_text(secrets.token_urlsafe(48))
        try:
            os.link(draft, path)
        except FileExistsError:
            pass
        finally:
            draft.unlink()
    return path.read_text()
