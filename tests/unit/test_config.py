"""The configuration keys."""

from __future__ import annotations

import ssl
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.config import PREFIX, Config
from flask_eventsourcing.persistence import DialectOptions
from tests.bank import make_app

GOOD: dict[str, list[Any]] = {
    "COMMIT": ["explicit", "request", "save"],
    "ENV": [{}, {"CIPHER_KEY": "x"}],
    "BIND_KEY": [None, "events"],
    "BINDS": [{}, {"Bank": "bank", "Shop": None}],
    "CONSTRUCT": ["first-use", "init"],
    "SCHEMA": [None, "bank"],
    "ORIGINATOR_ID_TYPE": [None, "uuid", "text"],
    "LOCK_TIMEOUT": [1, 0.5, 0.001, 86_399],
    "POSTGRES_ORDER": ["advisory-lock", "table-lock"],
    "POSTGRES_NOTIFY": [True, False],
    "SQLITE_WAL": [True, False],
    "STALL_LIMIT": [1, 0.5, 86_399],
    "PROJECTION_LOCK": ["database", "lease"],
    "METADATA": [(), [], [dict], False],
    "METADATA_USER": [None, str],
    "CORRELATION_INDEX": [True, False],
    "PERSISTENCE": ["sqlalchemy", "cassandra"],
    "CASSANDRA_CONTACT_POINTS": [["127.0.0.1"], ["node1", "node2.example.com"], ["::1"]],
    "CASSANDRA_KEYSPACE": ["bank", "Bank_2", "x" * 48],
    "CASSANDRA_REPLICATION": [1, 3, {"datacenter1": 3}, {"east": 3, "west": 2}],
    "CASSANDRA_PORT": [9042, 1, 65_535],
    "CASSANDRA_LOCAL_DC": [None, "datacenter1"],
    "CASSANDRA_USERNAME": ["bank"],
    "CASSANDRA_PASSWORD": ["secret"],
    "CASSANDRA_SSL_CONTEXT": [None, ssl.create_default_context()],
    "CASSANDRA_CONSISTENCY": ["LOCAL_QUORUM", "QUORUM", "ALL"],
    "CASSANDRA_SERIAL_CONSISTENCY": ["LOCAL_SERIAL", "SERIAL"],
    "CASSANDRA_PATIENCE": [10, 0.5],
}
BESIDE: dict[str, Any] = {
    "EVENTSOURCING_PERSISTENCE": "cassandra",
    "EVENTSOURCING_CASSANDRA_CONTACT_POINTS": ["127.0.0.1"],
    "EVENTSOURCING_CASSANDRA_KEYSPACE": "bank",
    "EVENTSOURCING_CASSANDRA_REPLICATION": 3,
    "EVENTSOURCING_CASSANDRA_USERNAME": "bank",
    "EVENTSOURCING_CASSANDRA_PASSWORD": "secret",
}
"""What goes together with a setting of Cassandra."""
BAD: dict[str, list[Any]] = {
    "COMMIT": ["Explicit", "", None, True, ["save"]],
    "ENV": [None, "A=b", [("A", "b")], {"A": 1}, {1: "b"}],
    "BIND_KEY": ["", 0, True, b"events"],
    "BINDS": [None, "Bank", [("Bank", "bank")], {"Bank": ""}, {"Bank": 1}, {"": "bank"}, {1: "bank"}],
    "CONSTRUCT": ["Init", "", None, True],
    "SCHEMA": ["", 0, ["bank"], "ba\nnk", "bank\0", "\ud800"],
    "ORIGINATOR_ID_TYPE": ["UUID", "int", "", str],
    "LOCK_TIMEOUT": [0, 0.0004, -1, 86_400, "30", None, True, float("nan"), float("inf")],
    "POSTGRES_ORDER": ["lock", None, 1],
    "POSTGRES_NOTIFY": ["yes", 1, 0, None],
    "SQLITE_WAL": ["yes", 1, 0, None],
    "STALL_LIMIT": [0, -1, 86_400, "30", None, True, float("nan")],
    "PROJECTION_LOCK": ["advisory", None, True],
    "METADATA": [True, None, "module:function", [1], dict, {"a": "b"}],
    "METADATA_USER": ["basic", 1, True],
    "CORRELATION_INDEX": ["yes", 1, 0, None],
    "PERSISTENCE": ["Cassandra", "", None, True],
    "CASSANDRA_CONTACT_POINTS": [None, [], "127.0.0.1", [""], [1], ["127.0.0.1:9042"], {"127.0.0.1"}],
    "CASSANDRA_KEYSPACE": [None, "", "ba-nk", "bänk", "x" * 49, "system", "system_auth", 'bank"; DROP'],
    "CASSANDRA_REPLICATION": [None, 0, -1, True, "3", {}, {"": 3}, {"datacenter1": 0}, {"datacenter1": "3"}, {1: 3}],
    "CASSANDRA_PORT": [0, 65_536, "9042", None, True],
    "CASSANDRA_LOCAL_DC": ["", 1, "data\ncenter"],
    "CASSANDRA_USERNAME": ["", 1],
    "CASSANDRA_PASSWORD": ["", 1],
    "CASSANDRA_SSL_CONTEXT": [True, "cert.pem"],
    "CASSANDRA_CONSISTENCY": ["ONE", "local_quorum", None, 6],
    "CASSANDRA_SERIAL_CONSISTENCY": ["QUORUM", None, 8],
    "CASSANDRA_PATIENCE": [0, -1, "10", None, True],
}


