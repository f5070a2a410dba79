"""Requests of a Pyramid application: its rules are those for rows, and no client is told what is not true."""

from __future__ import annotations

import logging
import time
from contextlib import nullcontext
from typing import Any

import pytest
import sqlalchemy as sa
import transaction
import zope.sqlalchemy
from eventsourcing.persistence import IntegrityError
from pyramid import testing
from pyramid.config import Configurator
from pyramid.httpexceptions import HTTPConflict, HTTPFound
from pyramid.request import Request
from pyramid.response import Response
from pyramid.scripting import prepare
from sqlalchemy import orm
from transaction import TransactionManager
from webtest import TestApp

from flask_eventsourcing.contrib.pyramid import event_models
from flask_eventsourcing.exceptions import ConfigurationError, RollbackOnlyError, UncommittedEventsError
from flask_eventsourcing.signals import events_discarded
from tests.domain import Bank, conflict_with, in_threads
from tests.hosts.test_units_of_work import recorded
from tests.pyramid_site.conftest import MakePyramidSite
from tests.pyramid_site.site import VETO, PyramidSite, UsersError, bank_of

DATABASES = pytest.mark.parametrize("url", ["sqlite-file", "postgresql", "mariadb"], indirect=True)


def save(request: Any) -> Any:
    """Save an event and a row."""
    bank_of(request).open_account()
    request.dbsession.add(request.registry["note"](text="note"))
    return {"done": True}


def with_note(site: PyramidSite) -> PyramidSite:
    """Tell the views the model of notes."""
    site.config.registry["note"] = site.Note
    return site


@DATABASES
def test_events_and_rows_commit_together(site: PyramidSite) -> None:
    """A view that returns commits its events and its rows, and the signal is sent after that."""
    with recorded() as heard:
        assert with_note(site).answer(save).json == {"done": True}
        assert [count for _, count in heard] == [1]
    assert site.stored() == (1, 1)


def test_error_aborts(site: PyramidSite) -> None:
    """What a view raises aborts the transaction."""

    def view(request: Any) -> Any:
        save(request)
        raise KeyError

    with_note(site)
    with recorded() as heard:
        with pytest.raises(KeyError):
            site.answer(view)
        assert heard == []
    assert site.stored() == (0, 0)


@pytest.mark.parametrize(("veto", "stored"), [(True, (0, 0)), (False, (1, 1))])
def test_returned_failure_is_the_commit_vetos(new_site: MakePyramidSite, veto: bool, stored: Any) -> None:
    """Whether a returned 4xx commits is what ``tm.commit_veto`` says, for events exactly as for rows."""
    site = with_note(new_site(**(VETO if veto else {})))

    def view(request: Any) -> Any:
        save(request)
        return HTTPConflict()

    assert site.answer(view).status_code == 409
    assert site.stored() == stored


def test_missing_veto_is_logged_once(new_site: MakePyramidSite, caplog: pytest.LogCaptureFixture) -> None:
    """The start says once that a returned failure commits, where nobody has set a veto."""
    new_site()
    assert [each.name for each in caplog.records].count("flask_eventsourcing.contrib.pyramid.site_state") == 1
    assert "tm.commit_veto" in caplog.text
    caplog.clear()
    new_site(**VETO)
    assert caplog.records == []


@pytest.mark.parametrize("way", ["doom", "abort", "X-Tm"])
def test_view_may_abort(site: PyramidSite, way: str) -> None:
    """A view that dooms or aborts its transaction, or says so in a header, answers as it likes."""

    def view(request: Any) -> Any:
        save(request)
        if way == "X-Tm":
            request.response.headers["X-Tm"] = "abort"
        else:
            getattr(request.tm, way)()
            if way == "abort":
                request.tm.begin()
        return {}

    assert with_note(site).answer(view).status_code == 200
    assert site.stored() == (0, 0)


def test_exception_view_does_not_tell_of_a_success(new_site: MakePyramidSite) -> None:
    """An exception view that answers 2xx for dropped events is overruled: the error goes by the exception views."""
    site = with_note(new_site(catching=200))

    def view(request: Any) -> Any:
        save(request)
        raise UsersError

    with pytest.raises(
        UncommittedEventsError, match=r"1 event of Bank .* rolled back because the view raised UsersError"
    ):
        site.answer(view)
    assert site.stored() == (0, 0)

    def fail(_: Any) -> Any:
        raise UsersError

    assert site.answer(fail).status_code == 200
    failing = with_note(new_site(catching=409))
    assert failing.answer(view).status_code == 409


