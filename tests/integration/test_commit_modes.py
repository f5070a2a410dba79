"""The three values of EVENTSOURCING_COMMIT.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import logging
from typing import Any

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import Response, abort

from flask_eventsourcing import UncommittedEventsError, events_discarded, events_recorded
from tests.bank import Site
from tests.domain import Bank, conflict_with, in_thread
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files


class Heard:
    """Listens to both signals of a site."""

    def __init__(self) -> None:
        self.recorded: list[list[str]] = []
        self.discarded: list[list[str]] = []

    def hear_recorded(self, sender: object, application: Bank, notifications: Any) -> None:
        """Note what was recorded."""
        self.recorded.append([n.topic.rpartition(".")[2] for n in notifications])

    def hear_discarded(self, sender: object, application: Bank, notifications: Any) -> None:
        """Note what was discarded."""
        self.discarded.append([n.topic.rpartition(".")[2] for n in notifications])


def listen(site: Site) -> Heard:
    """Listen to a site; blinker lets go of it with the returned object."""
    heard = Heard()
    events_recorded.connect(heard.hear_recorded, site.app)
    events_discarded.connect(heard.hear_discarded, site.app)
    return heard


def forget(site: Site, status: int = 200) -> Any:
    """Return a view that saves an account and a note and does not commit."""

    def view() -> tuple[str, int]:
        site.note()
        site.bank.open_account("Ada")
        return "done", status

    return view


class TestExplicit:
    """``explicit``, the default: the view commits."""

    def test_forgetting_view_answers_500(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """A view that forgets to commit answers 500 and stores nothing; the log names the events."""
        heard = listen(site)
        answer = site.answer(forget(site))
        assert answer.status_code == 500
        assert b"done" not in answer.data
        assert site.stored() == (0, 0)
        lines = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
        assert any("1 event of Bank (Account.Created " in line and "version 1)" in line for line in lines)
        assert any("db.session.commit()" in line and "200 OK" in line for line in lines)
        assert heard.discarded == [["Created"]]
        assert heard.recorded == []

    def test_users_error_handler_sees_the_error(self, site: Site) -> None:
        """An error handler of the user gets the error and may answer in its own way."""
        seen: list[UncommittedEventsError] = []

        def handle(error: UncommittedEventsError) -> tuple[str, int]:
            seen.append(error)
            return "we are sorry", 500

        site.app.register_error_handler(UncommittedEventsError, handle)
        answer = site.answer(forget(site))
        assert (answer.status_code, answer.text) == (500, "we are sorry")
        assert "Account.Created" in str(seen[0])

    def test_error_reaches_a_test_that_wants_it(self, site: Site) -> None:
        """With ``TESTING`` the error is raised in the test, as every other one."""
        site.app.testing = True
        with pytest.raises(UncommittedEventsError, match="neither committed nor rolled back"):
            site.answer(forget(site))

    def test_client_that_was_told_of_a_failure_gets_its_answer(
        self, site: Site, caplog: pytest.LogCaptureFixture
    ) -> None:
        """A view that saves, forgets and answers with a failure keeps its answer; a warning names the events."""
        heard = listen(site)
        answer = site.answer(forget(site, 422))
        assert (answer.status_code, answer.text) == (422, "done")
        assert site.stored() == (0, 0)
        assert [r.levelname for r in caplog.records if "Account.Created" in r.getMessage()] == ["WARNING"]
        assert heard.discarded == [["Created"]]

    @pytest.mark.parametrize("end", ["commit", "rollback"])
    def test_view_that_ends_its_transaction_is_left_alone(
        self, site: Site, caplog: pytest.LogCaptureFixture, end: str
    ) -> None:
        """A view that commits, or rolls back, gets its answer through, and nothing is logged."""
        heard = listen(site)

        def view() -> str:
            site.bank.open_account()
            getattr(site.db.session, end)()
            return "done"

        answer = site.answer(view)
        assert (answer.status_code, answer.text) == (200, "done")
        assert heard.discarded == []
        assert caplog.records == []

    def test_users_after_request_may_still_commit(self, site: Site) -> None:
        """A commit in the user's own ``after_request`` function is in time."""

        @site.app.after_request
        def commit(response: Response) -> Response:
            site.db.session.commit()
            return response

        assert site.answer(forget(site)).status_code == 200
        assert site.stored() == (1, 1)

    def test_many_events_are_counted_not_listed(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """The log line stays short: it names five events and counts the others."""

        def view() -> str:
            for _ in range(8):
                site.bank.open_account()
            return "done"

        assert site.answer(view).status_code == 500
        line = next(r.getMessage() for r in caplog.records if "8 events of Bank" in r.getMessage())
        assert line.count("Account.Created") == 5
        assert "and 3 more" in line

    def test_end_of_a_bare_app_context(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """In a command or a task, forgotten events are logged at its end, and the signal is sent."""
        heard = listen(site)
        with site.app.app_context():
            site.bank.open_account()
        assert heard.discarded == [["Created"]]
        assert [r.levelname for r in caplog.records if "end of the application context" in r.getMessage()] == ["ERROR"]
        assert site.stored() == (0, 0)

    def test_app_context_that_ends_with_an_error(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """If an error ended the context, nothing more is logged, but the signal is sent."""
        heard = listen(site)

        def fail() -> None:
            with site.app.app_context():
                site.bank.open_account()
                raise KeyError

        with pytest.raises(KeyError):
            fail()
        assert heard.discarded == [["Created"]]
        assert caplog.records == []

    def test_view_that_only_reads_is_left_alone(self, site: Site) -> None:
        """A view without new events needs no commit."""
        account_id = site.opened()
        assert site.answer(lambda: str(site.bank.balance(account_id))).text == "0"


class TestRequest:
    """``request``: a successful request commits."""

    @pytest.fixture
    def site(self, new_site: MakeSite) -> Site:
        """A site in that mode."""
        return new_site(EVENTSOURCING_COMMIT="request")

    @pytest.mark.parametrize("status", [200, 201, 303, 399])
    def test_success_commits(self, site: Site, status: int) -> None:
        """Below 400, events and rows are stored without a commit in the view."""
        heard = listen(site)
        assert site.answer(forget(site, status)).status_code == status
        assert site.stored() == (1, 1)
        assert heard.recorded == [["Created"]]

    @pytest.mark.parametrize("status", [400, 404, 499, 500])
    def test_failure_rolls_back(self, site: Site, status: int) -> None:
        """From 400 up, events and rows are dropped, and the client gets the view's answer."""
        heard = listen(site)
        answer = site.answer(forget(site, status))
        assert (answer.status_code, answer.text) == (status, "done")
        assert site.stored() == (0, 0)
        assert heard.recorded == []

    def test_abort_rolls_back(self, site: Site) -> None:
        """A view that aborts stores nothing."""

        def view() -> Any:
            forget(site)()
            abort(404)

        assert site.answer(view).status_code == 404
        assert site.stored() == (0, 0)

    def test_error_rolls_back(self, site: Site) -> None:
        """A view that fails stores nothing, and the next request starts again."""

        def view() -> Any:
            forget(site)()
            raise KeyError

        assert site.answer(view).status_code == 500
        assert site.stored() == (0, 0)
        assert site.answer(forget(site)).status_code == 200
        assert site.stored() == (1, 1)

    def test_rows_alone_are_committed_too(self, site: Site) -> None:
        """A request that records no event is committed in the same way."""

        def view() -> str:
            site.note()
            return "done"

        assert site.answer(view).status_code == 200
        assert site.stored() == (0, 1)

    def test_commit_that_fails_is_an_error_for_the_users_handlers(self, site: Site) -> None:
        """If the commit fails, the user's error handler answers, and nothing is stored."""

        def handle(error: sa.exc.IntegrityError) -> tuple[str, int]:
            return "taken", 409

        site.app.register_error_handler(sa.exc.IntegrityError, handle)
        site.app.register_error_handler(500, lambda error: ("failed", 500))

        def view() -> str:
            site.bank.open_account()
            site.db.session.add(site.Note(text=None))
            return "done"

        answer = site.answer(view)
        assert (answer.status_code, answer.text) == (409, "taken")
        assert site.stored() == (0, 0)

    def test_commit_that_fails_is_a_500(self, site: Site) -> None:
        """Without an error handler a failed commit is a 500, never the view's own answer."""

        def view() -> str:
            site.bank.open_account()
            site.db.session.add(site.Note(text=None))
            return "done"

        answer = site.answer(view)
        assert answer.status_code == 500
        assert "done" not in answer.text
        assert site.stored() == (0, 0)

    @pytest.mark.parametrize("kind", [ValueError, 500])
    def test_error_handler_that_commits_stores_nothing_of_the_view(self, site: Site, kind: Any) -> None:
        """What a view has saved that raises is rolled back before an error handler runs, which may commit its own."""

        def handle(error: Exception) -> tuple[str, int]:
            site.note("failed")
            site.db.session.commit()
            return "sorry", 400

        site.app.register_error_handler(kind, handle)

        def view() -> str:
            site.note("view")
            site.bank.open_account()
            raise ValueError

        answer = site.answer(view)
        assert (answer.status_code, answer.text) == (400, "sorry")
        assert site.stored() == (0, 1)

    def test_error_handler_that_tells_of_no_failure(self, site: Site, caplog: pytest.LogCaptureFixture) -> None:
        """If an error handler answers below 400, its own events are stored; the view's are not, and the log says so."""

        def handle(error: ValueError) -> tuple[str, int]:
            site.note("failed")
            return "elsewhere", 303

        site.app.register_error_handler(ValueError, handle)

        def view() -> str:
            site.bank.open_account()
            raise ValueError

        assert site.answer(view).status_code == 303
        assert site.stored() == (0, 1)
        (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
        assert "Account.Created" in line
        assert "rolled back, as the view raised ValueError. The client was told of a success: 303" in line

    @pytest.mark.parametrize("status", [200, 303])
    def test_answer_that_is_raised_commits(self, site: Site, status: int) -> None:
        """A view that raises its answer, as ``abort(redirect(…))`` does, has not failed where that is below 400."""

        def view() -> Any:
            forget(site)()
            abort(Response("done", status))

        assert site.answer(view).status_code == status
        assert site.stored() == (1, 1)

    def test_error_after_the_view(self, site: Site) -> None:
        """If an ``after_request`` function raises, an error handler that commits stores nothing of the view either."""

        def handle(error: Exception) -> tuple[str, int]:
            site.db.session.commit()
            return "sorry", 500

        site.app.register_error_handler(500, handle)

        @site.app.after_request
        def fail(response: Response) -> Response:
            raise ValueError

        assert site.answer(forget(site)).status_code == 500
        assert site.stored() == (0, 0)

    def test_request_within_one_leaves_its_transaction(self, site: Site) -> None:
        """An error in a request within another one does not roll back what the outer view has saved before."""
        site.app.register_error_handler(ValueError, lambda error: ("sorry", 200))

        def inner() -> str:
            raise ValueError

        def view() -> str:
            forget(site)()
            return site.answer(inner).text

        assert site.answer(view).text == "sorry"
        assert site.stored() == (1, 1)

    def test_bare_app_context_does_not_commit(self, site: Site) -> None:
        """Without a request there is no commit either: events in a command are dropped, and the log names them."""
        heard = listen(site)
        with site.app.app_context():
            site.bank.open_account()
        assert site.stored() == (0, 0)
        assert heard.discarded == [["Created"]]


class TestSave:
    """``save``: as the bare library."""

    @pytest.fixture
    def site(self, new_site: MakeSite) -> Site:
        """A site in that mode."""
        return new_site(EVENTSOURCING_COMMIT="save")

    @on_files
    def test_durable_when_save_returns(self, site: Site) -> None:
        """Another connection sees the events as soon as ``save()`` has returned."""
        seen: list[tuple[int, int]] = []

        def view() -> str:
            site.bank.open_account()
            in_thread(lambda: seen.append(site.stored()))
            return "done"

        assert site.answer(view).status_code == 200
        assert seen == [(1, 0)]

    def test_rollback_after_save_changes_nothing(self, site: Site) -> None:
        """What ``save()`` has stored stays, whatever the view does then."""
        heard = listen(site)

        def view() -> Any:
            site.bank.open_account()
            site.db.session.rollback()
            abort(400)

        assert site.answer(view).status_code == 400
        assert site.stored() == (1, 0)
        assert heard.recorded == [["Created"]]
        assert heard.discarded == []

    def test_transaction_commits_once(self, site: Site) -> None:
        """Within ``transaction()`` the saves are committed together, at its end."""
        heard = listen(site)
        with site.app.app_context():
            with site.es.transaction():
                account_id = site.bank.open_account()
                site.bank.deposit(account_id)
                assert heard.recorded == []
            assert heard.recorded == [["Created", "Deposited"]]
        assert site.stored() == (2, 0)

    def test_transaction_rolls_back_whole(self, site: Site) -> None:
        """Within ``transaction()`` an error rolls every save back."""

        @site.es.transactional
        def work() -> None:
            site.bank.open_account()
            site.bank.open_account()
            raise KeyError

        with site.app.app_context(), pytest.raises(KeyError):
            work()
        assert site.stored() == (0, 0)

    def test_savepoint_is_not_committed_early(self, site: Site) -> None:
        """A save within a savepoint waits for the outer commit, so that the savepoint can be rolled back."""
        with site.app.app_context():
            savepoint = site.db.session.begin_nested()
            site.bank.open_account()
            savepoint.rollback()
            site.db.session.commit()
        assert site.stored() == (0, 0)

    def test_conflict_stores_nothing(self, site: Site) -> None:
        """A conflict raises at ``save()``, and the request can go on after a rollback."""
        account_id = site.opened()
        with site.app.app_context():
            save_late = conflict_with(site.bank, account_id)
            site.db.session.rollback()
            site.bank.deposit(account_id, 1)
            with pytest.raises(IntegrityError):
                save_late()
            site.db.session.rollback()
            site.bank.deposit(account_id, 1)
        assert site.balance(account_id) == 2
