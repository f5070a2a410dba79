"""What holds when a transaction is ended by other means than the session's own.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing import CommitInsideUnitError, RollbackOnlyError, events_discarded, events_recorded
from tests.bank import Site
from tests.integration.conftest import MakeSite
from tests.integration.test_truth import commit_connection, deposit, listen, versions
from tests.integration.unit_steps import STALE

on_mariadb = pytest.mark.parametrize("uri", ["mariadb"], indirect=True)


# SQLAlchemy's own warning of a session whose connection was committed or rolled back past it.
pytestmark = pytest.mark.filterwarnings("ignore:transaction already deassociated:sqlalchemy.exc.SAWarning")


def text(site: Site, statement: str) -> None:
    """Execute a textual statement on the session."""
    site.db.session.execute(sa.text(statement))


def roll_back_connection_savepoint(site: Site, save: Callable[[], Any]) -> None:
    """Save in a savepoint of the connection that is rolled back."""
    savepoint = site.db.session.connection().begin_nested()
    save()
    savepoint.rollback()


def roll_back_textual_savepoint(site: Site, save: Callable[[], Any]) -> None:
    """Save in a textual savepoint that is rolled back."""
    text(site, "SAVEPOINT a")
    save()
    text(site, "ROLLBACK TO SAVEPOINT a")


def roll_back_connection(site: Site, save: Callable[[], Any]) -> None:
    """Save, and roll the connection back."""
    save()
    site.db.session.connection().rollback()


def roll_back_by_text(site: Site, save: Callable[[], Any]) -> None:
    """Save, and roll back by a statement."""
    save()
    text(site, "ROLLBACK")


def roll_back_driver(site: Site, save: Callable[[], Any]) -> None:
    """Save, and roll back the connection of the driver."""
    save()
    driver: Any = site.db.session.connection().connection.driver_connection
    driver.rollback()


def roll_back_driver_and_read(site: Site, save: Callable[[], Any]) -> None:
    """The same, with a statement after it that begins another transaction."""
    roll_back_driver(site, save)
    text(site, "SELECT 1")


def go_on(site: Site) -> None:
    """Begin another transaction with a cursor of the driver, so that there is one again."""
    driver: Any = site.db.session.connection().connection.driver_connection
    cursor = driver.cursor()
    cursor.execute("UPDATE note SET id = id")
    cursor.close()


def roll_back_driver_and_go_on(site: Site, save: Callable[[], Any]) -> None:
    """The same, with a statement after it that begins another transaction, and that SQLAlchemy does not see."""
    roll_back_driver(site, save)
    go_on(site)


def by_cursor(site: Site, statement: str) -> None:
    """Execute a statement with a cursor of the driver's own."""
    cursor = site.db.session.connection().connection.cursor()
    cursor.execute(statement)
    cursor.close()


def roll_back_by_cursor_and_go_on(site: Site, save: Callable[[], Any]) -> None:
    """Save and roll back with a cursor of the driver, which then begins another transaction."""
    save()
    by_cursor(site, "ROLLBACK")
    go_on(site)


def roll_back_to_by_cursor(site: Site, save: Callable[[], Any]) -> None:
    """Save in a savepoint that a cursor of the driver makes and rolls back."""
    by_cursor(site, "SAVEPOINT a")
    save()
    by_cursor(site, "ROLLBACK TO SAVEPOINT a")


BEHIND = [
    roll_back_connection_savepoint,
    roll_back_textual_savepoint,
    roll_back_connection,
    roll_back_by_text,
    roll_back_driver,
    roll_back_driver_and_read,
    roll_back_driver_and_go_on,
    roll_back_by_cursor_and_go_on,
    roll_back_to_by_cursor,
]
ALSO_RIGHT_TODAY = [each for each in BEHIND if each is not roll_back_connection]
CLOSES: dict[str, Callable[[Site], Any]] = {
    "close": lambda site: site.db.session.close(),
    "reset": lambda site: site.db.session.reset(),
    "remove": lambda site: site.db.session.remove(),
    "with": lambda site: _enter_and_leave(site.db.session()),
}
closes = pytest.mark.parametrize("close", CLOSES.values(), ids=CLOSES)


def _enter_and_leave(session: orm.Session) -> None:
    with session:
        pass


def commit_by_text(site: Site) -> None:
    """Commit by a statement."""
    text(site, "COMMIT")


def commit_driver(site: Site) -> None:
    """Commit the connection of the driver."""
    driver: Any = site.db.session.connection().connection.driver_connection
    driver.commit()


def commit_driver_and_go_on(site: Site) -> None:
    """The same, with a statement after it that begins another transaction, and that SQLAlchemy does not see."""
    commit_driver(site)
    go_on(site)