def cases(values: dict[str, list[Any]]) -> list[tuple[str, Any]]:
    """Return each key with each value."""
    return [(PREFIX + name, value) for name, items in values.items() for value in items]


def test_every_key_is_tested() -> None:
    """No key of the configuration is without a test of its values."""
    known = {item.name.upper() for item in fields(Config)}
    assert known == set(GOOD)
    assert known == set(BAD)


@pytest.mark.parametrize(("key", "value"), cases(GOOD))
def test_good_value_is_taken(key: str, value: Any) -> None:
    """Each documented value of a key is accepted unchanged."""
    is_apart = "CASSANDRA" in key or value == "cassandra"
    config = Config.from_mapping({**(BESIDE if is_apart else {}), key: value})
    assert getattr(config, key.removeprefix(PREFIX).lower()) == value


@pytest.mark.parametrize(("key", "value"), cases(BAD))
def test_bad_value_is_refused(key: str, value: Any) -> None:
    """A bad value is refused by a message that names the key, and what is expected."""
    with pytest.raises(ConfigurationError, match=rf"^{key} must (be|map) ") as raised:
        Config.from_mapping({key: value})
    assert "found" in str(raised.value)


@pytest.mark.parametrize("key", ["BIND_KEY", "SCHEMA", "ORIGINATOR_ID_TYPE"])
def test_optional_key_says_that_none_is_admitted(key: str) -> None:
    """The message about a key that may be None says so."""
    with pytest.raises(ConfigurationError, match="or None"):
        Config.from_mapping({PREFIX + key: 0})


def test_refused_mapping_names_the_bad_item() -> None:
    """The message about EVENTSOURCING_ENV names the item that is wrong."""
    with pytest.raises(ConfigurationError, match=r"'IS_SNAPSHOTTING_ENABLED' is mapped to a value of type bool"):
        Config.from_mapping({"EVENTSOURCING_ENV": {"A": "b", "IS_SNAPSHOTTING_ENABLED": True}})


@pytest.mark.parametrize(
    ("key", "hint"),
    [
        ("EVENTSOURCING_COMIT", "did you mean EVENTSOURCING_COMMIT?"),
        ("EVENTSOURCING_BINDKEY", "did you mean EVENTSOURCING_BIND_KEY?"),
        ("EVENTSOURCING_SQLITE_WALL", "did you mean EVENTSOURCING_SQLITE_WAL?"),
    ],
)
def test_unknown_key_is_refused_with_a_suggestion(key: str, hint: str) -> None:
    """A misspelt key is refused, and the message has the right spelling."""
    with pytest.raises(ConfigurationError) as raised:
        Config.from_mapping({key: "save"})
    assert key in str(raised.value)
    assert hint in str(raised.value)


