"""What tests see of the tasks that are sent to Celery."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from celery import signals


@contextmanager
def published() -> Iterator[list[dict[str, Any]]]:
    """Note the headers of the tasks that are sent."""
    found: list[dict[str, Any]] = []

    def note(headers: Any = None, **_: Any) -> None:
        found.append(headers)

    signals.before_task_publish.connect(note)
    try:
        yield found
    finally:
        signals.before_task_publish.disconnect(note)
