"""What was connected, opened or subscribed before a fork is not used after it, nor closed, whichever way it forked.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from flask import Flask
from flask_sqlalchemy_lite import SQLAlchemy as Lite
from sqlalchemy.exc import StatementError

from flask_eventsourcing import EventSourcing, events_discarded, events_recorded
from tests.bank import Site, make_site
from tests.domain import Bank
from tests.servers import require_mysqlclient
from tests.unit.test_lifecycle_fork import fork_in_c, in_child

BACKEND = sa.text("SELECT pg_backend_pid()")
FORKS = pytest.mark.parametrize("fork", [os.fork, fork_in_c], ids=["python", "c"])


@pytest.fixture
def site(postgres_url: str) -> Iterator[Site]:
    """A site on PostgreSQL with a small pool."""
    made = make_site(postgres_url, SQLALCHEMY_ENGINE_OPTIONS={"pool_size": 1, "max_overflow": 0, "pool_timeout": 5})
    yield made
    made.close()


def backend(site: Site) -> int:
    """Return the server's process id of the session's connection."""
    found: int = site.db.session.scalar(BACKEND)
    return found


def deposit(site: Site, account_id: Any, amount: int = 1) -> None:
    """Pay in with a request."""

    def view() -> dict[str, int]:
        site.bank.deposit(account_id, amount)
        site.db.session.commit()
        return {"backend": backend(site)}

    answer = site.answer(view)
    assert answer.status_code == 200, answer.text


@FORKS
def test_connections_in_use_do_not_count_in_a_forked_process(site: Site, fork: Callable[[], int]) -> None:
    """A forked process has its whole pool, although a connection was in use when it was forked."""
    account_id = site.opened()
    with site.app.app_context():
        parents = backend(site)
        with site.app.app_context():
            engine = site.db.engine
        assert engine.pool.checkedout() == 1  # type: ignore[attr-defined]
        assert in_child(lambda: _backends(engine, 2), fork=fork)[0] != parents
        assert backend(site) == parents
    assert site.balance(account_id) == 0


def _backends(engine: sa.Engine, count: int) -> list[int]:
    found = []
    for _ in range(count):
        with engine.connect() as connection:
            found.append(connection.scalar(BACKEND))
    return found


@FORKS
def test_a_lock_of_the_pool_that_was_held_at_the_fork(site: Site, fork: Callable[[], int]) -> None:
    """A process forked while another thread was in the pool does not wait for that thread, which it does not have."""
    site.opened()
    with site.app.app_context():
        engine = site.db.engine
    held, go_on = threading.Event(), threading.Event()

    def hold() -> None:
        pool: Any = engine.pool
        with pool._pool.mutex, pool._overflow_lock:
            held.set()
            go_on.wait(20)

    thread = threading.Thread(target=hold)
    thread.start()
    try:
        assert held.wait(20)
        assert len(in_child(lambda: _backends(engine, 1), fork=fork)) == 1
    finally:
        go_on.set()
        thread.join(20)


@FORKS
@pytest.mark.parametrize("end", ["close", "dispose", "nothing"])
def test_a_forked_process_does_not_end_the_parents_sessions(site: Site, end: str, fork: Callable[[], int]) -> None:
    """A process that closes before it has used anything closes nothing of its parent's."""
    site.opened()
    with site.app.app_context():
        parents = backend(site)
        engine = site.db.engine

    def child() -> bool:
        if end == "close":
            site.es.close()
        elif end == "dispose":
            engine.dispose()
        return parents not in _backends(engine, 2)

    assert in_child(child, fork=fork) is True
    with site.app.app_context():
        assert backend(site) == parents


@FORKS
def test_engines_derived_and_disposed_are_separate_too(site: Site, fork: Callable[[], int]) -> None:
    """It holds for ``engine.execution_options(…)`` and after ``engine.dispose()``."""
    with site.app.app_context():
        engine = site.db.engine
    engine.dispose()
    derived = engine.execution_options(isolation_level="AUTOCOMMIT")
    (parents,) = _backends(derived, 1)
    childs = in_child(lambda: _backends(derived, 2) + _backends(engine, 1), fork=fork)
    assert parents not in childs
    assert len(set(childs)) == 1
    assert _backends(engine, 1) == [parents]


