"""A Flask app whose events are in Cassandra."""

from __future__ import annotations

import asyncio
import multiprocessing
from threading import Thread
from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.application import Application
from eventsourcing.persistence import IntegrityError
from flask import Flask, request

from flask_eventsourcing import ConfigurationError, current_application, events_recorded
from flask_eventsourcing.exceptions import InheritedDatabaseError, StaleAggregateError
from flask_eventsourcing.metadata import get_metadata_from_context
from tests.cassandra.hosts.conftest import MakeApp
from tests.cassandra.hosts.site import Account, Bank


def test_program(make_app: MakeApp) -> None:
    """A view's event is stored when save() returns: no db, no commit."""
    app, es = make_app()

    @app.post("/accounts")
    def open_account() -> tuple[dict[str, str], int]:
        return {"id": str(es.application.open_account(request.form["owner"]).id)}, 201

    answer = app.test_client().post("/accounts", data={"owner": "ada"})
    assert answer.status_code == 201
    with make_app()[0].app_context():
        assert current_application.repository.get(UUID(answer.json["id"])).owner == "ada"  # type: ignore[index]
    with app.app_context(), pytest.raises(ConfigurationError, match="There is no db: the events are in Cassandra"):
        _ = es.db
    with app.app_context(), pytest.raises(ConfigurationError, match="There are no record classes"):
        _ = es.StoredEvent


def test_metadata_that_a_view_leaves_end_with_its_request(make_app: MakeApp) -> None:
    """Metadata that a view sets without taking them back do not reach the next request."""
    app, es = make_app()

    @app.get("/<how>")
    def view(how: str) -> dict[str, str]:
        if how == "leak":
            es.event_metadata(leak="yes").__enter__()
        return get_metadata_from_context()

    client = app.test_client()
    assert [client.get(f"/{how}").json for how in ("leak", "other")] == [{"leak": "yes"}, {}]


def test_failed_view_keeps_what_it_saved(make_app: MakeApp) -> None:
    """What a view has saved before it failed stays stored, as nothing can be rolled back."""
    app, es = make_app()
    account_id = []

    @app.post("/")
    def fail() -> tuple[str, int]:
        account_id.append(es.application.open_account("ada").id)
        return "", 500

    assert app.test_client().post("/").status_code == 500
    with app.app_context():
        assert es.application.repository.get(account_id[0]).owner == "ada"


def test_signal_is_sent_for_what_is_stored(make_app: MakeApp) -> None:
    """``events_recorded`` is sent with the events of a save, and their positions."""
    app, es = make_app()
    told: list[Any] = []

    def receive(sender: Flask, application: Bank, notifications: tuple[Any, ...]) -> None:
        told.append((sender, application, [each.id for each in notifications]))

    with events_recorded.connected_to(receive, app), app.app_context():
        es.application.open_account("ada")
        assert told == [(app, es.application, [es.application.recorder.max_notification_id()])]


def test_stale_object_is_refused(make_app: MakeApp) -> None:
    """An object whose events had a conflict is not saved again, as it is not what is stored."""
    app, es = make_app()
    with app.app_context():
        account = es.application.open_account("ada")
        es.application.deposit(account.id, 1)
        account.deposit(2)
        with pytest.raises(IntegrityError):
            es.application.save(account)
        account.deposit(2)
        with pytest.raises(StaleAggregateError):
            es.application.save(account)


def test_cache_has_copies(make_app: MakeApp) -> None:
    """With a cache, others do not read the unsaved changes of an object."""
    app, es = make_app(ENV={"AGGREGATE_CACHE_MAXSIZE": "10"})
    with app.app_context():
        account = es.application.open_account("ada")
        account.deposit(5)
        assert es.application.repository.get(account.id).balance == 0


@pytest.mark.parametrize("is_async", [False, True])
def test_conflict_is_tried_again(is_async: bool, make_app: MakeApp) -> None:
    """A function is run again after a conflict when it has saved nothing in that try."""
    app, es = make_app()
    balances = []

    def deposit(account_id: UUID) -> None:
        account: Account = es.application.repository.get(account_id)
        balances.append(account.balance)
        if len(balances) < 3:
            es.application.deposit(account_id, 10)
            raise IntegrityError("another writer was first")
        account.deposit(1)
        es.application.save(account)

    def of_others(account_id: UUID) -> None:
        # What another context saves is none of this try's.
        account: Account = es.application.repository.get(account_id)
        if not balances:
            balances.append(1)
            threaded(es.application.deposit, account_id, 10)
        account.deposit(1)
        es.application.save(account)

    async def awaited(account_id: UUID) -> None:
        of_others(account_id)

    with app.app_context():
        account_id = es.application.open_account("ada").id
        if is_async:
            asyncio.run(es.retry_on_conflict(awaited)(account_id))
        else:
            es.retry_on_conflict(of_others)(account_id)
        assert es.application.repository.get(account_id).balance == 11
        balances.clear()
        with pytest.raises(IntegrityError, match="another writer was first"):
            es.retry_on_conflict(deposit)(account_id)
        assert balances == [11]


def threaded(function: Any, *args: Any) -> None:
    """Call a function in a thread, which has no part in a try."""
    thread = Thread(target=function, args=args)
    thread.start()
    thread.join()


def test_last_conflict_is_raised(make_app: MakeApp) -> None:
    """After the last try its conflict is raised."""
    app, es = make_app()
    tries = []

    @es.retry_on_conflict(times=2)
    def fail() -> None:
        tries.append(1)
        raise IntegrityError

    with app.app_context(), pytest.raises(IntegrityError):
        fail()
    assert len(tries) == 3