@DATABASES
def test_exception_view_of_a_failed_commit_does_not_tell_of_a_success(new_site: MakePyramidSite) -> None:
    """If an exception view answers 2xx to an error of the commit itself, the client gets a 500 too."""

    def configure(config: Any) -> None:
        config.add_exception_view(lambda _: Response("caught"), context=sa.exc.IntegrityError)

    site = with_note(new_site(configure=configure, **VETO))

    def view(request: Any) -> Any:
        save(request)
        request.dbsession.add(site.Note(text=None))
        return {}

    with recorded() as heard:
        with pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* aborted for IntegrityError"):
            site.answer(view)
        assert heard == []
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("url", ["postgresql"], indirect=True)
def test_exception_view_of_a_constraint_that_is_deferred(new_site: MakePyramidSite) -> None:
    """The client also gets a 500 if the database rolls back while it commits."""

    def configure(config: Any) -> None:
        config.add_exception_view(lambda _: Response("caught"), context=sa.exc.IntegrityError)

    site = with_note(new_site(configure=configure, **VETO))
    with site.engine.begin() as connection:
        connection.exec_driver_sql("CREATE TABLE seat (number integer UNIQUE DEFERRABLE INITIALLY DEFERRED)")

    def view(request: Any) -> Any:
        save(request)
        request.dbsession.execute(sa.text("INSERT INTO seat VALUES (1), (1)"))
        return {}

    with pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* aborted for IntegrityError"):
        site.answer(view)
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("unit", [False, True])
def test_hook_that_fails_after_the_commit(site: PyramidSite, unit: bool) -> None:
    """A hook that tries to save after the commit fails by itself; the request is answered as the success it was."""

    def hook(_: bool, request: Any) -> None:
        with request.eventsourcing.transaction() if unit else nullcontext():
            save(request)

    def view(request: Any) -> Any:
        request.tm.get().addAfterCommitHook(hook, args=(request,))
        return save(request)

    assert with_note(site).answer(view).status_code == 200
    assert site.stored() == (1, 1)


def test_error_of_the_guard_goes_by_the_exception_views(new_site: MakePyramidSite) -> None:
    """A user's exception view answers for what the guard refuses."""

    def configure(config: Any) -> None:
        config.add_exception_view(lambda error, _: HTTPConflict(str(error)), context=UncommittedEventsError)

    site = with_note(new_site(catching=200, configure=configure))

    def view(request: Any) -> Any:
        save(request)
        raise UsersError

    answer = site.answer(view)
    assert answer.status_code == 409
    assert "UsersError" in answer.text


def test_exception_view_with_a_veto_is_as_for_rows(new_site: MakePyramidSite) -> None:
    """With a commit veto, pyramid_tm commits what an exception view has answered 2xx for, events as rows."""
    site = with_note(new_site(catching=200, **VETO))

    def view(request: Any) -> Any:
        save(request)
        raise UsersError

    assert site.answer(view).status_code == 200
    assert site.stored() == (1, 1)


def eating_tween_factory(handler: Any, registry: Any) -> Any:
    """Make a tween that answers a success to an error of the user's."""

    def tween(request: Any) -> Any:
        try:
            return handler(request)
        except UsersError:
            return Response("eaten")

    return tween


def test_tween_does_not_tell_of_a_success(new_site: MakePyramidSite) -> None:
    """A tween over that of ``pyramid_tm`` which answers 2xx to an error is overruled, if events were rolled back."""
    name = "tests.pyramid_site.test_requests.eating_tween_factory"
    manager = "pyramid_tm.tm_tween_factory"
    site = with_note(new_site(configure=lambda config: config.add_tween(name, over=manager), **VETO))

    def fail(request: Any) -> Any:
        raise UsersError

    def view(request: Any) -> Any:
        save(request)
        fail(request)

    with pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* the transaction was aborted for UsersError"):
        site.answer(view)
    assert site.answer(fail).text == "eaten"
    assert site.stored() == (0, 0)


def early_tween_factory(handler: Any, registry: Any) -> Any:
    """Make a tween that saves before the request has a transaction, and commits if the request says so."""

    def tween(request: Any) -> Any:
        with request.tm if "X-Commit" in request.headers else nullcontext():
            bank_of(request).open_account()
        return handler(request)

    return tween