@FORKS
def test_a_context_pushed_before_the_fork(site: Site, fork: Callable[[], int]) -> None:
    """With an application context pushed by the module and its session in use, a forked process has a new session.

    Events that were saved and not committed are the parent's alone: the child neither stores nor reports them.
    """
    account_id = site.opened()
    sent: list[str] = []
    context = site.app.app_context()
    context.push()
    with (
        events_recorded.connected_to(lambda *_, **__: sent.append("recorded")),
        events_discarded.connected_to(lambda *_, **__: sent.append("discarded")),
    ):
        parents = backend(site)
        opened = site.bank.open_account()
        parents_session = site.db.session()
        site.note("of the parent")

        def child() -> Any:
            deposit(site, account_id)
            own = backend(site)
            seen = [site.bank.balance(account_id), site.bank.balance(opened)]
            is_own = site.db.session() is not parents_session
            site.db.session.rollback()
            context.pop()
            return [own != parents, seen, is_own, sent]

        assert in_child(child, fork=fork) == [True, [1, None], True, ["recorded"]]
        assert sent == []
        assert backend(site) == parents
        site.db.session.commit()
        assert sent == ["recorded"]
    context.pop()
    assert [site.balance(account_id), site.balance(opened)] == [1, 0]
    assert site.stored() == (3, 1)


@FORKS
def test_the_parents_transaction_goes_on(site: Site, fork: Callable[[], int]) -> None:
    """A forked process, at work or at its end, does not change its parent's open transaction."""
    with site.app.app_context():
        account_id = site.bank.open_account()
        site.note()

        def child() -> bool:
            site.db.session.remove()
            with site.app.app_context():
                return site.bank.balance(account_id) is None

        assert in_child(child, fork=fork) is True
        site.db.session.commit()
    assert site.stored() == (1, 1)


@FORKS
@pytest.mark.parametrize("kind", ["session", "connection"])
def test_what_the_user_holds_across_the_fork(site: Site, kind: str, fork: Callable[[], int]) -> None:
    """A session or connection that a variable holds over a fork raises a clear error, and can begin again."""
    with site.app.app_context():
        held: Any = site.db.session() if kind == "session" else site.db.engine.connect()
        parents = held.scalar(BACKEND)

        def child() -> Any:
            found: list[Any] = []

            def view() -> str:
                with pytest.raises(StatementError, match="forked"):
                    held.scalar(BACKEND)
                held.close()
                with site.app.app_context():
                    found.append(backend(site))
                return "done"

            answer = site.answer(view)
            return [answer.text, found[0] != parents]

        assert in_child(child, fork=fork) == ["done", True]
        assert held.scalar(BACKEND) == parents
        held.close()


def test_collecting_what_was_inherited(site: Site) -> None:
    """If a forked process drops a connection, its parent's transaction is not rolled back."""
    with site.app.app_context():
        held = [site.db.engine.connect()]
    held[0].execute(sa.text("CREATE TEMPORARY TABLE ours (a int)"))

    def child() -> int:
        held.clear()
        return gc.collect()

    in_child(child)
    assert held[0].scalar(sa.text("SELECT count(*) FROM ours")) == 0
    held[0].close()


@FORKS
def test_flask_sqlalchemy_lite(postgres_url: str, fork: Callable[[], int]) -> None:
    """The same holds for a pushed context with Flask-SQLAlchemy-Lite."""
    app = Flask("lite")
    app.config["SQLALCHEMY_ENGINES"] = {"default": postgres_url}
    db = Lite()
    es = EventSourcing(db=db, application=Bank)
    db.init_app(app)
    es.init_app(app)
    context = app.app_context()
    context.push()
    es.metadata.create_all(db.engine)
    account_id = es.application.open_account()
    db.session.commit()
    opened = es.application.open_account()
    parents = db.session.scalar(BACKEND)

    def child() -> Any:
        es.application.deposit(account_id)
        found = [db.session.scalar(BACKEND) != parents, es.application.balance(account_id)]
        found.append(es.application.balance(opened))
        db.session.commit()
        context.pop()
        return found

    assert in_child(child, fork=fork) == [True, 1, None]
    assert db.session.scalar(BACKEND) == parents
    db.session.commit()
    assert es.application.balance(opened) == 0
    context.pop()
    es.close(app)


