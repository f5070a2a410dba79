"""The configuration: the ``EVENTSOURCING_…`` keys of ``app.config``, read and checked once."""

from __future__ import annotations

import difflib
import importlib.util
import re
import ssl
import sys
import unicodedata
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Literal

from .exceptions import ConfigurationError

PREFIX = "EVENTSOURCING_"

CommitMode = Literal["explicit", "request", "save"]
OriginatorIdType = Literal["uuid", "text"]
PostgresOrder = Literal["advisory-lock", "table-lock"]
REQUIRED_BY_CASSANDRA = ("cassandra_contact_points", "cassandra_keyspace", "cassandra_replication")
RENAMED = {(f"{PREFIX}POSTGRES_ORDER", "floor"): ("advisory-lock", "0.3")}
"""Values that had another name before, each with its present one, and the version that ends the old one."""
ProjectionLock = Literal["database", "lease"]
Construct = Literal["first-use", "init"]
Persistence = Literal["sqlalchemy", "cassandra"]


def _one_of(*choices: str) -> Callable[[Any], str | None]:
    def check(value: Any) -> str | None:
        if isinstance(value, str) and value in choices:
            return None
        return "must be one of " + ", ".join(repr(choice) for choice in choices)

    return check


def _optional(check: Callable[[Any], str | None]) -> Callable[[Any], str | None]:
    def optional(value: Any) -> str | None:
        problem = None if value is None else check(value)
        return problem and f"{problem}, or None"

    return optional


def is_plain(text: str) -> bool:
    """Whether a string has no line breaks, no control characters, and nothing that a database does not take.

    It refuses control characters, separators of lines and paragraphs, and unpaired surrogates.
    """
    # A printable string is plain. In any other one, each character is checked, because some are allowed.
    return text.isprintable() or not any(unicodedata.category(each) in ("Cc", "Cs", "Zl", "Zp") for each in text)


def _name(value: Any) -> str | None:
    return None if isinstance(value, str) and value else "must be a non-empty string"


def _identifier(value: Any) -> str | None:
    problem = _name(value)
    return problem or (None if is_plain(value) else "must be a name without control characters and line breaks")


def _seconds(value: Any) -> str | None:
    # Servers count milliseconds, and take 0 for "without end".
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return None if number and 0.001 <= value < 86_400 else "must be a number of seconds from 0.001 to below 86,400"


def _boolean(value: Any) -> str | None:
    return None if isinstance(value, bool) else "must be True or False"


def _environment(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "must be a mapping of strings to strings, as the library's Application(env=...) takes it"
    items: list[tuple[Any, Any]] = list(value.items())
    for key, item in items:
        if not (isinstance(key, str) and isinstance(item, str)):
            return f"must map strings to strings, but {_named(key)} is mapped to a value of type {_type(item)}"
    return None


def _binds(value: Any) -> str | None:
    if not isinstance(value, Mapping):
        return "must be a mapping of the names of applications to bind keys"
    items: list[tuple[Any, Any]] = list(value.items())
    for name, bind_key in items:
        if _name(name) or _optional(_name)(bind_key):
            return (
                f"must map names of applications to bind keys or None, but {_named(name)} is mapped to a value of "
                f"type {_type(bind_key)}"
            )
    return None


def _providers(value: Any) -> str | None:
    is_list = isinstance(value, Sequence) and not isinstance(value, str)
    if value is False or (is_list and all(map(callable, value))):
        return None
    return "must be a list of functions without arguments that return a mapping of strings to strings, or False"


def _user(value: Any) -> str | None:
    if value == "flask-login":
        found = importlib.util.find_spec("flask_login")
        return None if found is not None else "is 'flask-login', which is not installed: run pip install Flask-Login"
    return None if callable(value) else "must be 'flask-login', or a function without arguments that returns a string"


def _contact_points(value: Any) -> str | None:
    items: list[Any] = list(value) if isinstance(value, list | tuple) else []
    # An address of IPv6 has more than one colon.
    if not items or any(_name(each) or each.count(":") == 1 for each in items):
        return (
            "must be a list of names or addresses of nodes, without a port, as ['127.0.0.1']; the port is that of "
            f"{PREFIX}CASSANDRA_PORT"
        )
    return None


def _keyspace(value: Any) -> str | None:
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z0-9_]{1,48}", value) and not value.startswith("system"):
        return None
    return "must be a name of 1 to 48 letters, digits and underscores from A to Z, and not one of the system keyspaces"


def _replication(value: Any) -> str | None:
    copies: list[Any] = [value]
    if isinstance(value, Mapping):
        copies = list(value.values()) if all(isinstance(name, str) and name for name in value) else []
    if copies and all(isinstance(each, int) and not isinstance(each, bool) and each > 0 for each in copies):
        return None
    return "must be how many nodes have each row, as 3, or that for each data centre, as {'datacenter1': 3}"


def _port(value: Any) -> str | None:
    number = isinstance(value, int) and not isinstance(value, bool)
    return None if number and 0 < value < 65_536 else "must be a whole number from 1 to 65,535"


