"""The servers that tests stand on."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from tests import servers


@pytest.mark.parametrize("fixture", ["postgres_url", "mariadb_url"])
def test_database_server_answers(fixture: str, request: pytest.FixtureRequest) -> None:
    """A test that asks for a database gets one that answers, and that has no table yet."""
    engine = sa.create_engine(request.getfixturevalue(fixture), poolclass=sa.NullPool)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1
    assert sa.inspect(engine).get_table_names() == []


def test_postgres_answers_through_both_drivers(postgres_url: str) -> None:
    """The PostgreSQL of the tests can be reached with psycopg and with psycopg2."""
    for driver in ("postgresql+psycopg", "postgresql+psycopg2"):
        url = sa.make_url(postgres_url).set(drivername=driver)
        with sa.create_engine(url, poolclass=sa.NullPool).connect() as connection:
            assert connection.execute(sa.text("SELECT 1")).scalar_one() == 1


@pytest.mark.parametrize(
    ("server", "database"),
    [("postgres_server_url", servers.postgres_database), ("mariadb_server_url", servers.mariadb_database)],
)
def test_database_is_dropped_with_an_open_transaction(
    server: str, database: Callable[[str], AbstractContextManager[str]], request: pytest.FixtureRequest
) -> None:
    """A test that leaves a transaction open does not hold up the end of its database."""
    with database(request.getfixturevalue(server)) as url:
        engine = sa.create_engine(url)
        connection = engine.connect()
        connection.execute(sa.text("CREATE TABLE t (id INTEGER)"))
        connection.commit()
        connection.execute(sa.text("SELECT * FROM t"))
    connection.invalidate()
    connection.close()
    engine.dispose()
    with pytest.raises(sa.exc.OperationalError):
        sa.create_engine(url, poolclass=sa.NullPool).connect()


def test_redis_answers_and_is_empty(redis_url: str) -> None:
    """A test that asks for Redis gets an empty one that answers."""
    address = urlsplit(redis_url)
    assert address.port is not None
    assert servers.redis_command(address.port, "PING") == "+PONG"
    assert servers.redis_command(address.port, "DBSIZE") == ":0"


def test_missing_server_skips_and_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test whose server is missing is skipped with a line that says which and how to get it."""
    monkeypatch.setattr(servers, "REQUIRED", False)
    with pytest.raises(pytest.skip.Exception, match=r"^Oracle is missing: buy it$"):
        servers.require(False, "Oracle", "buy it")


def test_missing_server_fails_where_servers_are_required(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test whose server is missing fails where REQUIRE_SERVERS=1 is set."""
    monkeypatch.setattr(servers, "REQUIRED", True)
    with pytest.raises(pytest.fail.Exception, match=r"^Oracle is missing: buy it$"):
        servers.require(False, "Oracle", "buy it")
