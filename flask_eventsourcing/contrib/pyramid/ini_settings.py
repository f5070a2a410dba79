"""The settings ``eventsourcing.…`` in the ini file of a Pyramid application."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

from pyramid.settings import asbool

from ...config import ProjectionLock, checked
from ...exceptions import ConfigurationError
from ...persistence import DialectOptions

PREFIX = "eventsourcing."
PROGRAM = "pyramid-eventsourcing"
CALLED: ContextVar[str] = ContextVar("called", default=f"{PROGRAM} <ini file>")
"""How messages name the commands of an application that is being made: with its ini file, where that is known."""
ENV = "env."
"""The prefix of what the library reads from the environment, as in ``eventsourcing.env.CIPHER_KEY``."""


@dataclass(frozen=True)
class IniSettings:
    """The settings of a Pyramid application; each is the key ``eventsourcing.`` + its name in the ini file.

    The settings of ``flask_eventsourcing.persistence.DialectOptions`` are further ones.
    """

    metadata: bool = True
    """Whether the metadata of a request are stored with its events."""
    metadata_user: bool = False
    """Whether ``request.authenticated_userid`` is among them."""
    projection_lock: ProjectionLock = "database"
    options: DialectOptions = field(default_factory=DialectOptions)
    env: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def from_mapping(cls, settings: Mapping[str, Any]) -> IniSettings:
        """Read the settings.

        :raises ConfigurationError: for an unknown key or a value that cannot be used; the message names the key.
        """
        plain = {"metadata": True, "metadata_user": False, "projection_lock": "database"}
        options = {each: getattr(DialectOptions(), each) for each in DialectOptions.settings()}
        found: dict[str, Any] = {}
        env: dict[str, str] = {}
        for key, given in settings.items():
            if not key.startswith(PREFIX):
                continue
            name = key.removeprefix(PREFIX)
            if name.startswith(ENV):
                env[name.removeprefix(ENV)] = given
            elif name in plain | options:
                found[name] = _value(key, name, given, (plain | options)[name])
            else:
                close = difflib.get_close_matches(name, plain | options, n=1)
                known = f"did you mean {PREFIX}{close[0]}?" if close else f"known are {', '.join(plain | options)}"
                raise ConfigurationError(f"Unknown setting {key}: {known}")
        given_options = {name: value for name, value in found.items() if name in options}
        chosen = DialectOptions(program=CALLED.get(), setting=f"{PREFIX}{{1}}", **given_options)
        checked("env", env, f"{PREFIX}{ENV}…")
        return cls(**{name: value for name, value in found.items() if name in plain}, options=chosen, env=env)


def _value(key: str, name: str, given: Any, default: Any) -> Any:
    """Return the value of a setting; an ini file gives it as a text."""
    value = given
    if isinstance(given, str) and isinstance(default, bool):
        if given.strip().lower() not in ("true", "false", "yes", "no", "on", "off", "1", "0", "t", "f", "y", "n"):
            raise ConfigurationError(f"{key} must be true or false; found {given!r}.")
        value = asbool(given)
    elif isinstance(given, str) and isinstance(default, float):
        try:
            value = float(given)
        except ValueError:
            raise ConfigurationError(f"{key} must be a number of seconds; found {given!r}.") from None
    if name in ("metadata", "metadata_user"):
        if not isinstance(value, bool):
            raise ConfigurationError(f"{key} must be true or false; found a value of type {type(value).__name__}.")
        return value
    return checked(name, value, key)
