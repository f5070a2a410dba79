"""Chooses how the state of a Flask app is made: with its events in the database of its sessions, or apart from them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from eventsourcing.application import Application
from flask import Flask

from ..config import Config
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
    return make_apart_state(app, extension, config, constructors, id_types, registrations)


def made_again(
    state: EventSourcingState,
    constructors: Mapping[type[Application[Any]], Any],
    records: RecordClasses,
    registrations: Registrations,
) -> EventSourcingState:
    """Make the state of an app that has one, with other applications."""
    extension = state.extension if isinstance(state, ApartState) else state.db
    return made_state(state.app, extension, state.config, constructors, records, registrations)
