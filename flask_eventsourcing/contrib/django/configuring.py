"""The setting ``EVENTSOURCING``: a mapping from the name of an application to its options."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from django.conf import settings
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils.module_loading import import_string
from eventsourcing.application import Application

from ...config import OF_CONNECTIONS, Config, DialectOptions, checked
from ...exceptions import ConfigurationError
from .in_cassandra import engine_settings, is_engine, read_settings

SETTING = "EVENTSOURCING"
LOCK = "PROJECTION_LOCK"
# DATABASES has the options of connections.
OPTIONS = tuple(each.upper() for each in DialectOptions.settings() if each not in OF_CONNECTIONS)
"""The keys about a database, which must be the same for each application with events in it."""
FURTHER = ("METADATA", "METADATA_USER", LOCK, *OPTIONS)
KEYS = ("APPLICATION", "DATABASE", "ENV", "CASSANDRA", *FURTHER)
PROGRAM = "manage.py eventsourcing"
EXAMPLE = f'{SETTING} = {{"Bank": {{"APPLICATION": "bank.domain.Bank"}}}}'


@dataclass(frozen=True)
class Configured:
    """The options of one application in the setting."""

    name: str
    path: Any
    """Of the class: ``APPLICATION``."""
    alias: str
    """The database of the events, or of the models of projections if the events are apart: ``DATABASE``."""
    env: Mapping[str, str]
    """The environment that the library reads: ``ENV``."""
    further: Mapping[str, Any] = field(default_factory=dict)
    """The other options, by their keys."""
    cassandra: Config | None = None
    """The settings of the cluster if the events are in Cassandra, from ``CASSANDRA`` or the engine's settings."""

    engine: str | None = None
    """The alias of django-cassandra-engine that has these settings."""

    @property
    def metadata(self) -> Any:
        """The dotted paths of functions that return metadata, or False and none are stored: ``METADATA``."""
        return self.further.get("METADATA", ())

    @property
    def metadata_user(self) -> Any:
        """Whether the user of a request is among them: ``METADATA_USER``."""
        return self.further.get("METADATA_USER", False)

    @property
    def lease(self) -> bool:
        """Whether runners of projections hold a lease rather than a lock of the server: ``PROJECTION_LOCK``."""
        return self.further.get(LOCK) == "lease"

    @property
    def options(self) -> dict[str, Any]:
        """The options of the database: :data:`OPTIONS`."""
        return {key: self.further[key] for key in OPTIONS if key in self.further}

    @property
    def place(self) -> str:
        """How commands name the place of the events: an alias, or the keyspace."""
        if self.cassandra is None:
            return self.alias
        return self.engine or f"cassandra:{self.cassandra.cassandra_keyspace}"

    @property
    def is_apart(self) -> bool:
        """Whether the events are not in a database of Django's."""
        return self.cassandra is not None

    def application_class(self) -> type[Application[Any]]:
        """Import the class.

        :raises ConfigurationError: when there is none of that name, or it is no application of the library's, or has
            another name than the tables.
        """
        where = f"{SETTING}[{self.name!r}]['APPLICATION']"
        try:
            found = import_string(self.path)
        except ImportError as error:
            raise ConfigurationError(f"{where} is {self.path!r}, which cannot be imported: {error}") from error
        if not (isinstance(found, type) and issubclass(found, Application)):
            raise ConfigurationError(
                f"{where} is {self.path!r}, which is not an application class: name a subclass of Application; found "
                f"{found!r}."
            )
        if found.name != self.name:
            raise ConfigurationError(
                f"{where} is {self.path!r}, whose application is called {found.name!r}: write {SETTING}[{found.name!r}]"
                f", and event_models(__name__, {found.name!r})."
            )
        return found


def configured() -> dict[str, Configured]:
    """Return the options of each application in the setting, by the names of the applications.

    :raises ConfigurationError: naming the value that cannot be used.
    """
    found = getattr(settings, SETTING, None)
    if found is None:
        raise ConfigurationError(f"{SETTING} is not set: write for example {EXAMPLE}.")
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{SETTING} must be a mapping such as {EXAMPLE}; found {found!r}.")
    return {name: _read(name, value) for name, value in found.items()}