def test_events_saved_before_the_transaction_of_the_request(new_site: MakePyramidSite) -> None:
    """What a tween over ``pyramid_tm`` saves and leaves uncommitted is refused, not dropped silently."""
    name = "tests.pyramid_site.test_requests.early_tween_factory"
    guard = "flask_eventsourcing.contrib.pyramid.guard_tween_factory"
    thread = {"tm.manager_hook": lambda request: transaction.manager}
    site = with_note(new_site(configure=lambda config: config.add_tween(name, over=guard), **VETO, **thread))
    discarded: list[Any] = []

    def hear(sender: object, notifications: Any, **_: Any) -> None:
        discarded.extend(notifications)

    refused = pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* before pyramid_tm began")
    with events_discarded.connected_to(hear), refused:
        site.answer(save)
    assert len(discarded) == 1
    assert site.stored() == (0, 0)
    assert site.answer(save, headers={"X-Commit": "yes"}).status_code == 200
    assert site.stored() == (2, 1)


def test_list_of_tweens_without_the_guard_is_told(new_site: MakePyramidSite, caplog: pytest.LogCaptureFixture) -> None:
    """Settings that list every tween and leave the guard out, or have it under ``pyramid_tm``, are warned of."""
    manager, guard = "pyramid_tm.tm_tween_factory", "flask_eventsourcing.contrib.pyramid.guard_tween_factory"
    new_site(**VETO, **{"pyramid.tweens": f"{guard} {manager} pyramid.tweens.excview_tween_factory"})
    assert caplog.messages == []
    for names in (manager, f"{manager} {guard}"):
        caplog.clear()
        new_site(**VETO, **{"pyramid.tweens": f"{names} pyramid.tweens.excview_tween_factory"})
        assert "pyramid.tweens does not list" in caplog.text


@pytest.mark.parametrize("way", ["add_response_callback", "add_finished_callback"])
def test_events_of_a_callback_are_told(new_site: MakePyramidSite, way: str, caplog: pytest.LogCaptureFixture) -> None:
    """What a callback saves after the commit, with the manager of the thread, is rolled back and told at once."""
    site = with_note(new_site(**VETO, **{"tm.manager_hook": lambda request: transaction.manager}))
    discarded: list[Any] = []

    def hear(sender: object, notifications: Any, **_: Any) -> None:
        discarded.extend(notifications)

    def view(request: Any) -> Any:
        getattr(request, way)(lambda *_: save(request))
        return {}

    with events_discarded.connected_to(hear):
        assert site.answer(view).status_code == 200
    assert len(discarded) == 1
    assert "1 event of Bank" in caplog.text
    assert transaction.manager.manager._txn is None
    assert site.stored() == (0, 0)


def test_events_of_a_body_are_told_and_cost_no_other_client(url: str, caplog: pytest.LogCaptureFixture) -> None:
    """What the body of an answer saves with the thread's session is reported; the thread's next request works."""
    base = orm.declarative_base()
    models = event_models(base, "Bank")
    engine = sa.create_engine(url)
    base.metadata.create_all(engine)
    sessions = orm.scoped_session(orm.sessionmaker(engine))
    zope.sqlalchemy.register(sessions)

    def view(request: Any) -> Any:
        bank_of(request).open_account()
        return Response(app_iter=body(request) if "in parts" in request.GET else [b"done"])

    def body(request: Any) -> Any:
        yield b"one"
        bank_of(request).open_account()
        yield b"two"

    with Configurator(settings=VETO) as config:
        config.include("pyramid_tm")
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Bank, models=models, session=sessions)
        config.add_route("bank", "/")
        config.add_view(view, route_name="bank")
    client = TestApp(config.make_wsgi_app())
    assert client.post("/?in parts").text == "onetwo"
    assert client.post("/").text == "done"
    assert ["neither committed nor rolled back" in each for each in caplog.messages] == [True]
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(models.StoredEvent)) == 2
    sessions.remove()
    config.registry["flask_eventsourcing"].close()
    engine.dispose()


@pytest.mark.parametrize("tweens", [True, False])
@pytest.mark.parametrize("saves", [True, False])
@DATABASES
def test_subrequest_that_drops_the_events_around_it(new_site: MakePyramidSite, tweens: bool, saves: bool) -> None:
    """A view fails if a subrequest with the same manager has rolled its events back, and succeeds otherwise."""

    def configure(config: Any) -> None:
        config.add_route("inner", "/inner")
        config.add_view(lambda request: save(request) if saves else {}, route_name="inner", renderer="json")

    def view(request: Any) -> Any:
        bank_of(request).open_account()
        request.invoke_subrequest(Request.blank("/inner", method="POST"), use_tweens=tweens)
        return {}

    site = with_note(new_site(configure=configure, **VETO, **{"tm.manager_hook": lambda request: transaction.manager}))
    if tweens:
        with pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* a subrequest began a transaction"):
            site.answer(view)
        assert site.stored() == ((1, 1) if saves else (0, 0))
    elif not saves or site.engine.dialect.name == "postgresql":
        # Elsewhere a second writer waits for the first one, which is the same thread.
        assert site.answer(view).status_code == 200
        assert site.stored() == ((2, 1) if saves else (1, 0))


