"""One URL, for the view that a test has put into the request's environment."""

from __future__ import annotations

from typing import Any

from django.urls import path

urlpatterns: list[Any] = []


def route(view: Any) -> None:
    """Have a view answer at ``/``."""
    urlpatterns[:] = [path("", view)]