def _read(name: Any, value: Any) -> Configured:
    if not isinstance(name, str) or not name:
        raise ConfigurationError(f"{SETTING} has the key {name!r}, which is no name of an application.")
    where = f"{SETTING}[{name!r}]"
    if not isinstance(value, Mapping):
        raise ConfigurationError(f"{where} must be a mapping with the key 'APPLICATION'; found {value!r}.")
    unknown = [key for key in value if key not in KEYS]
    if unknown:
        raise ConfigurationError(f"{where} has {unknown[0]!r}, which nothing reads: the keys are {', '.join(KEYS)}.")
    further = {key: value[key] for key in FURTHER if key in value}
    path, alias, env = value.get("APPLICATION"), value.get("DATABASE", DEFAULT_DB_ALIAS), value.get("ENV", {})
    found = Configured(name, path, alias, env, further)
    _check_values(where, found)
    given = {key: checked(key.lower(), further[key], f"{where}[{key!r}]") for key in (LOCK, *OPTIONS) if key in further}
    found = replace(found, further={**further, **given})
    return _located(where, found, value)


def _located(where: str, found: Configured, value: Mapping[str, Any]) -> Configured:
    """Add the place of the events, if it is Cassandra."""
    own = value.get("CASSANDRA")
    if not is_engine(found.alias):
        return found if own is None else replace(found, cassandra=read_settings(f"{where}['CASSANDRA']", own))
    further = own if isinstance(own, Mapping) else {}
    try:
        config = read_settings(f"{where}['CASSANDRA']", {**engine_settings(found.alias), **further}, replicated=False)
    except ConfigurationError as error:
        raise ConfigurationError(f"{error} The other settings come from DATABASES[{found.alias!r}].") from error
    # The engine has no transactions, so the models of projections are in the project's first database.
    return replace(found, alias=DEFAULT_DB_ALIAS, cassandra=config, engine=found.alias)


def options_of(found: Sequence[Configured]) -> DialectOptions:
    """Return the options of a database.

    :param found: the applications whose events, or projections, are there.
    :raises ConfigurationError: when they do not agree.
    """
    first = found[0] if found else None
    for each in found[1:]:
        if first is not None and each.options != first.options:
            raise ConfigurationError(
                f"{SETTING}[{first.name!r}] and {SETTING}[{each.name!r}] are in one database, {first.alias!r}: write "
                f"the same for {', '.join(sorted({*each.options, *first.options}))} in both."
            )
    return DialectOptions(
        program=PROGRAM,
        ends=("transaction.commit()", "transaction.rollback()"),
        setting=f"{SETTING}[{first.name!r}]['{{0}}']" if first is not None else f"{SETTING}_{{0}}",
        **({key.lower(): value for key, value in first.options.items()} if first is not None else {}),
    )


def _refuse_former(where: str, env: Any) -> None:
    keys = env if isinstance(env, Mapping) else ()
    key = next((each for each in keys if str(each).upper().endswith("DJANGO_DB_ALIAS")), None)
    if key is not None:
        raise ConfigurationError(
            f"{where}['ENV'] has {key!r}, a setting of eventsourcing-django that would have no effect here: write "
            f"{where}['DATABASE']."
        )


def _check_values(where: str, found: Configured) -> None:
    if not isinstance(found.path, str) or "." not in found.path:
        raise ConfigurationError(
            f"{where}['APPLICATION'] must be the dotted path of a class, such as 'bank.domain.Bank'; found "
            f"{found.path!r}."
        )
    _refuse_former(where, found.env)
    if found.alias not in connections:
        known = ", ".join(map(repr, connections))
        raise ConfigurationError(f"{where}['DATABASE'] is {found.alias!r}, and DATABASES has {known}.")
    env: Any = found.env
    if not isinstance(env, Mapping) or not all(isinstance(item, str) for pair in env.items() for item in pair):
        raise ConfigurationError(f"{where}['ENV'] must be a mapping of strings to strings.")
    _check_metadata(where, found)


def _check_metadata(where: str, found: Configured) -> None:
    paths = found.metadata
    if paths is not False and not (isinstance(paths, list | tuple) and all(isinstance(path, str) for path in paths)):
        raise ConfigurationError(
            f"{where}['METADATA'] must be a list of dotted paths of functions, or False; found {paths!r}."
        )
    if not isinstance(found.metadata_user, bool):
        raise ConfigurationError(f"{where}['METADATA_USER'] must be True or False; found {found.metadata_user!r}.")
