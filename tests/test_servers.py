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


LEFT = (
    "CREATE TABLE t (id SERIAL PRIMARY KEY)",
    'CREATE SCHEMA "another one" CREATE TABLE t (id INTEGER)',
    "CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'",
    "CREATE TYPE mood AS ENUM ('sad')",
    "CREATE TEMPORARY TABLE of_this_session (id INTEGER)",
    "SET search_path TO pg_catalog",
)
NOT_EMPTIED = ("ALTER DATABASE {name} SET work_mem = '5MB'", "REVOKE CONNECT ON DATABASE {name} FROM PUBLIC")


@pytest.mark.parametrize("left", [*LEFT, *NOT_EMPTIED])
def test_nothing_is_left_for_the_next_test(server_folder: servers.ServerFolder, left: str) -> None:
    """A test finds nothing in its database that another test has left, be it a connection or a setting."""
    databases = servers.PostgresDatabases(server_folder.shared("postgres", servers.start_postgres).url)
    with databases.lend() as url:
        name = sa.make_url(url).database
        engine = sa.create_engine(url)
        connection = engine.connect()
        connection.exec_driver_sql(left.format(name=name))
        connection.commit()
        connection.exec_driver_sql("SELECT 1")
    connection.invalidate()
    connection.close()
    engine.dispose()
    with databases.lend() as url:
        assert (sa.make_url(url).database == name) == (left in LEFT)
        engine = sa.create_engine(url, poolclass=sa.NullPool)
        with engine.connect() as connection:
            assert sa.inspect(connection).get_schema_names() == ["information_schema", "public"]
            assert sa.inspect(connection).get_table_names() == []
            others = "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
            assert connection.exec_driver_sql(f"SELECT count(*) {others}").scalar_one() == 0
            assert connection.exec_driver_sql("SHOW work_mem").scalar_one() == "4MB"
            connection.exec_driver_sql("CREATE TABLE t (id SERIAL PRIMARY KEY)")
            connection.exec_driver_sql("CREATE TYPE mood AS ENUM ('sad')")
            connection.exec_driver_sql("CREATE FUNCTION f() RETURNS int LANGUAGE sql AS 'SELECT 1'")
    servers.forget_killed_connections()


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