def test_key_that_resembles_none_is_answered_with_all() -> None:
    """Where there is nothing to suggest, the message lists every key."""
    with pytest.raises(ConfigurationError) as raised:
        Config.from_mapping({"EVENTSOURCING_COLOUR": 1})
    assert all(PREFIX + name in str(raised.value) for name in GOOD)


def test_defaults() -> None:
    """Without any key the documented defaults hold, and other extensions' keys are not looked at."""
    config = Config.from_mapping({"SQLALCHEMY_DATABASE_URI": "sqlite://", "EVENTS": 1})
    assert (config.commit, config.lock_timeout, config.postgres_order, config.sqlite_wal) == (
        "explicit",
        30.0,
        "advisory-lock",
        True,
    )
    assert (config.env, config.bind_key, config.schema, config.originator_id_type) == ({}, None, None, None)


def test_environment_is_copied() -> None:
    """A mapping that the app changes later does not change the configuration, nor the other way round."""
    given = {"A": "b"}
    config = Config.from_mapping({"EVENTSOURCING_ENV": given})
    given["A"] = "c"
    assert config.env == {"A": "b"}


SECRET = "c3VwZXIgc2VjcmV0"


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ENV", f"CIPHER_KEY={SECRET}"),
        ("ENV", {"CIPHER_KEY": SECRET.encode()}),
        ("ENV", {"CIPHER_KEY": SECRET, "A": 1}),
        ("ENV", {SECRET.encode(): "x"}),
        ("ENV", [SECRET]),
        ("BINDS", {"Bank": [SECRET]}),
        ("BINDS", SECRET),
        ("BIND_KEY", [SECRET]),
        ("SCHEMA", {SECRET: 1}),
        ("COMMIT", [SECRET]),
        ("LOCK_TIMEOUT", {SECRET}),
        ("CASSANDRA_PASSWORD", [SECRET]),
        ("CASSANDRA_USERNAME", [SECRET]),
        ("CASSANDRA_CONTACT_POINTS", f"cassandra:{SECRET}@127.0.0.1"),
    ],
)
def test_no_secret_in_a_message(key: str, value: Any) -> None:
    """A message about a wrong value names the key and the type, and has nothing of what can be secret."""
    with pytest.raises(ConfigurationError) as raised:
        Config.from_mapping({PREFIX + key: value})
    assert SECRET not in str(raised.value)
    assert PREFIX + key in str(raised.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (name.lower(), value)
        for name in ("LOCK_TIMEOUT", "POSTGRES_ORDER", "POSTGRES_NOTIFY", "SQLITE_WAL", "STALL_LIMIT")
        for value in BAD[name]
    ],
)
def test_options_of_a_plain_host_are_checked(name: str, value: Any) -> None:
    """What is refused as a setting is refused as an option of a host without Flask, by its name there."""
    with pytest.raises(ConfigurationError, match=rf"DialectOptions\({name}=…\) must be"):
        DialectOptions(**{name: value})


@pytest.mark.parametrize(
    "make",
    [
        lambda: Config.from_mapping({"EVENTSOURCING_POSTGRES_ORDER": "floor"}),
        lambda: DialectOptions(postgres_order="floor"),  # type: ignore[arg-type]  # its name before
        lambda: EventSourcing().init_app(make_app("sqlite://", EVENTSOURCING_POSTGRES_ORDER="floor")),
    ],
)
def test_warning_points_at_the_caller(make: Any) -> None:
    """The warning about a value that has another name now shows the line of the program that has it."""
    with pytest.warns(DeprecationWarning, match="'floor' is now called 'advisory-lock'") as warned:
        made = make()
    assert [Path(each.filename) for each in warned] == [Path(__file__)]
    assert made is None or made.postgres_order == "advisory-lock"
