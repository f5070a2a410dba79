"""The configuration keys."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest

from flask_eventsourcing import ConfigurationError
from flask_eventsourcing.config import PREFIX, Config

GOOD: dict[str, list[Any]] = {
    "COMMIT": ["explicit", "request", "save"],
    "ENV": [{}, {"CIPHER_KEY": "x"}],
    "BIND_KEY": [None, "events"],
    "BINDS": [{}, {"Bank": "bank", "Shop": None}],
    "CONSTRUCT": ["first-use", "init"],
    "SCHEMA": [None, "bank"],
    "ORIGINATOR_ID_TYPE": [None, "uuid", "text"],
    "LOCK_TIMEOUT": [1, 0.5, 86_399],
    "POSTGRES_ORDER": ["advisory-lock", "table-lock"],
    "POSTGRES_NOTIFY": [True, False],
    "SQLITE_WAL": [True, False],
    "PROJECTION_LOCK": ["database", "lease"],
}
BAD: dict[str, list[Any]] = {
    "COMMIT": ["Explicit", "", None, True, ["save"]],
    "ENV": [None, "A=b", [("A", "b")], {"A": 1}, {1: "b"}],
    "BIND_KEY": ["", 0, True, b"events"],
    "BINDS": [None, "Bank", [("Bank", "bank")], {"Bank": ""}, {"Bank": 1}, {"": "bank"}, {1: "bank"}],
    "CONSTRUCT": ["Init", "", None, True],
    "SCHEMA": ["", 0, ["bank"]],
    "ORIGINATOR_ID_TYPE": ["UUID", "int", "", str],
    "LOCK_TIMEOUT": [0, -1, 86_400, "30", None, True, float("nan"), float("inf")],
    "POSTGRES_ORDER": ["lock", None, 1],
    "POSTGRES_NOTIFY": ["yes", 1, 0, None],
    "SQLITE_WAL": ["yes", 1, 0, None],
    "PROJECTION_LOCK": ["advisory", None, True],
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
    """Each documented value of a key is taken as it is."""
    config = Config.from_mapping({key: value})
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
    with pytest.raises(ConfigurationError, match=r"'IS_SNAPSHOTTING_ENABLED' is mapped to True"):
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
