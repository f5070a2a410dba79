"""Projections whose handlers write Django models, in ``projections.py`` of any app.

::

    @projection(of="Bank")
    class Balances(ModelProjection):
        models = [Balance]

        @on(Account.Opened)
        def opened(self, event):
            Balance.objects.create(account_id=event.originator_id, amount=0)

A handler with a parameter ``using`` gets the alias of the database, one with ``recorded`` gets the position, time and
metadata of the event. The position and the models are committed together, so no event is applied twice or missed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, ClassVar, TypeVar

from django.db import models
from eventsourcing.application import Application
from sqlalchemy import orm

from ...exceptions import ConfigurationError
from ...projections.definitions import ModelProjection as PlainProjection
from ...projections.definitions import Start, reaction
from ...projections.definitions import on as plain_on
from .configuring import SETTING
from .lending import sqlalchemy_errors

__all__ = ["ModelProjection", "Start", "on", "projection", "reaction"]

F = TypeVar("F", bound=Callable[..., Any])
P = TypeVar("P", bound=type["ModelProjection"])
USING = "using"

registered: list[tuple[type[ModelProjection], type[Application[Any]] | str | None]] = []
"""The projections of the project, each with the application that it was declared for."""


def on(*event_classes: type[Any]) -> Callable[[F], F]:
    """Mark a method of a :class:`ModelProjection` as the handler of event classes and their subclasses.

    The method takes the domain event, and ``using`` and ``recorded`` if it has these parameters: ``def opened(self,
    event)``. Only the handler of the most specific class is called.

    :raises ConfigurationError: when an argument is not an event class.
    """
    marked: Any = plain_on(*event_classes)
    found: Callable[[F], F] = marked
    return found


class ModelProjection(PlainProjection):
    """Keep Django models up to date with the events of an application: a read model.

    Handlers run in a transaction of the worker, and neither commit nor roll it back, as the position is committed with
    what they write::

        @projection
        class Balances(ModelProjection):
            models = (Balance,)

            @on(Account.Opened)
            def opened(self, event):
                Balance.objects.create(account_id=event.originator_id, amount=0)
    """

    prefetch: ClassVar[bool] = False
    handled_with: ClassVar[Sequence[str]] = ()
    offered: ClassVar[Sequence[str]] = (USING,)

    @classmethod
    def is_model(cls, model: Any) -> bool:
        """Whether something is a model of Django's, with a table."""
        options: Any = getattr(model, "_meta", None)
        return isinstance(model, type) and issubclass(model, models.Model) and not options.abstract

    def arguments_of(self, handler: Callable[..., Any], session: orm.Session) -> tuple[Sequence[Any], dict[str, Any]]:
        """Return the arguments that a handler has parameters for."""
        return (), {USING: session.info[USING]} if handler in self.handlers.naming[USING] else {}

    def told_errors(self) -> AbstractContextManager[object]:
        """Return a context that turns errors of Django's connections into SQLAlchemy's, which tell an outage."""
        return sqlalchemy_errors(self.engine)

    engine: Any = None
    """Set where it is run."""


def projection(*, of: type[Application[Any]] | str | None = None) -> Callable[[P], P]:
    """Register a projection, as a decorator of its class.

    ``manage.py eventsourcing run --all`` keeps its models up to date, in a process beside the web server.

    :param of: the application whose events it follows, or its name; not needed if there is only one.
    :raises ConfigurationError: when it is no subclass of this module's ``ModelProjection``, or is inline.
    """

    def register(cls: P) -> P:
        given: Any = cls
        if not isinstance(given, type) or not issubclass(given, ModelProjection):
            raise ConfigurationError(
                f"@projection is for classes derived from {ModelProjection.__module__}.ModelProjection; found {cls!r}."
            )
        if cls.inline:
            raise ConfigurationError(
                f"Projection {cls.__name__} has inline = True, which Django projects do not support: run it in a "
                "worker, 'manage.py eventsourcing run', and call wait_for() where you need it at once."
            )
        registered.append((cls, of))
        return cls

    if isinstance(of, type) and not issubclass(of, Application):
        raise ConfigurationError(f"@projection(of=…) takes an application of {SETTING}, or its name; found {of!r}.")
    return register
