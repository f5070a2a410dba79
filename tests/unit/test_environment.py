"""What the library reads from the environment of an application is checked when the app starts."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.cipher import AESCipher
from eventsourcing.dcb.application import DCBApplication
from eventsourcing.persistence import InfrastructureFactoryError
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError, EventSourcing
from flask_eventsourcing.applications import check_environment
from flask_eventsourcing.applications.library_env import KNOWN
from flask_eventsourcing.host import PlainHost
from flask_eventsourcing.models import make_models
from flask_eventsourcing.persistence.dialects import readable_address_errors, why_not
from tests.bank import make_app
from tests.domain import Bank

SECRET = "bm9ib2R5IGtub3dz"
KEY = AESCipher.create_key(16)
GOOD: list[dict[str, str]] = [
    {},
    {"CIPHER_KEY": KEY},
    {"CIPHER_TOPIC": "eventsourcing.cipher:AESCipher", "CIPHER_KEY": KEY},
    {"CIPHER_TOPIC": "eventsourcing.cryptography:AESCipher", "BANK_CIPHER_KEY": KEY},
    {"BANK_COMPRESSOR_TOPIC": "zlib", "IS_SNAPSHOTTING_ENABLED": "Yes", "AGGREGATE_CACHE_MAXSIZE": "-1"},
    {"MY_OWN_SETTING": "1", "OLD_CIPHER_KEY": SECRET, "ORIGINATOR_ID_TYPE": "uuid", "CREATE_TABLE": "n"},
]
BAD: list[tuple[dict[str, str], str]] = [
    ({"CIPHER_KEY": SECRET}, "CIPHER_KEY.*16, 24 or 32 bytes"),
    ({"CIPHER_KEY": "~" + SECRET}, "CIPHER_KEY"),
    ({"CIPHER_KEY": "é" + SECRET}, "CIPHER_KEY"),
    ({"CIPHER_TOPIC": "eventsourcing.cipher:AESCipher"}, "CIPHER_KEY is not set"),
    ({"CIPHER_KYE": SECRET}, "did you mean 'CIPHER_KEY'"),
    ({"BANK_CIPHER_KYE": SECRET}, "did you mean 'BANK_CIPHER_KEY'"),
    ({"BNAK_CIPHER_KEY": SECRET}, "did you mean 'BANK_CIPHER_KEY'"),
    ({"cipher_key": SECRET}, "write 'CIPHER_KEY'"),
    ({"COMPRESSOR_TOPIC": "no.such:Compressor"}, r"\['COMPRESSOR_TOPIC'\] of Bank names 'no.such:Compressor'"),
    ({"BANK_TRANSCODER_TOPIC": "json:Nothing"}, r"\['BANK_TRANSCODER_TOPIC'\]"),
    ({"IS_SNAPSHOTTING_ENABLED": "maybe"}, r"\['IS_SNAPSHOTTING_ENABLED'\] of Bank must be one of"),
    ({"AGGREGATE_CACHE_MAXSIZE": "many"}, "whole number"),
    ({"SQLALCHEMY_DATABASE_URI": SECRET}, "ignored"),
    ({"SALES_SQLALCHEMY_DATABASE_URI": SECRET}, "'SALES_SQLALCHEMY_DATABASE_URI', which would be ignored"),
    ({"BANK_SQLALCHEMY_SCHEMA": "x"}, "ignored"),
    ({"PERSISTENCE_MODULE": "eventsourcing.sqlite"}, "'PERSISTENCE_MODULE', which would be ignored"),
    ({"BANK_PERSISTENCE_MODULE": "eventsourcing.sqlite"}, "ignored"),
    ({"POSTGRES_PASSWORD": SECRET}, "library's own module"),
]


@pytest.mark.parametrize("env", GOOD)
def test_right_environment_is_taken(env: dict[str, str]) -> None:
    """Every variable that the library reads is accepted, and also those of a class of the user's own."""
    check_environment(env, [Bank])


@pytest.mark.parametrize(("env", "message"), BAD)
def test_wrong_environment_is_refused_at_the_start(env: dict[str, str], message: str) -> None:
    """A variable that is missing, misspelt, ignored or useless is named, without its value."""
    for refuse in (
        lambda: EventSourcing(application=Bank).init_app(make_app("sqlite://", EVENTSOURCING_ENV=env)),
        lambda: plain_host(env),
    ):
        with pytest.raises(ConfigurationError, match=message) as raised:
            refuse()
        assert SECRET not in str(raised.value)


def plain_host(env: Mapping[str, str]) -> PlainHost:
    """Make a host without Flask."""
    factory = orm.sessionmaker(sa.create_engine("sqlite://"))
    return PlainHost(factory, {Bank: make_models(orm.declarative_base(), "Bank")}, env=env)