@pytest.mark.parametrize("returned", [None, 5])
def test_function_that_returns_no_session_is_refused(new_site: MakePyramidSite, returned: Any) -> None:
    """A save in a request whose function returns no session is refused, rather than committed on its own."""
    site = with_note(new_site(session=lambda request: returned, **VETO))
    with pytest.raises(ConfigurationError, match=f"returns is {returned}, not a session"):
        site.answer(save)
    assert site.stored() == (0, 0)


def test_raised_redirect_is_as_for_rows(new_site: MakePyramidSite, caplog: pytest.LogCaptureFixture) -> None:
    """A redirect that is raised aborts without a veto, and the log says so."""
    site = with_note(new_site())

    def view(request: Any) -> Any:
        save(request)
        raise HTTPFound("/")

    assert site.answer(view).status_code == 302
    assert "return the redirect" in caplog.text
    assert site.stored() == (0, 0)


def test_events_without_a_manager_are_refused(new_site: MakePyramidSite, caplog: pytest.LogCaptureFixture) -> None:
    """A request that no manager is active for is answered 500 when it leaves events that nobody commits."""
    site = with_note(
        new_site(**{"tm.activate_hook": lambda request: False, "tm.manager_hook": lambda request: TransactionManager()})
    )
    with pytest.raises(UncommittedEventsError, match=r"1 event of Bank .* no active transaction manager"):
        site.answer(save)
    assert "The client is told 500" in caplog.text

    def fail(request: Any) -> Any:
        save(request)
        return HTTPConflict()

    assert site.answer(fail).status_code == 409

    def commit(request: Any) -> Any:
        with request.tm:
            save(request)
        return {}

    def unit(request: Any) -> Any:
        with request.eventsourcing.transaction():
            save(request)
        return {}

    assert site.answer(commit).status_code == 200
    assert site.answer(unit).status_code == 200
    assert site.stored() == (2, 2)


def test_decorators_keep_their_promise(site: PyramidSite) -> None:
    """A unit of work in a view joins the request's transaction; one that failed keeps the view from a success."""

    def view(request: Any) -> Any:
        request.eventsourcing.transactional(save)(request)
        assert site.stored() == (0, 0)
        return {}

    def caught(request: Any) -> Any:
        save(request)
        with pytest.raises(KeyError), request.eventsourcing.transaction():
            raise KeyError
        return {}

    assert with_note(site).answer(view).status_code == 200
    assert site.stored() == (1, 1)
    with pytest.raises(RollbackOnlyError):
        site.answer(caught)
    assert site.stored() == (1, 1)


@pytest.mark.parametrize("kind", ["unregistered", "another manager"])
def test_session_that_nobody_commits_is_refused(new_site: MakePyramidSite, kind: str) -> None:
    """A session that takes part in no transaction, or in another manager's, is refused at the first save."""
    sessions: list[Any] = []
    further = {} if kind == "unregistered" else {"session": lambda request: sessions[0]}
    site = with_note(new_site(registered=kind != "unregistered", **further, **VETO))
    sessions.append(site.session_of(testing.DummyRequest(tm=TransactionManager())))
    with pytest.raises(ConfigurationError, match=r"manager|no transaction"):
        site.answer(lambda request: bank_of(request).open_account())
    assert site.stored() == (0, 0)
    sessions[0].close()


def test_request_is_tried_again_after_a_conflict(site: PyramidSite) -> None:
    """pyramid_retry runs a request again that had a conflict, without further code, up to its limit."""
    account_id = site.opened()
    tries: list[int] = []

    def view(request: Any) -> Any:
        tries.append(1)
        again = conflict_with(bank_of(request), account_id)
        if len(tries) < limit:
            request.tm.abort()
            site.elsewhere(lambda bank: bank.deposit(account_id))
            request.tm.begin()
        again()
        return {"tries": len(tries)}

    limit = 3
    assert site.answer(view).json == {"tries": 3}
    limit = 9
    tries.clear()
    with pytest.raises(IntegrityError):
        site.answer(view)
    assert len(tries) == 3


