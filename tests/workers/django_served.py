"""The Django project that servers run; its import uses the database, and constructs the bank, before any fork."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from uuid import UUID

import django
from django.conf import settings

from tests.django_host.databases import database_settings

if not settings.configured:
    settings.configure(
        ALLOWED_HOSTS=["*"],
        DATABASES={
            "default": database_settings(
                os.environ["DATABASE_URL"],
                CONN_MAX_AGE=60,
                CONN_HEALTH_CHECKS=bool(os.environ.get("HEALTH_CHECKS")),
            )
        },
        EVENTSOURCING={"Bank": {"APPLICATION": f"{__name__}.Bank"}},
        # The errors of requests go to the server's log.
        LOGGING={
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"console": {"class": "logging.StreamHandler"}},
            "root": {"handlers": ["console"]},
        },
        INSTALLED_APPS=["flask_eventsourcing.contrib.django", "tests.django_host.ledger"],
        MIDDLEWARE=["flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"],
        ROOT_URLCONF=__name__,
        SECRET_KEY="of the tests",
        USE_TZ=True,
    )
    django.setup()

from django.core.wsgi import get_wsgi_application
from django.db import connection, connections
from django.http import JsonResponse
from django.urls import path

from flask_eventsourcing.contrib.django import get_application, retry_on_conflict
from tests import domain

CONSTRUCTED: list[int] = []


class Bank(domain.Bank):
    """A bank that knows the process in which it was constructed."""

    def __init__(self, env: Any = None) -> None:
        super().__init__(env=env)
        CONSTRUCTED.append(os.getpid())
        with Path(os.environ["CONSTRUCTED"]).open("a") as file:
            file.write(f"{os.getpid()}\n")


def answer(request: Any) -> JsonResponse:
    """Tell which process has answered."""
    return JsonResponse({"pid": os.getpid(), "constructed": CONSTRUCTED.count(os.getpid())})


@retry_on_conflict(times=50)
def deposit(request: Any, account_id: UUID) -> JsonResponse:
    """Pay in, and tell which process has answered on which connection."""
    get_application(Bank).deposit(account_id)
    with connection.cursor() as cursor:
        cursor.execute(f"SELECT {os.environ['BACKEND']} /* process={os.getpid()} */")
        (backend,) = cursor.fetchone()
    return JsonResponse({"pid": os.getpid(), "constructed": CONSTRUCTED.count(os.getpid()), "backend": backend})


urlpatterns = [path("", answer), path("deposit/<uuid:account_id>", deposit)]
app = get_wsgi_application()
if os.environ["IMPORTED"] != "none":
    # As a module may do that has something to look up; the connection stays open.
    get_application(Bank).notification_log.select(1, 1)
if os.environ["IMPORTED"] == "closed":
    connections.close_all()