@given(st.sampled_from(KNOWN), st.data())
def test_key_with_a_letter_missing_is_named(known: str, data: st.DataObject) -> None:
    """Each key that the library reads is proposed when one letter of it is missing."""
    number = data.draw(st.integers(0, len(known) - 1))
    with pytest.raises(ConfigurationError, match=f"did you mean '{known}'"):
        check_environment({known[:number] + known[number + 1 :]: "x"}, [Bank])


def test_class_that_stands_below_is_not_missed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A class may stand below the line that makes the app in its module: it is looked up later."""
    lines = [
        "from flask_eventsourcing.applications import check_environment",
        "from tests.domain import Bank",
        "check_environment({'TRANSCODER_TOPIC': 'module_with_late_class:Late'}, [Bank])",
        "class Late: pass",
    ]
    (tmp_path / "module_with_late_class.py").write_text("\n".join(lines))
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("module_with_late_class")
    monkeypatch.setitem(sys.modules, "module_with_late_class", module)
    assert module.Late


class Slices(DCBApplication):
    """An application with dynamic consistency boundaries."""


def make_slices(env: Any) -> Slices:
    """Make one."""
    return Slices(env)


@pytest.mark.parametrize("given_", [Slices, make_slices, DCBApplication])
def test_dcb_application_is_said_not_to_be_supported(given_: Any) -> None:
    """An application with dynamic consistency boundaries is refused as such."""
    with pytest.raises(ConfigurationError, match=r"DCB application.*not supported yet"):
        EventSourcing(application=given_)


def test_dcb_application_on_this_persistence() -> None:
    """As the library's ``PERSISTENCE_MODULE``, too, the package says that it does not support them."""
    with pytest.raises(InfrastructureFactoryError, match="not supported yet"):
        Slices({"PERSISTENCE_MODULE": "flask_eventsourcing.persistence"})


PASSWORD = "geheim42"
ADDRESSES = {
    f"postgresql+psycopg://ada:{PASSWORD}@host:port/bank": "is no address",
    f"postgresql+psycopg:/ada:{PASSWORD}": "is no address",
    f"{PASSWORD}": "is no address",
    f"postgresql+asyncpg://ada:{PASSWORD}@host/bank": r"driver is not installed .asyncpg.*postgresql\+psycopg://",
    f"nonsense://ada:{PASSWORD}@host/bank": "SQLAlchemy has no such database or driver",
    f"postgresql+nonsense://ada:{PASSWORD}@host/bank": "SQLAlchemy has no such database or driver",
    f"postgresql+psycopg_async://ada:{PASSWORD}@host/bank": r"'psycopg_async' is asynchronous: write postgresql",
}


@pytest.mark.parametrize("address", ADDRESSES)
def test_address_that_cannot_be_used_is_one_line(address: str) -> None:
    """A driver that is missing or asynchronous, and what is no address, are one line each, without the password."""

    class Alone(Application[Any]):
        """An application of the library's own way."""

    module = {"PERSISTENCE_MODULE": "flask_eventsourcing.persistence"}
    for error_class, use in (
        (ConfigurationError, lambda: EventSourcing(application=Bank).init_app(make_app(address))),
        (
            (ConfigurationError, InfrastructureFactoryError),
            lambda: Alone(env={**module, "SQLALCHEMY_DATABASE_URI": address}),
        ),
    ):
        with pytest.raises(error_class, match=ADDRESSES[address]) as raised:
            use()
        error: BaseException | None = raised.value
        assert "\n" not in str(error)
        while error is not None:
            assert PASSWORD not in str(error)
            error = error.__cause__


@pytest.mark.parametrize(
    "name",
    [
        "postgresql+asyncpg",
        "postgresql+psycopg_async",
        "postgresql+pg8000",
        "sqlite+aiosqlite",
        "sqlite+pysqlcipher",
        "mysql+asyncmy",
        "mysql+aiomysql",
        "mariadb+mariadbconnector",
    ],
)
def test_unsuitable_driver_is_answered_with_the_right_one(name: str) -> None:
    """For an asynchronous or untested driver, the message names those that can be used."""
    backend = name.partition("+")[0]
    right = {"postgresql": "psycopg", "sqlite": "pysqlite"}.get(backend, "pymysql")
    text = why_not(sa.make_url(f"{name}://"))
    assert text is not None
    assert f"{backend}+{right}" in text


@pytest.mark.parametrize("name", ["sqlite", "postgresql", "postgresql+psycopg", "mysql+pymysql", "mariadb+mysqldb"])
def test_suitable_driver_is_taken(name: str) -> None:
    """The drivers that the documentation names are taken, the default ones by no name."""
    assert why_not(sa.make_url(f"{name}://")) is None


def test_missing_driver_is_named() -> None:
    """A driver that is not installed is named with what to install."""
    with (
        pytest.raises(ConfigurationError, match=r"not installed .nothing_here.*Flask-EventSourcing\[postgres\]"),
        readable_address_errors("SQLALCHEMY_DATABASE_URI", ConfigurationError),
    ):
        __import__("nothing_here")