def _ssl_context(value: Any) -> str | None:
    return None if isinstance(value, ssl.SSLContext) else "must be an ssl.SSLContext"


def _type(value: Any) -> str:
    # No part of a value that can be secret, such as a key of a cipher, is shown.
    return type(value).__name__


def _named(key: Any) -> str:
    return repr(key) if isinstance(key, str) else f"a key of type {_type(key)}"


def _current(key: str, value: Any) -> Any:
    """Return the present name of a value that had another one."""
    renamed = RENAMED.get((key, value)) if isinstance(value, str) else None
    if renamed is None:
        return value
    present, end = renamed
    message = f"{key} = {value!r} is now called {present!r}. Version {end} will not accept the old name."
    warnings.warn(message, DeprecationWarning, stacklevel=_depth_of_caller())
    return present


def _depth_of_caller() -> int:
    """Return the ``stacklevel`` of the code outside of this package, whose value it is, for the calling function."""
    package = __name__.partition(".")[0]
    frame, depth = sys._getframe(1), 1
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame, depth = frame.f_back, depth + 1
    return depth


def _checked(check: Callable[[Any], str | None], *, shown: bool = False) -> dict[str, Any]:
    """Return the metadata of a setting.

    :param shown: whether a wrong value may be shown: it cannot be a secret that was put in the wrong place.
    """
    return {"check": check, "shown": shown}


@dataclass(frozen=True)
class Config:
    """The checked configuration of one Flask app.

    Each attribute is the ``app.config`` key ``EVENTSOURCING_`` + its name in capitals. See ``docs/configuration.md``.

    .. deprecated:: 0.1.0 The value ``"floor"`` of ``EVENTSOURCING_POSTGRES_ORDER``: write ``"advisory-lock"``.
    """

    commit: CommitMode = field(
        default="explicit", metadata=_checked(_one_of("explicit", "request", "save"), shown=True)
    )
    env: Mapping[str, str] = field(default_factory=dict, metadata=_checked(_environment))
    bind_key: str | None = field(default=None, metadata=_checked(_optional(_name)))
    binds: Mapping[str, str | None] = field(default_factory=dict, metadata=_checked(_binds))
    schema: str | None = field(default=None, metadata=_checked(_optional(_identifier)))
    construct: Construct = field(default="first-use", metadata=_checked(_one_of("first-use", "init"), shown=True))
    originator_id_type: OriginatorIdType | None = field(
        default=None, metadata=_checked(_optional(_one_of("uuid", "text")), shown=True)
    )
    lock_timeout: float = field(default=30.0, metadata=_checked(_seconds, shown=True))
    postgres_order: PostgresOrder = field(
        default="advisory-lock", metadata=_checked(_one_of("advisory-lock", "table-lock"), shown=True)
    )
    postgres_notify: bool = field(default=True, metadata=_checked(_boolean, shown=True))
    sqlite_wal: bool = field(default=True, metadata=_checked(_boolean, shown=True))
    stall_limit: float = field(default=60.0, metadata=_checked(_seconds, shown=True))
    metadata: Literal[False] | Sequence[Callable[[], Mapping[str, str] | None]] = field(
        default=(), metadata=_checked(_providers)
    )
    metadata_user: str | Callable[[], str | None] | None = field(default=None, metadata=_checked(_optional(_user)))
    correlation_index: bool = field(default=False, metadata=_checked(_boolean, shown=True))
    projection_lock: ProjectionLock = field(
        default="database", metadata=_checked(_one_of("database", "lease"), shown=True)
    )
    persistence: Persistence = field(
        default="sqlalchemy", metadata=_checked(_one_of("sqlalchemy", "cassandra"), shown=True)
    )
    cassandra_contact_points: Sequence[str] = field(default=(), metadata=_checked(_contact_points))
    cassandra_keyspace: str | None = field(default=None, metadata=_checked(_keyspace))
    cassandra_replication: int | Mapping[str, int] | None = field(default=None, metadata=_checked(_replication))
    cassandra_port: int = field(default=9042, metadata=_checked(_port, shown=True))
    cassandra_local_dc: str | None = field(default=None, metadata=_checked(_optional(_identifier)))
    cassandra_username: str | None = field(default=None, metadata=_checked(_optional(_name)))
    cassandra_password: str | None = field(default=None, metadata=_checked(_optional(_name)))
    cassandra_ssl_context: ssl.SSLContext | None = field(default=None, metadata=_checked(_optional(_ssl_context)))
    cassandra_consistency: str = field(
        default="LOCAL_QUORUM", metadata=_checked(_one_of("LOCAL_QUORUM", "QUORUM", "ALL"), shown=True)
    )
    cassandra_serial_consistency: str = field(
        default="LOCAL_SERIAL", metadata=_checked(_one_of("LOCAL_SERIAL", "SERIAL"), shown=True)
    )
    cassandra_patience: float = field(default=10.0, metadata=_checked(_seconds, shown=True))

    @property
    def is_apart(self) -> bool:
        """Whether the events are in a store of their own, and not in a database of SQLAlchemy's."""
        return self.persistence != "sqlalchemy"

    def bind_key_of(self, application_name: str) -> str | None:
        """Return the bind key of the database that has an application's events."""
        return self.binds.get(application_name, self.bind_key)

    @classmethod
    def from_mapping(cls, config: Mapping[str, Any]) -> Config:
        """Read the ``EVENTSOURCING_…`` keys of *config*.

        :raises ConfigurationError: for an unknown key or a value of the wrong type; the message names the key,
            what was found and what is expected.
        """
        known = {PREFIX + item.name.upper(): item for item in fields(cls)}
        values: dict[str, Any] = {}
        for key, given in config.items():
            if not key.startswith(PREFIX):
                continue
            if key not in known:
                # Compared without the prefix, which would make every key resemble every other.
                close = difflib.get_close_matches(key[len(PREFIX) :], [name[len(PREFIX) :] for name in known], n=1)
                hint = (
                    f"did you mean {PREFIX}{close[0]}?" if close else f"the known keys are {', '.join(sorted(known))}"
                )
                raise ConfigurationError(f"Unknown configuration key {key}: {hint}")
            value = checked(known[key].name, given, key)
            values[known[key].name] = dict(value) if isinstance(value, Mapping) else value
            if isinstance(value, list):
                values[known[key].name] = list(value)
        return cls(**_fitting(values))


