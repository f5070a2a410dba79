"""What ``init_celery`` makes of tasks, seen in eager mode, where a task runs in the process that sends it."""

from __future__ import annotations

import gc
import importlib.util
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import Flask, current_app
from sqlalchemy.exc import IntegrityError as CommitError

from flask_eventsourcing.exceptions import ConfigurationError, NotInitializedError
from tests.bank import Site, make_site
from tests.servers import require

MakeCelery = Callable[..., Any]


@pytest.fixture
def site(tmp_path: Any) -> Iterator[Site]:
    """A site."""
    site = make_site(f"sqlite:///{tmp_path / 'bank.db'}")
    yield site
    site.close()


@pytest.fixture
def new_celery() -> Iterator[MakeCelery]:
    """Makes Celery apps in eager mode."""
    require(importlib.util.find_spec("celery"), "Celery", "pip install Flask-EventSourcing[celery]")
    from celery import Celery

    made: weakref.WeakSet[Any] = weakref.WeakSet()

    def make(**config: Any) -> Any:
        app = Celery("eager", set_as_current=False)
        app.conf.update(task_always_eager=True, **config)
        made.add(app)
        return app

    yield make
    for app in list(made):
        app.close()


@pytest.fixture
def celery_app(new_celery: MakeCelery, site: Site) -> Any:
    """A Celery app in eager mode, initialised with the site's app."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    init_celery(celery_app, site.app)
    return celery_app


def do_nothing() -> None:
    """Be the body of a task."""


def stale_deposit(site: Site, account_id: UUID) -> None:
    """Save a change of the account's first state."""
    account: Any = site.bank.repository.get(account_id, version=1)
    account.deposit(1000)
    site.bank.save(account)


def test_eager_task_is_a_unit_of_work(site: Site, celery_app: Any) -> None:
    """An eager task is committed when it returns, and rolled back when it raises."""

    @celery_app.task(shared=False)
    def deposit(account_id: str, fail: bool) -> None:
        site.bank.deposit(UUID(account_id))
        site.note()
        if fail:
            raise ValueError

    account_id = site.opened()
    assert deposit.delay(str(account_id), True).state == "FAILURE"
    assert site.stored() == (1, 0)
    assert deposit.delay(str(account_id), False).state == "SUCCESS"
    assert site.stored() == (2, 1)


def test_eager_tasks_have_the_metadata_of_what_sends_them(site: Site, celery_app: Any) -> None:
    """Events of an eager task, and of one that it sends, have the correlation and metadata that a worker would get."""

    @celery_app.task(shared=False, bind=True)
    def open_accounts(self: Any, more: int) -> None:
        site.bank.open_account()
        if more:
            site.db.session.commit()
            self.app.tasks[self.name].delay(more - 1)

    def recorded() -> list[dict[str, str]]:
        query = sa.select(site.es.StoredEvent).order_by(site.es.StoredEvent.notification_id)
        found = [dict(each.event_metadata or {}) for each in site.db.session.scalars(query)]
        site.db.session.rollback()
        return found

    with site.app.app_context():
        with site.es.event_metadata(reason="import 7"):
            site.bank.open_account()
            site.db.session.commit()
            open_accounts.delay(1)
        found = recorded()
        assert [each["reason"] for each in found] == ["import 7"] * 3
        assert len({each["correlation_id"] for each in found}) == 1
    open_accounts.apply_async((0,), task_id="of-the-task")
    with site.app.app_context():
        assert recorded()[-1] == {"correlation_id": "of-the-task"}