@FORKS
@pytest.mark.parametrize("driver", ["psycopg", "psycopg2"])
def test_a_subscription_from_before_the_fork(postgres_url: str, driver: str, fork: Callable[[], int]) -> None:
    """A subscription goes on in a forked process on a connection of its own, and stopping it there stops it there."""
    site = make_site(postgres_url.replace("+psycopg", f"+{driver}"))
    site.opened()
    with site.app.app_context():
        recorder = site.bank.recorder
    subscription: Any = recorder.subscribe()
    with subscription:
        assert next(subscription).id == 1
        subscription._waiter.wait(0.1)
        assert listeners(site) == 1

        def child() -> list[int]:
            site.opened()
            seen = [next(subscription).id]
            subscription._waiter.wait(0.1)
            seen.append(listeners(site))
            subscription.stop()
            subscription.__exit__(None, None, None)
            return seen

        assert in_child(child, fork=fork) == [2, 2]
        assert listeners(site) == 1
        site.opened()
        assert [next(subscription).id for _ in range(2)] == [2, 3]
    site.close()


def listeners(site: Site) -> int:
    """Return how many connections of the server listen."""
    with site.app.app_context():
        found: int = site.db.session.scalar(
            sa.text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND query LIKE 'LISTEN%'")
        )
    return found


@FORKS
def test_a_copy_of_an_in_memory_database(fork: Callable[[], int]) -> None:
    """A forked process has its copy of an in-memory database, without what its parent had not committed."""
    site = make_site("sqlite://")
    account_id = site.opened()
    with site.app.app_context():
        site.bank.deposit(account_id, 100)

        def child() -> Any:
            with site.app.app_context():
                site.bank.deposit(account_id, 1)
                site.db.session.commit()
            return site.balance(account_id)

        assert in_child(child, fork=fork) == 1
        site.db.session.commit()
    assert site.balance(account_id) == 100
    site.close()


EXIT = """
import os, sys
import sqlalchemy as sa
from flask_eventsourcing.persistence.forks import drop_inherited_connections
from tests.bank import make_site
from tests.unit.test_lifecycle_fork import fork_in_c

class Closing:
    def __del__(self):
        if os.getpid() != parent:
            print("the child has finalized its parent's")

from flask_eventsourcing.lifecycle import ApplicationSlot
parent = os.getpid()
site = make_site(sys.argv[1])
slot = ApplicationSlot(Closing)
slot.get()
identify = sa.text(sys.argv[2])
site.app.app_context().push()
account_id = site.bank.open_account()
in_use = site.db.session.scalar(identify)
with site.db.engine.connect() as connection:
    idle = connection.scalar(identify)
# One that was connected before it was known.
early = sa.create_engine(sys.argv[1])
with early.connect() as connection:
    idle_early = connection.scalar(identify)
drop_inherited_connections(early)
child = os.fork() if sys.argv[4] == "python" else fork_in_c()
if child == 0:
    if sys.argv[3] == "use":
        with early.connect() as connection:
            assert connection.scalar(identify) != idle_early
        with site.app.app_context():
            site.bank.balance(account_id)
        slot.get()
        del parent
        parent = os.getpid()
    # The interpreter is finalized, and with it all that it has.
    sys.exit(0)
assert os.waitpid(child, 0)[1] == 0
with site.db.engine.connect() as connection:
    assert connection.scalar(identify) == idle
with early.connect() as connection:
    assert connection.scalar(identify) == idle_early
assert site.db.session.scalar(identify) == in_use
site.db.session.commit()
assert site.bank.balance(account_id) == 0
"""


@pytest.mark.parametrize(
    ("use", "fork"),
    [
        ("use", "python"),
        pytest.param("use", "c", marks=pytest.mark.long),
        pytest.param("nothing", "python", marks=pytest.mark.long),
        ("nothing", "c"),
    ],
)
@pytest.mark.parametrize(
    "driver",
    [
        "psycopg",
        pytest.param("psycopg2", marks=pytest.mark.long),
        pytest.param("pymysql", marks=pytest.mark.long),
        pytest.param("mysqldb", marks=pytest.mark.long),
    ],
)
def test_the_end_of_a_forked_process(driver: str, use: str, fork: str, request: pytest.FixtureRequest) -> None:
    """A forked process that ends leaves its parent's sessions on the server as they are, with each driver."""
    if driver.startswith("psycopg"):
        url = request.getfixturevalue("postgres_url").replace("+psycopg", f"+{driver}")
        identify = "SELECT pg_backend_pid()"
    else:
        if driver == "mysqldb":
            require_mysqlclient()
        url = request.getfixturevalue("mariadb_url").replace("+pymysql", f"+{driver}")
        identify = "SELECT connection_id()"
    done = subprocess.run(
        [sys.executable, "-c", EXIT, url, identify, use, fork],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        cwd=Path(__file__).parents[2],
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
