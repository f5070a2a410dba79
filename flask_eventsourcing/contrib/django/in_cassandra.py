"""Applications of a Django project whose events are in Cassandra: no model and no migration belongs to them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields
from functools import partial
from typing import Any

from django.db import connections
from eventsourcing.application import Application

from ...applications.apart import EventStore, construct_apart, make_store, tell_recorded
from ...config import REQUIRED_BY_CASSANDRA, Config, checked
from ...exceptions import ConfigurationError
from ...lifecycle import ApplicationSlot, HostSlot
from ...metadata import Collector
from ...signals import events_recorded

ENGINE = "django_cassandra_engine"
"""The ``ENGINE`` of an alias of django-cassandra-engine."""
PREFIX = "cassandra_"
KEYS = {each.name.removeprefix(PREFIX).upper(): each.name for each in fields(Config) if each.name.startswith(PREFIX)}
"""The keys of the mapping, each with the name of the same setting in a Flask app."""
NOT_READ = ("auth_provider", "cloud", "ssl_options")
"""Options of the engine without which a session of this package would reach other nodes, or none."""


def is_engine(alias: str) -> bool:
    """Whether an alias is one of django-cassandra-engine's, without making its connection."""
    settings: Any = connections.settings
    return str(settings.get(alias, {}).get("ENGINE", "")).partition(".")[0] == ENGINE


def engine_settings(alias: str) -> dict[str, Any]:
    """Return the settings of the cluster from the engine's settings. The engine's session is not used.

    :raises ConfigurationError: for an option that has no counterpart here.
    """
    settings: Any = connections.settings
    given = settings[alias]
    options = given.get("OPTIONS", {})
    connection = options.get("connection", {})
    _refuse_unread(alias, given, connection)
    found: dict[str, Any] = {
        "CONTACT_POINTS": [each.strip() for each in str(given.get("HOST") or "").split(",") if each.strip()],
        "KEYSPACE": given.get("NAME"),
        "PORT": connection.get("port") or _port(str(given.get("PORT") or 9042)),
        "USERNAME": given.get("USER") or None,
        "PASSWORD": given.get("PASSWORD") or None,
        "SSL_CONTEXT": connection.get("ssl_context"),
    }
    replication = _replication(options.get("replication", {}))
    return found if replication is None else {**found, "REPLICATION": replication}


def _port(text: str) -> Any:
    return int(text) if text.isdigit() else text


def _refuse_unread(alias: str, given: Mapping[str, Any], connection: Mapping[str, Any]) -> None:
    # The engine adds values that it makes of these to the settings.
    is_known = bool(given.get("USER") and given.get("PASSWORD"))
    for name in NOT_READ:
        if connection.get(name) and not (is_known and name == "auth_provider"):
            raise ConfigurationError(
                f"DATABASES[{alias!r}]['OPTIONS']['connection'] has {name!r}, which is not read for events: write "
                "USER and PASSWORD or 'ssl_context', or name the cluster in 'CASSANDRA'."
            )


def _replication(given: Mapping[str, Any]) -> Any:
    """Return the copies in the form of this package's setting, or None if they are not given."""
    centres = {key: value for key, value in given.items() if key not in ("strategy_class", "replication_factor")}
    return centres or given.get("replication_factor")


def read_settings(where: str, given: Any, *, replicated: bool = True) -> Config:
    """Check a mapping with the settings of the cluster, and return them.

    :param where: how messages name the mapping.
    :param replicated: whether it must have the replication; with the engine, which makes keyspaces too, it need not.
    :raises ConfigurationError: naming a key, and what is wrong with it.
    """
    if not isinstance(given, Mapping):
        raise ConfigurationError(
            f'{where} must be a mapping such as {{"CONTACT_POINTS": ["127.0.0.1"], "KEYSPACE": "bank", "REPLICATION": '
            "3}."
        )
    _check_keys(where, given, replicated=replicated)
    values = {KEYS[key]: checked(KEYS[key], value, f"{where}[{key!r}]") for key, value in given.items()}
    return Config(persistence="cassandra", commit="save", **values)


def _check_keys(where: str, given: Mapping[str, Any], *, replicated: bool) -> None:
    unknown = [key for key in given if key not in KEYS]
    if unknown:
        raise ConfigurationError(f"{where} has {unknown[0]!r}, which nothing reads: the keys are {', '.join(KEYS)}.")
    for key, name in KEYS.items():
        if name in REQUIRED_BY_CASSANDRA and key not in given and (replicated or key != "REPLICATION"):
            raise ConfigurationError(f"{where}[{key!r}] is missing, which has no default.")
    if (given.get("USERNAME") is None) != (given.get("PASSWORD") is None):
        raise ConfigurationError(f"{where}: 'USERNAME' and 'PASSWORD' go together: set both.")


class ApartApplication:
    """One application whose events are in Cassandra.

    :param application_class: its class.
    :param env: what the library reads from the environment.
    """

    def __init__(self, application_class: type[Application[Any]], store: EventStore, env: Mapping[str, str]) -> None:
        self.store = store
        self.slot: ApplicationSlot[Application[Any]] = HostSlot(
            partial(construct_apart, application_class, application_class.name, store, env, self._publish)
        )

    def _publish(self, name: str, recordings: Any) -> None:
        if events_recorded.receivers:
            application = self.slot.get()
            tell_recorded(application, application, recordings)


def new_store(config: Config | None, collector: Collector | None, id_types: Mapping[str, Any]) -> EventStore:
    """Make a store; nothing is connected before it is used.

    :raises ConfigurationError: when the driver is missing, or cannot be used in this process.
    """
    if config is None:
        raise ConfigurationError("There are no settings of a cluster.")
    return make_store(config, collector, id_types, "An application in Cassandra")