@DATABASES
@pytest.mark.parametrize("settings", [{}, VETO], ids=["no veto", "veto"])
@pytest.mark.parametrize("status", [200, 409])
def test_answered_conflict_is_tried_again(new_site: MakePyramidSite, settings: dict[str, Any], status: int) -> None:
    """A conflict is tried again whatever an exception view has answered, and a try before the last stores nothing."""

    def configure(config: Any) -> None:
        config.add_exception_view(lambda _: Response("caught", status), context=IntegrityError)

    site = with_note(new_site(configure=configure, **settings))
    account_id = site.opened()
    tries: list[int] = []

    def view(request: Any) -> Any:
        tries.append(1)
        again = conflict_with(bank_of(request), account_id)
        if len(tries) < 3:
            request.tm.abort()
            site.elsewhere(lambda bank: bank.deposit(account_id))
            request.tm.begin()
        save(request)
        again()
        return {"tries": len(tries)}

    with recorded() as heard:
        assert site.answer(view).json == {"tries": 3}
        assert len(heard) == 3
    # Opened here and by the view, paid in twice elsewhere and once by the view.
    assert site.stored() == (5, 1)


def read_and_pay_in(request: Any) -> None:
    """Read a row, as an authentication policy does, and change the account, which takes its time."""
    request.dbsession.scalars(sa.select(request.registry["note"].text)).all()
    account = bank_of(request).account(request.registry["account_id"])
    time.sleep(request.registry["pause"])
    account.deposit(1)
    bank_of(request).save(account)


@pytest.mark.parametrize("url", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize(("pause", "rounds"), [(0.0, 20), (0.2, 2)], ids=["at once", "slowly"])
def test_eight_clients_on_one_account(site: PyramidSite, pause: float, rounds: int) -> None:
    """Within three attempts each, eight clients that change a new account all succeed, and no update is lost."""
    site.config.registry["pause"] = pause
    account_id = site.config.registry["account_id"] = site.opened()
    with_note(site).view = read_and_pay_in

    def pay_in() -> None:
        client = TestApp(site.app)
        for _ in range(rounds):
            assert client.post("/").status_code == 200

    in_threads([pay_in] * 8, patience=600)
    assert site.balance(account_id) == 8 * rounds


def test_functional_tests_decide_themselves(site: PyramidSite) -> None:
    """Where a functional test has begun the transaction, requests leave it to the test."""
    manager = TransactionManager(explicit=True)
    manager.begin()
    site.view = save
    client = TestApp(with_note(site).app, extra_environ={"tm.active": True, "tm.manager": manager})
    assert client.post("/").status_code == 200
    assert site.stored() == (0, 0)
    manager.abort()
    assert site.stored() == (0, 0)


def test_script_and_shell(site: PyramidSite) -> None:
    """In ``prepare()``, as in ``pshell`` and ``bootstrap``, the request's session and manager are those in use."""
    with_note(site)
    with prepare(Request.blank("/"), site.config.registry) as env:
        request = env["request"]
        with request.tm:
            save(request)
        with request.eventsourcing.transaction():
            save(request)
        with request.tm:
            assert len(bank_of(request).recorder.select_notifications(None, 10)) == 2
    assert site.stored() == (2, 2)


def test_test_config(site: PyramidSite) -> None:
    """A view can be called in ``testConfig`` with a dummy request that has the session."""
    manager = TransactionManager(explicit=True)
    request = testing.DummyRequest(tm=manager)
    with testing.testConfig(request=request) as config:
        config.registry["dbsession_factory"] = site.factory
        config.registry["note"] = site.Note
        config.include("flask_eventsourcing.contrib.pyramid")
        config.add_eventsourcing(Bank, models=site.models)
        request.dbsession = site.session_of(request)
        with manager:
            request.eventsourcing = config.registry["flask_eventsourcing"]
            save(request)
        config.registry["flask_eventsourcing"].close()
    assert site.stored() == (1, 1)


def test_log_of_a_worker_thread(site: PyramidSite, caplog: pytest.LogCaptureFixture) -> None:
    """Without a request, each save commits by itself, and units of work have sessions of the factory."""
    caplog.set_level(logging.WARNING)
    account_id = site.opened()
    with site.es.transaction() as session:
        site.es[Bank].deposit(account_id, 5)
        session.add(site.Note(text="note"))
    assert site.stored() == (2, 1)
    assert site.balance(account_id) == 5
    assert caplog.records == []
