"""What one Flask app has: its applications, models, configuration, and the way to them."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

from eventsourcing.application import Application
from eventsourcing.persistence import Notification
from flask import Flask, current_app, has_app_context
from werkzeug.local import LocalProxy

from . import cache, repository
from .binding import SessionBinding
from .config import Config
from .exceptions import ConfigurationError, NotInitializedError
from .lifecycle import ApplicationSlot
from .models import Models
from .persistence import Datastore, Factory
from .persistence.forks import in_memory
from .projections.registry import BoundProjections
from .session import Batch
from .signals import events_discarded, events_recorded

EXTENSION = "eventsourcing"
_states: weakref.WeakSet[EventSourcingState] = weakref.WeakSet()


@dataclass(eq=False)
class EventSourcingState:
    """The state of Flask-EventSourcing in one Flask app, ``app.extensions["eventsourcing"]``."""

    app: Flask
    db: Any
    config: Config
    models: Mapping[str, Models]
    """The record classes by the application's name."""
    binding: SessionBinding
    datastore: Datastore
    projections: BoundProjections
    slots: dict[type[Application[Any]], ApplicationSlot[Application[Any]]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        _states.add(self)

    def add(self, application_class: type[Application[Any]]) -> None:
        """Make the slot of an application; it is constructed at the first use in each process."""
        self.slots[application_class] = ApplicationSlot(lambda: self._construct(application_class))

    @property
    def application(self) -> Application[Any]:
        """The single application of this app and process, the first one where there are several."""
        return next(iter(self.slots.values())).get()

    @property
    def applications(self) -> Mapping[type[Application[Any]], Application[Any]]:
        """The single instance of each application class in this process."""
        return {application_class: slot.get() for application_class, slot in self.slots.items()}

    def __getitem__(self, application_class: type[Application[Any]]) -> Application[Any]:
        try:
            slot = self.slots[application_class]
        except KeyError:
            names = ", ".join(cls.__qualname__ for cls in self.slots)
            raise ConfigurationError(
                f"{application_class!r} is not registered on this Flask app (registered: {names}): "
                "pass it to EventSourcing(applications=…) or decorate it with @es.register before init_app."
            ) from None
        return slot.get()

    @property
    def env(self) -> dict[str, str]:
        """The environment with which applications, and the library's own runners, use this app's database."""
        return {
            **self.config.env,
            Factory.PERSISTENCE_MODULE: "flask_eventsourcing.persistence",
            Factory.DATASTORE: self.datastore.token,
        }

    def _construct(self, application_class: type[Application[Any]]) -> Application[Any]:
        env = self.env
        for key in (Factory.PERSISTENCE_MODULE, Factory.DATASTORE):
            # A variable with the application's name in front, set in the process's environment, would win otherwise.
            env[f"{application_class.name.upper()}_{key}"] = env[key]
        application = application_class(env=env)
        repository.install(application)
        cache.install(application, self.binding.scope)
        return application

    def construct(self) -> None:
        """Construct the applications of this process now, so that its first request does not pay for it."""
        for slot in self.slots.values():
            slot.get()

    def close(self) -> None:
        """Close the applications of this process and its idle connections to their database.

        It may be called again, and an application is constructed anew when it is used after that.
        """
        self.projections.close()
        for slot in self.slots.values():
            slot.close()
        engine = self.datastore.engine
        # The one connection of an in-memory database is the database.
        if not in_memory(engine.url):
            engine.dispose()


def states() -> list[EventSourcingState]:
    """Return the states of all Flask apps in this process on which the extension is registered."""
    return list(_states)


def publisher(app: Flask, find: Callable[[], EventSourcingState]) -> Callable[[Sequence[Batch]], None]:
    """Return the function that sends ``events_recorded`` for what was committed."""

    def publish(batches: Sequence[Batch]) -> None:
        if not events_recorded.receivers:
            return
        for application, notifications in _by_application(find(), batches):
            arguments = {"application": application, "notifications": notifications}
            for receiver in events_recorded.receivers_for(app):
                try:
                    receiver(app, **arguments)
                except Exception:
                    # The events are committed: whoever called commit() must not take that for a failure.
                    app.logger.exception("A receiver of events_recorded failed.")

    return publish


def discard(state: EventSourcingState, batches: Sequence[Batch]) -> None:
    """Send ``events_discarded`` for events that were neither committed nor rolled back."""
    for application, notifications in _by_application(state, batches):
        events_discarded.send(state.app, application=application, notifications=notifications)


def _by_application(
    state: EventSourcingState, batches: Sequence[Batch]
) -> list[tuple[Application[Any] | None, tuple[Notification, ...]]]:
    names = list(dict.fromkeys(batch.application_name for batch in batches))
    classes = {application_class.name: application_class for application_class in state.slots}
    found: list[tuple[Application[Any] | None, tuple[Notification, ...]]] = []
    for name in names:
        application = state[classes[name]] if name in classes else None
        found.append((application, tuple(n for b in batches if b.application_name == name for n in b.notifications)))
    return found


def state_of(app: Flask) -> EventSourcingState:
    """Return the state of an app.

    :raises NotInitializedError: when ``es.init_app(app)`` was not called.
    """
    state = app.extensions.get(EXTENSION)
    if not isinstance(state, EventSourcingState):
        raise NotInitializedError(
            f"The Flask app {app.name!r} has no Flask-EventSourcing state: did you call es.init_app(app)?"
        )
    return state


def current_state() -> EventSourcingState:
    """Return the state of the current app.

    :raises NotInitializedError: outside an application context, or without ``init_app``.
    """
    if not has_app_context():
        raise NotInitializedError(
            "This needs an application context: use it in a view or a command, or within 'with app.app_context():'."
        )
    return state_of(current_app._get_current_object())  # type: ignore[attr-defined]


current_application = cast(Application[Any], LocalProxy(lambda: current_state().application))
"""The application of the current Flask app, for views."""