@pytest.mark.parametrize("propagates", [False, True])
def test_eager_task_is_tried_again_after_a_conflict(site: Site, new_celery: MakeCelery, propagates: bool) -> None:
    """A conflict in an eager task is retried, with ``task_eager_propagates`` too, as often as was said."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery(task_eager_propagates=propagates)
    init_celery(celery_app, site.app, conflict_retries=2)
    tries: list[int] = []

    @celery_app.task(shared=False)
    def deposit(account_id: str, conflicts: int) -> None:
        tries.append(1)
        if len(tries) <= conflicts:
            site.note(f"note {len(tries)}")
            stale_deposit(site, UUID(account_id))
        site.bank.deposit(UUID(account_id))

    account_id = site.opened()
    site.elsewhere(lambda: site.bank.deposit(account_id))
    deposit.delay(str(account_id), 2)
    assert len(tries) == 3
    assert site.stored() == (3, 0)
    tries.clear()
    if propagates:
        with pytest.raises(IntegrityError):
            deposit.delay(str(account_id), 3)
    else:
        assert isinstance(deposit.delay(str(account_id), 3).result, IntegrityError)
    assert len(tries) == 3
    assert site.stored() == (3, 0)


def test_task_says_how_often_it_is_tried_again(site: Site, celery_app: Any) -> None:
    """``@celery_app.task(conflict_retries=0)`` keeps a task from being run again."""
    tries: list[int] = []

    @celery_app.task(conflict_retries=0, shared=False)
    def deposit(account_id: str) -> None:
        tries.append(1)
        stale_deposit(site, UUID(account_id))

    account_id = site.opened()
    site.elsewhere(lambda: site.bank.deposit(account_id))
    assert isinstance(deposit.delay(str(account_id)).result, IntegrityError)
    assert len(tries) == 1


def test_called_task_is_a_function(site: Site, celery_app: Any) -> None:
    """A task that is called, ``deposit(…)``, does what it does in the caller's unit of work, and commits nothing."""

    @celery_app.task(shared=False)
    def deposit(account_id: UUID) -> None:
        site.bank.deposit(account_id)

    account_id = site.opened()
    with site.app.app_context():
        deposit(account_id)
        deposit.run(account_id)
        assert site.bank.account(account_id).balance == 2
        site.db.session.rollback()
    assert site.balance(account_id) == 0


def test_task_may_call_itself(site: Site, celery_app: Any) -> None:
    """A task that calls itself, or its own ``run``, stays in one unit of work."""

    @celery_app.task(bind=True, shared=False)
    def deposit(self: Any, account_id: str, more: int, fail: bool) -> None:
        site.bank.deposit(UUID(account_id))
        if more == 2:
            self(account_id, 1, False)
        elif more == 1:
            self.run(account_id, 0, False)
        if fail:
            raise ValueError

    account_id = site.opened()
    deposit.delay(str(account_id), 2, True)
    assert site.balance(account_id) == 0
    deposit.delay(str(account_id), 2, False)
    assert site.balance(account_id) == 3


def test_every_kind_of_task_is_covered(site: Site, new_celery: MakeCelery) -> None:
    """Tasks from before and after are covered, also those with a base, as classes, shared, or retried by Celery."""
    from celery import Task, shared_task

    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    done: list[Any] = []
    fails = [True]

    def body() -> None:
        assert current_app == site.app
        site.bank.open_account()
        done.append(site.bank)
        if fails:
            raise ValueError

    def bound_body(self: Any) -> None:
        body()

    class Base(Task):
        def __call__(self, *args: Any, **kwargs: Any) -> Any:
            return super().__call__(*args, **kwargs)

    class Classy(Task):
        name = "classy"

        def run(self) -> None:
            body()

    pending = celery_app.task(body, name="pending", shared=False)
    celery_app.finalize()
    init_celery(celery_app, site.app)
    tasks = [
        pending,
        celery_app.task(body, name="after", shared=False),
        celery_app.task(body, name="base", shared=False, base=Base),
        celery_app.task(bound_body, name="bound", shared=False, bind=True),
        celery_app.task(pending.run, name="reused", shared=False),
        celery_app.task(body, name="retried", shared=False, autoretry_for=(KeyError,)),
        celery_app.register_task(Classy()),
    ]
    shared_task(body, name="tests.shared")
    tasks.append(celery_app.tasks["tests.shared"])
    for task in tasks:
        assert task.apply().state == "FAILURE"
    fails.clear()
    for task in tasks:
        assert task.apply().state == "SUCCESS"
    assert len(done) == 2 * len(tasks)
    assert site.stored()[0] == len(tasks)


