"""The views of the Django site."""

from __future__ import annotations

from django.db import transaction
from django.http import HttpRequest, JsonResponse
from django.urls import path

from flask_eventsourcing.contrib.django import get_application, retry_on_conflict
from flask_eventsourcing.workers.celery import send_after_commit
from tests.torture.two_sites import Ledger, numbers_of


def ready(request: HttpRequest) -> JsonResponse:
    """Answer."""
    return JsonResponse({})


@retry_on_conflict(times=50)
def transfer(request: HttpRequest, numbers: str) -> JsonResponse:
    """Transfer."""
    get_application(Ledger).transfer(*numbers_of(numbers))
    return JsonResponse({})


@transaction.atomic
def later(request: HttpRequest, numbers: str) -> JsonResponse:
    """Have a worker transfer after the commit."""
    from tests.torture.two_sites_django.tasks import transfer as task

    send_after_commit(task, numbers)
    return JsonResponse({})


urlpatterns = [path("", ready), path("transfer/<numbers>", transfer), path("later/<numbers>", later)]