def test_inner_save_counts_for_the_outer_try(make_app: MakeApp) -> None:
    """A try is not run again if a function within it, which has tries of its own, has saved."""
    app, es = make_app()
    tries = []

    @es.retry_on_conflict
    def inner() -> None:
        es.application.open_account("ada")

    @es.retry_on_conflict
    def outer() -> None:
        tries.append(1)
        inner()
        raise IntegrityError

    with app.app_context(), pytest.raises(IntegrityError):
        outer()
    assert len(tries) == 1


def test_units_of_work_are_refused(make_app: MakeApp) -> None:
    """``transaction()``, ``using()`` and ``transactional`` say that nothing can be rolled back."""
    app, es = make_app()
    with app.app_context():
        with pytest.raises(ConfigurationError, match="A transaction cannot hold events that are in Cassandra"):
            es.transaction().__enter__()
        with pytest.raises(ConfigurationError, match="A session of your own cannot"):
            es.using(None)  # type: ignore[arg-type]
        with pytest.raises(ConfigurationError, match="transactional cannot"):
            es.transactional(lambda: None)()
        with pytest.raises(ConfigurationError, match="are not in a database of SQLAlchemy"):
            es.erase(uuid4())


def test_application_is_per_process(make_app: MakeApp) -> None:
    """A forked process has an application and a session of its own, and its parent's session is refused there."""
    app, es = make_app()
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()

    def child(parents: Bank) -> None:
        with app.app_context():
            try:
                parents.open_account("nobody")
            except InheritedDatabaseError as error:
                queue.put(str(error))
            queue.put(es.application.open_account("child").id)

    with app.app_context():
        parents = es.application
        parents.open_account("parent")
        process = context.Process(target=child, args=(parents,))
        process.start()
        process.join(60)
        assert process.exitcode == 0
        assert "was open when this process was forked" in queue.get()
        assert es.application.repository.get(queue.get()).owner == "child"


def test_application_constructed_before_the_connection(make_app: MakeApp) -> None:
    """An application that was constructed before any connection, and before the fork, connects where it is used."""
    app, es = make_app(CONSTRUCT="init")
    context = multiprocessing.get_context("fork")

    def child() -> None:
        with app.app_context():
            es.application.open_account("child")

    process = context.Process(target=child)
    process.start()
    process.join(60)
    assert process.exitcode == 0
    with app.app_context():
        assert es.application.open_account("parent").owner == "parent"


def test_closed_application_is_made_again(make_app: MakeApp) -> None:
    """After ``close()`` the next use makes application and session again."""
    app, es = make_app()
    with app.app_context():
        es.application.open_account("ada")
        es.close()
        es.close()
        assert es.application.open_account("bob").owner == "bob"


def test_application_registered_later(make_app: MakeApp) -> None:
    """An application class may be registered after ``init_app``, as with a database."""
    app, es = make_app(application=None)
    es.register(Bank)
    with app.app_context():
        assert es.application.open_account("ada").owner == "ada"


def test_env_of_the_state(make_app: MakeApp) -> None:
    """An application that is constructed by hand with the state's ``env`` has the same store."""
    app, es = make_app()
    with app.app_context():
        account = es.application.open_account("ada")
        by_hand = Bank(env=app.extensions["eventsourcing"].env)
        assert by_hand.repository.get(account.id).owner == "ada"
        by_hand.close()


class Plain(Application[UUID]):
    """An application without tables."""


def test_missing_tables_are_named(make_app: MakeApp) -> None:
    """Where the tables are missing, a save says so with the remedy, and so does ``check``."""
    app, es = make_app(application=Plain)
    with app.app_context(), pytest.raises(Exception, match="init-db"):
        es.application.save(Account("ada"))
    checked = app.test_cli_runner().invoke(args=["eventsourcing", "check"])
    assert checked.exit_code == 1
    assert "plain_log is missing: run the command 'init-db'" in checked.output


def test_commands_without_projections(make_app: MakeApp) -> None:
    """Every command about projections or SQL tables ends with one line and no traceback."""
    app, _ = make_app()
    runner = app.test_cli_runner()
    for line in (
        "status --json",
        "run --all",
        "rebuild Balances",
        "dead-letters list",
        "projections list",
        "projections forget Balances --yes",
        "reactions reset Balances --yes",
        f"erase {uuid4()} --yes",
        f"snapshots take {uuid4()}",
        "snapshots drop --all",
        "new-identity",
    ):
        done = runner.invoke(args=["eventsourcing", *line.split()])
        assert done.exception is None or isinstance(done.exception, SystemExit), (line, done.exc_info)
        assert done.output, line


def test_one_extension_serves_both_kinds(make_app: MakeApp, tmp_path: Any) -> None:
    """One extension object serves an app with a database and one with Cassandra."""
    app, es = make_app()
    other = Flask(__name__)
    other.config["SQLALCHEMY_DATABASE_URI"] = f"sqlite:///{tmp_path / 'bank.db'}"
    es.init_app(other)
    with other.app_context():
        es.db.create_all()
        es.application.open_account("bob")
        es.db.session.commit()
        assert es.application.recorder.max_notification_id() == 1
    with app.app_context():
        assert es.application.open_account("ada").owner == "ada"
    with other.app_context():
        for engine in es.db.engines.values():
            engine.dispose()