def _fitting(values: dict[str, Any]) -> dict[str, Any]:
    """Return settings whose defaults fit each other: the default of one depends on another.

    :raises ConfigurationError: naming one that does not fit.
    """
    given = sorted(name for name in values if name.startswith("cassandra_"))
    if values.get("persistence") != "cassandra":
        if given and "persistence" not in values:
            raise ConfigurationError(
                f"{PREFIX}{given[0].upper()} is set, but the events would be in the database of SQLAlchemy: set "
                f"{PREFIX}PERSISTENCE to 'cassandra', or to 'sqlalchemy' if that is meant."
            )
        return values
    for name in REQUIRED_BY_CASSANDRA:
        if name not in values:
            raise ConfigurationError(
                f"{PREFIX}PERSISTENCE is 'cassandra', but {PREFIX}{name.upper()} is missing, which has no default."
            )
    if (values.get("cassandra_username") is None) != (values.get("cassandra_password") is None):
        raise ConfigurationError(f"{PREFIX}CASSANDRA_USERNAME and {PREFIX}CASSANDRA_PASSWORD go together: set both.")
    if values.setdefault("commit", "save") != "save":
        raise ConfigurationError(
            f"{PREFIX}COMMIT is {values['commit']!r}, but Cassandra has no transaction that could be committed later: "
            "an event is stored when save() returns. Remove the setting, or set it to 'save'."
        )
    return values


_FIELDS = {item.name: item for item in fields(Config)}


def checked(name: str, given: Any, shown_as: str) -> Any:
    """Return the value of a setting, by its present name if it had another one.

    :param name: of the attribute of :class:`Config`.
    :param shown_as: how messages name the setting.
    :raises ConfigurationError: when it cannot be used.
    """
    value = _current(f"{PREFIX}{name.upper()}", given)
    metadata = _FIELDS[name].metadata
    problem = metadata["check"](value)
    if problem:
        plain = value is None or isinstance(value, str | int | float)
        found = repr(value) if metadata["shown"] and plain else f"a value of type {_type(value)}"
        raise ConfigurationError(f"{shown_as} {problem}; found {found}.")
    return value


OF_CONNECTIONS = ("sqlite_wal",)
"""The fields of :class:`DialectOptions` about how connections are made."""


@dataclass(frozen=True)
class DialectOptions:
    """What the configuration says about databases, with times in seconds.

    A program on ``PlainHost`` passes it as ``options``; in a Flask app the settings of the same names make it.

    :param program: how messages call the commands, such as ``python -m bank``; None to name a command alone.
    :param ends: how messages name the calls that commit and roll back the host's session.
    :param setting: how they name a setting, with ``{0}`` for its name in capitals, ``{1}`` for that in small ones.
    :raises ConfigurationError: for a value that the setting of that name refuses.
    """

    lock_timeout: float = 30.0
    postgres_order: PostgresOrder = "advisory-lock"
    postgres_notify: bool = True
    sqlite_wal: bool = True
    stall_limit: float = 60.0
    program: str | None = None
    ends: tuple[str, str] = ("session.commit()", "session.rollback()")
    setting: str = "EVENTSOURCING_{0}"

    def __post_init__(self) -> None:
        for name in self.settings():
            object.__setattr__(self, name, checked(name, getattr(self, name), f"DialectOptions({name}=…)"))

    @classmethod
    def settings(cls) -> Sequence[str]:
        """Return the names of those that are settings too; the host knows the others."""
        return [each.name for each in fields(cls) if each.name not in ("program", "ends", "setting")]

    def named(self, name: str) -> str:
        """Return how messages name a setting."""
        return self.setting.format(name.upper(), name)