class TestBehindTheSession:
    """Transactions that are ended by other means than the session's."""

    @pytest.mark.parametrize("loss", BEHIND)
    def test_object_is_refused(self, site: Site, loss: Callable[..., None]) -> None:
        """An object whose events were rolled back behind the session is refused, and its stream stays whole."""
        account_id = site.opened()
        with site.app.app_context():
            account = site.bank.account(account_id)
            loss(site, lambda: deposit(site, account, 1))
            with pytest.raises(STALE):
                deposit(site, account, 2)
            site.db.session.rollback()
        assert versions(site, account_id) == [1]

    @pytest.mark.parametrize("loss", ALSO_RIGHT_TODAY)
    def test_nothing_is_signalled(self, site: Site, loss: Callable[..., None]) -> None:
        """What was rolled back behind the session is never signalled as recorded."""
        account_id = site.opened()
        recorded = listen(site, events_recorded)
        with site.app.app_context():
            loss(site, lambda: site.bank.deposit(account_id, 1))
            site.db.session.commit()
        assert recorded == []
        assert site.balance(account_id) == 0

    @pytest.mark.parametrize("loss", BEHIND)
    def test_view_that_asked_for_it_is_left_alone(self, site: Site, loss: Callable[..., None]) -> None:
        """A view that rolls back, in any way, keeps its answer."""
        account_id = site.opened()

        def view() -> str:
            loss(site, lambda: site.bank.deposit(account_id, 1))
            return "rolled back"

        assert site.answer(view).status_code == 200
        assert site.balance(account_id) == 0

    @pytest.mark.parametrize("loss", ALSO_RIGHT_TODAY)
    def test_cache_serves_nothing_of_it(self, new_site: MakeSite, loss: Callable[..., None]) -> None:
        """With a cache, what was rolled back behind the session is not served after the commit of the rest."""
        site = new_site(EVENTSOURCING_ENV={"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": "n"})
        account_id = site.opened()
        with site.app.app_context():
            loss(site, lambda: site.bank.deposit(account_id, 1))
            site.db.session.commit()
        assert site.balance(account_id) == 0

    @pytest.mark.parametrize("commit", [commit_connection, commit_by_text, commit_driver, commit_driver_and_go_on])
    def test_commit_behind_the_session_is_one(self, site: Site, commit: Callable[[Site], None]) -> None:
        """Events that are committed behind the session are signalled, and the view keeps its answer."""
        account_id = site.opened()
        recorded = listen(site, events_recorded)

        def view() -> str:
            site.bank.deposit(account_id, 1)
            commit(site)
            return "done"

        assert site.answer(view).status_code == 200
        assert site.balance(account_id) == 1
        assert recorded == [2]

    @pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
    def test_commit_that_begins_another_transaction_is_one(self, site: Site) -> None:
        """What ``COMMIT AND CHAIN`` has stored is signalled, and no rollback afterwards is taken for one of it."""
        account_id = site.opened()
        recorded = listen(site, events_recorded)
        with site.app.app_context():
            account = site.bank.account(account_id)
            deposit(site, account, 1)
            text(site, "COMMIT AND CHAIN")
            site.db.session.rollback()
            assert recorded == [2]
            deposit(site, account, 2)
            site.db.session.commit()
        assert site.balance(account_id) == 3

    @pytest.mark.parametrize("uri", ["sqlite-file", "postgresql", "mariadb"], indirect=True)
    def test_commit_by_a_cursor_that_goes_on_is_one(self, site: Site) -> None:
        """Events that a driver's cursor has committed are not reported as discarded after a later rollback."""
        account_id = site.opened()
        recorded, discarded = listen(site, events_recorded), listen(site, events_discarded)
        with site.app.app_context():
            account = site.bank.account(account_id)
            deposit(site, account, 1)
            by_cursor(site, "COMMIT")
            go_on(site)
            deposit(site, account, 2)
            site.db.session.rollback()
            with pytest.raises(STALE):
                deposit(site, account, 4)
        assert recorded == [2]
        assert discarded == []
        assert site.balance(account_id) == 1

    @pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
    @pytest.mark.parametrize(
        "statement", ["SELECT 1; COMMIT", "/* ; */ SELECT ';' ; commit", "UPDATE note SET id = id; COMMIT; SELECT 1"]
    )
    def test_commit_among_other_statements_is_refused_in_a_unit(self, site: Site, statement: str) -> None:
        """Inside a unit a text of several statements is refused if one of them commits, and nothing is stored."""
        account_id = site.opened()

        @site.es.transactional
        def unit() -> None:
            site.bank.deposit(account_id, 1)
            site.db.session.connection().exec_driver_sql(statement)

        with site.app.app_context(), pytest.raises(CommitInsideUnitError):
            unit()
        assert site.balance(account_id) == 0

    @pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
    @pytest.mark.parametrize("statement", ["SELECT '; COMMIT'", "SELECT 1 -- ; COMMIT", "SELECT $a$ ; COMMIT $a$"])
    def test_text_that_speaks_of_a_commit_is_none(self, site: Site, statement: str) -> None:
        """A literal or a comment with the word COMMIT does not count as a commit."""
        account_id = site.opened()

        @site.es.transactional
        def unit() -> None:
            site.bank.deposit(account_id, 1)
            site.db.session.connection().exec_driver_sql(statement)

        with site.app.app_context():
            unit()
        assert site.balance(account_id) == 1

    @on_mariadb
    def test_procedure_that_rolls_back(self, site: Site) -> None:
        """Events that a stored procedure has rolled back, before it went on, are neither signalled nor committed."""
        account_id = site.opened()
        recorded = listen(site, events_recorded)

        @site.es.transactional
        def unit() -> None:
            site.bank.deposit(account_id, 1)
            text(site, "CALL afresh()")

        with site.app.app_context():
            text(site, "CREATE PROCEDURE afresh() BEGIN ROLLBACK; UPDATE note SET id = id; END")
            account = site.bank.account(account_id)
            deposit(site, account, 1)
            text(site, "CALL afresh()")
            with pytest.raises(STALE):
                deposit(site, account, 2)
            site.db.session.commit()
            with pytest.raises(RollbackOnlyError):
                unit()
        assert recorded == []
        assert site.balance(account_id) == 0

    @on_mariadb
    def test_implicit_commit_is_not_taken_for_a_loss(self, site: Site) -> None:
        """Events that MariaDB has committed implicitly are not reported as discarded after a later rollback."""
        account_id = site.opened()
        discarded = listen(site, events_discarded)
        with site.app.app_context():
            site.bank.deposit(account_id, 1)
            text(site, "CREATE TABLE implicit (a INTEGER)")
        assert site.balance(account_id) == 1
        assert discarded == []

    @closes
    @pytest.mark.parametrize("mode", ["explicit", "request"])
    def test_view_whose_session_is_closed_answers_500(
        self, new_site: MakeSite, close: Callable[[Site], Any], mode: str
    ) -> None:
        """A view whose session is closed before the commit is answered by 500, as its events are gone."""
        site = new_site(EVENTSOURCING_COMMIT=mode)
        account_id = site.opened()

        def view() -> str:
            site.bank.deposit(account_id, 1)
            close(site)
            return "done"

        assert site.answer(view).status_code == 500
        assert site.balance(account_id) == 0

    @closes
    def test_closed_session_is_told_outside_of_a_request(self, site: Site, close: Callable[[Site], Any]) -> None:
        """In a command or a task, ``events_discarded`` is sent for events that are lost with a closed session."""
        account_id = site.opened()
        discarded = listen(site, events_discarded)
        with site.app.app_context():
            site.bank.deposit(account_id, 1)
            close(site)
            site.db.session.commit()
        assert discarded == [2]
        assert site.balance(account_id) == 0

    @closes
    def test_closed_session_after_a_commit_is_fine(self, site: Site, close: Callable[[Site], Any]) -> None:
        """A session that is closed after the commit has lost nothing, and the view gets its answer through."""
        account_id = site.opened()

        def view() -> str:
            site.bank.deposit(account_id, 1)
            site.db.session.commit()
            close(site)
            return "done"

        assert site.answer(view).status_code == 200
        assert site.balance(account_id) == 1

    def test_replaced_session_is_followed(self, site: Site) -> None:
        """An app that puts a session of its own in the place of ``db.session`` gets its answers through."""
        account_id = site.opened()
        recorded = listen(site, events_recorded)
        db: Any = site.db
        db.session = orm.scoped_session(orm.sessionmaker(state_engine(site)))

        def view() -> str:
            site.bank.deposit(account_id, 1)
            site.db.session.commit()
            return "done"

        try:
            assert site.answer(view).status_code == 200
        finally:
            site.db.session.remove()
        assert recorded == [2]

    def test_block_of_the_session_in_the_mode_save(self, new_site: MakeSite) -> None:
        """In the mode ``save``, what is saved in ``with db.session.begin():`` is committed at its end, as a whole."""
        site = new_site(EVENTSOURCING_COMMIT="save")
        account_id = site.opened()
        with site.app.app_context():
            with site.db.session.begin():
                site.bank.deposit(account_id, 1)
                site.bank.deposit(account_id, 2)
                site.note()
            site.db.session.rollback()
        assert site.balance(account_id) == 3
        assert site.stored() == (3, 1)


def state_engine(site: Site) -> sa.Engine:
    """Return the engine of the app."""
    with site.app.app_context():
        return site.db.engine