@pytest.mark.parametrize("registered", ["before", "after"])
def test_celerys_own_retry_sees_errors_of_the_commit(site: Site, new_celery: MakeCelery, registered: str) -> None:
    """``autoretry_for`` covers the commit, and each try begins after the rollback of the one before."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    if registered == "after":
        init_celery(celery_app, site.app)
    tries: list[tuple[int, int]] = []

    @celery_app.task(autoretry_for=(CommitError,), retry_kwargs={"countdown": 0}, shared=False)
    def open_account() -> None:
        tries.append(site.stored())
        site.bank.open_account()
        if len(tries) == 1:
            site.db.session.add(site.Note(text=None))

    if registered == "before":
        celery_app.finalize()
        init_celery(celery_app, site.app)
    assert open_account.delay().state == "SUCCESS"
    assert tries == [(0, 0), (0, 0)]
    assert site.stored() == (1, 0)


def test_eager_task_runs_in_the_current_app(site: Site, new_celery: MakeCelery) -> None:
    """With a factory, an eager task of a test uses the test's Flask app, and the factory is not called."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    init_celery(celery_app, lambda: pytest.fail("the factory was called"))

    @celery_app.task(shared=False)
    def open_account() -> None:
        site.bank.open_account()

    with site.app.app_context():
        assert open_account.delay().state == "SUCCESS"
    assert site.stored() == (1, 0)


def test_factory_is_called_once(site: Site, new_celery: MakeCelery) -> None:
    """Outside an application context, a factory is called by the first task, and once."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    calls: list[int] = []

    def create_app() -> Flask:
        calls.append(1)
        if len(calls) == 1:
            raise ConnectionError("not yet")
        return site.app

    init_celery(celery_app, create_app)

    @celery_app.task(shared=False)
    def open_account() -> None:
        site.bank.open_account()

    assert isinstance(open_account.delay().result, ConnectionError)
    assert [open_account.delay().state for _ in range(2)] == ["SUCCESS", "SUCCESS"]
    assert len(calls) == 2
    assert site.stored() == (2, 0)


def test_wrong_arguments_are_refused(site: Site, new_celery: MakeCelery) -> None:
    """An argument that ``init_celery`` cannot use is named at once, and the Celery app stays as it was."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    for arguments, words in (
        ((site.app, celery_app), "takes a Celery app first"),
        ((celery_app, "app"), "a Flask app or a function"),
        ((celery_app, site.es), "a Flask app or a function"),
    ):
        with pytest.raises(ConfigurationError, match=words):
            init_celery(*arguments)
    for retries in (-1, 1.5, True, "3"):
        with pytest.raises(ConfigurationError, match="conflict_retries"):
            init_celery(celery_app, site.app, conflict_retries=retries)  # type: ignore[arg-type]
    with pytest.raises(NotInitializedError, match="init_app"):
        init_celery(celery_app, Flask("bare"))
    init_celery(celery_app, site.app)
    with pytest.raises(ConfigurationError, match="already"):
        init_celery(celery_app, site.app)


def test_wrong_tasks_are_refused(celery_app: Any) -> None:
    """A task that has no ``run``, or a bad number of retries, is refused when it is registered."""
    from celery import Task

    class Called(Task):
        name = "called"

        def __call__(self) -> None:
            pass

    with pytest.raises(ConfigurationError, match=r"called has no run\(\)"):
        celery_app.register_task(Called())
    with pytest.raises(ConfigurationError, match="conflict_retries"):
        celery_app.task(do_nothing, name="bad", shared=False, conflict_retries="many", lazy=False)
    assert not {"called", "bad"} & set(celery_app.tasks)


@pytest.mark.parametrize("made", [None, 3])
def test_wrong_factory_is_told(new_celery: MakeCelery, made: Any) -> None:
    """A factory that returns no Flask app fails each task with a message that names it."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()

    def create_app() -> Any:
        return made

    init_celery(celery_app, create_app)
    result = celery_app.task(do_nothing, name="nothing", shared=False).delay().result
    assert isinstance(result, ConfigurationError)
    assert "create_app" in str(result)


def test_nothing_is_left_behind(site: Site, new_celery: MakeCelery) -> None:
    """A Celery app that is dropped leaves nothing behind, and many tasks leave no session or connection."""
    from flask_eventsourcing.workers.celery import init_celery

    celery_app = new_celery()
    init_celery(celery_app, site.app)

    @celery_app.task(shared=False)
    def open_account() -> None:
        site.bank.open_account()

    for _ in range(200):
        open_account.delay()
    with site.app.app_context():
        assert site.db.engine.pool.status().endswith("Current Checked out connections: 0")
        assert not site.db.session.registry.registry
    assert site.stored() == (200, 0)
    worker = weakref.ref(celery_app._tasks.worker)
    celery_app.close()
    del celery_app, open_account
    gc.collect()
    assert worker() is None
