"""The Django project that gunicorn serves, for the nodes and the keyspace that the environment names."""

from __future__ import annotations

import os

import django
from django.conf import settings
from django.core.wsgi import get_wsgi_application
from django.http import HttpRequest, JsonResponse
from django.urls import path

settings.configure(
    ALLOWED_HOSTS=["*"],
    EVENTSOURCING={
        "Bank": {
            "APPLICATION": "tests.cassandra.hosts.site.CountedBank",
            "CASSANDRA": {
                "CONTACT_POINTS": os.environ["CONTACT_POINTS"].split(),
                "PORT": int(os.environ["NODE"].partition(":")[2]),
                "KEYSPACE": os.environ["KEYSPACE"],
                "REPLICATION": 3,
                "PATIENCE": 60,
            },
        }
    },
    INSTALLED_APPS=["flask_eventsourcing.contrib.django"],
    MIDDLEWARE=["flask_eventsourcing.contrib.django.middleware.EventSourcingMiddleware"],
    ROOT_URLCONF=__name__,
    SECRET_KEY="of the tests",
)
django.setup()

from flask_eventsourcing.contrib.django import get_application  # noqa: E402
from tests.cassandra.hosts.site import CountedBank, opened, sessions_of_process  # noqa: E402


def index(request: HttpRequest) -> JsonResponse:
    """Answer."""
    return JsonResponse({})


def sessions(request: HttpRequest) -> JsonResponse:
    """Count sessions of the driver."""
    return JsonResponse(sessions_of_process())


def open_account(request: HttpRequest, owner: str) -> JsonResponse:
    """Open an account."""
    return JsonResponse(opened(get_application(CountedBank), owner))


urlpatterns = [path("", index), path("sessions", sessions), path("open/<owner>", open_account)]
app = get_wsgi_application()
