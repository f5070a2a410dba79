"""Makes the state of a Flask app: with its events in the database of its sessions, or apart from them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from eventsourcing.application import Application
from flask import Flask

from ..config import Config
from ..exceptions import ConfigurationError
from ..projections.registry import Registrations
from .apart_state import ApartState, make_apart_state
from .setup import RecordClasses, check_settings, make_state, originator_id_type
from .state import EventSourcingState


def made_state(
    app: Flask,
    extension: Any,
    config: Config,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of a Flask app; nothing of it is registered on the app.

    :param extension: its ``SQLAlchemy`` object; where events are apart there need be none.
    :param constructors: what constructs each application class.
    :raises ConfigurationError: naming what is wrong and the remedy.
    """
    if not config.is_apart:
        return make_state(app, extension, config, constructors, records, registrations)
    check_settings(config, list(constructors))
    id_types = {cls.name: originator_id_type(cls, config) for cls in constructors}
    return make_apart_state(app, extension, config, constructors, id_types, records, registrations)


def made_again(
    state: EventSourcingState,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of an app that has one, with other applications."""
    extension = state.extension if isinstance(state, ApartState) else state.db
    return made_state(state.app, extension, state.config, constructors, records, registrations)


def construct_now(state: EventSourcingState) -> None:
    """Construct the applications where ``EVENTSOURCING_CONSTRUCT`` says so, on engines that nobody has prepared yet."""
    if state.config.construct != "init":
        return
    # Those that were constructed before the one that fails are of no use either.
    with ExitStack() as failed, state.app.app_context():
        failed.callback(state.close)
        state.construct()
        failed.pop_all()
    state.release_connections()


def followed_by(projection_class: Any, of: Any, classes: Sequence[type[Application[Any]]]) -> type[Application[Any]]:
    """Return the application class whose events a projection follows, as the argument *of* names it.

    :param classes: the registered application classes.
    :raises ConfigurationError: when it is none of these, or is not given and there are several.
    """
    if of is None and len(classes) == 1:
        return classes[0]
    if of not in classes:
        names = ", ".join(cls.__qualname__ for cls in classes) or "none"
        raise ConfigurationError(
            f"Projection {projection_class!r}: of={of!r} is not a registered application class (registered: {names})."
        )
    found: type[Application[Any]] = of
    return found


@contextmanager
def untouched_on_error(app: Flask) -> Iterator[None]:
    """Take back what was done to an app if the block fails."""
    mappings: list[MutableMapping[Any, Any]] = [app.extensions, app.config, app.after_request_funcs, app.cli.commands]
    lists: list[list[Any]] = [app.teardown_appcontext_funcs, app.shell_context_processors]
    before = [dict(mapping) for mapping in mappings], [list(items) for items in lists]
    functions = {key: list(value) for key, value in app.after_request_funcs.items()}

    def restore() -> None:
        for mapping, old in zip(mappings, before[0], strict=True):
            mapping.clear()
            mapping.update(old)
        for items, old_items in zip(lists, before[1], strict=True):
            items[:] = old_items
        for key, value in functions.items():
            app.after_request_funcs[key][:] = value

    # An app that is half made is no use.
    with ExitStack() as failed:
        failed.callback(restore)
        yield
        failed.pop_all()
