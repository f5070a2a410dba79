"""The bank of ``example_app`` under Pyramid: the same domain module, other models, views and transactions."""

from __future__ import annotations

from typing import Any

from pyramid.config import Configurator

from example_app.domain import Bank
from examples.pyramid_site.models import BankRecords


def main(global_config: Any, **settings: Any) -> Any:
    """Make the WSGI application; ``pserve`` calls this with what the ini file says."""
    with Configurator(settings=settings) as config:
        config.include("examples.pyramid_site.models")
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Bank, models=BankRecords)
        config.include("examples.pyramid_site.routes")
        config.scan("examples.pyramid_site", ignore=["examples.pyramid_site.tests", "examples.pyramid_site.alembic"])
    return config.make_wsgi_app()
