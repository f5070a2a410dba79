"""Several applications in one Flask app, and several Flask apps in one process.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import sqlalchemy as sa
from flask_sqlalchemy import SQLAlchemy

from flask_eventsourcing import ConfigurationError, EventSourcing, events_recorded
from flask_eventsourcing.applications import CheckedRepository
from flask_eventsourcing.web.state import EventSourcingState
from tests.bank import Site, make_app
from tests.domain import Bank, Shop, in_threads
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_sqlite_memory


def test_each_application_has_its_own_tables(new_site: MakeSite) -> None:
    """Two applications of one app keep their events apart, in one transaction."""
    site = new_site(Bank, Shop)
    tables = {f"{name}_{purpose}" for name in ("bank", "shop") for purpose in ("events", "snapshots", "tracking")}
    assert set(site.db.metadata.tables) == tables | {"note"}
    with site.app.app_context():
        account_id = site.es[Bank].open_account("Ada")
        site.es[Shop].open_account("Bob")
        site.es[Shop].open_account("Cleo")
        site.db.session.commit()
        assert site.es[Bank].balance(account_id) == 0
        assert site.es[Shop].balance(account_id) is None
        counts = [
            site.db.session.scalar(sa.select(sa.func.count()).select_from(site.es.models[cls].StoredEvent))
            for cls in (Bank, Shop)
        ]
        assert counts == [1, 2]
        assert [site.es[cls].recorder.max_notification_id() for cls in (Bank, Shop)] == [1, 2]


def test_transaction_spans_applications(new_site: MakeSite) -> None:
    """Events of two applications are rolled back together."""
    site = new_site(Bank, Shop)

    @site.es.transactional
    def work() -> None:
        site.es[Bank].open_account()
        site.es[Shop].open_account()
        raise KeyError

    with site.app.app_context():
        with pytest.raises(KeyError):
            work()
        assert site.es[Bank].recorder.max_notification_id() is None
        assert site.es[Shop].recorder.max_notification_id() is None


def test_application_by_class(new_site: MakeSite) -> None:
    """``es[Bank]`` is the one instance of that class, and ``es.application`` that of the first."""
    site = new_site(Bank, Shop)
    with site.app.app_context():
        assert type(site.es[Bank]) is Bank
        assert type(site.es[Shop]) is Shop
        assert site.es[Shop] is site.es[Shop]
        assert site.es.application is site.es[Bank]
        state: EventSourcingState = site.app.extensions["eventsourcing"]
        assert dict(state.applications) == {Bank: site.es[Bank], Shop: site.es[Shop]}
        assert state.application is site.es[Bank]
        assert state.db is site.db is site.es.db
        assert (state.config.commit, set(state.models)) == ("explicit", {"Bank", "Shop"})


def test_unregistered_class_is_refused(site: Site) -> None:
    """Asking for a class that was not registered names the class, and those that were."""
    with site.app.app_context(), pytest.raises(ConfigurationError, match=r"Shop.*registered: Bank"):
        _ = site.es[Shop]


@pytest.mark.parametrize("name", ["Bank", "bank", "BANK"])
def test_same_name_is_refused(name: str) -> None:
    """Two classes with one name, also in another case, would share their tables, and are refused."""
    other = type("Other", (Bank,), {"name": name})
    with pytest.raises(ConfigurationError, match="Two application classes are called"):
        EventSourcing(applications=[Bank, other])


def test_register_is_a_decorator(tmp_path: Path) -> None:
    """``@es.register`` before ``init_app`` adds the class and returns it."""
    db = SQLAlchemy()
    es = EventSourcing(db=db)

    @es.register
    class Branch(Bank):
        pass

    app = make_app("sqlite://")
    db.init_app(app)
    es.init_app(app)
    with app.app_context():
        db.create_all()
        assert isinstance(es.application, Branch)
        assert es[Branch] is es.application
        es[Branch].open_account()
        db.session.commit()
    assert "branch_events" in db.metadata.tables
    with app.app_context():
        db.engine.dispose()


def test_register_after_init_app_is_refused(site: Site) -> None:
    """Registering after ``init_app`` comes too late for the tables, and is refused."""
    with pytest.raises(ConfigurationError, match=r"registered after es\.init_app\(app\)"):
        site.es.register(Shop)
    with site.app.app_context(), pytest.raises(ConfigurationError):
        _ = site.es[Shop]


def test_one_extension_serves_several_apps(tmp_path: Path) -> None:
    """One extension object serves Flask apps with different databases and settings, and keeps them apart."""
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)
    apps = []
    for number, mode in enumerate(("explicit", "save")):
        app = make_app(f"sqlite:///{tmp_path / str(number)}.db", EVENTSOURCING_COMMIT=mode)
        db.init_app(app)
        es.init_app(app)
        with app.app_context():
            db.create_all()
        apps.append(app)
    with apps[1].app_context():
        es.application.open_account("only here")
        second = es.application
    with apps[0].app_context():
        assert es.application is not second
        assert es.application.recorder.max_notification_id() is None
    with apps[1].app_context():
        assert es.application is second
        assert es.application.recorder.max_notification_id() == 1
    for app in apps:
        with app.app_context():
            db.engine.dispose()


def test_nested_app_contexts_keep_apart(new_site: MakeSite, tmp_path: Path) -> None:
    """Within one app's context, work in another app's context joins that app's transaction only."""
    site = new_site()
    other_uri = f"sqlite:///{tmp_path / 'other.db'}"
    app = make_app(other_uri)
    db = SQLAlchemy()
    es = EventSourcing(db=db, application=Bank)
    db.init_app(app)
    es.init_app(app)
    with site.app.app_context():
        account_id = site.bank.open_account()
        with app.app_context():
            db.create_all()
            es.application.open_account("other")
            db.session.commit()
            assert es.application.balance(account_id) is None
        site.db.session.rollback()
    with app.app_context():
        db.engine.dispose()
    assert site.stored() == (0, 0)


def test_application_of_another_app_does_not_join(new_site: MakeSite) -> None:
    """An application object that is used in another app's context commits on its own, and joins no foreign session."""
    site = new_site()
    with site.app.app_context():
        bank = site.bank
    foreign = make_app("sqlite://")
    with foreign.app_context():
        bank.open_account()
    assert site.stored() == (1, 0)


def test_environment_of_the_process_does_not_lead_astray(new_site: MakeSite, monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment variable for the library's persistence module does not change the application's database."""
    for name in ("PERSISTENCE_MODULE", "BANK_PERSISTENCE_MODULE"):
        monkeypatch.setenv(name, "eventsourcing.popo")
    site = new_site()
    site.opened()
    assert site.stored() == (1, 0)


def test_one_instance_for_racing_requests(new_site: MakeSite) -> None:
    """Eight threads with a first request at the same time construct one application, and all get it."""
    constructed: list[int] = []
    used: list[int] = []

    class Slow(Bank):
        name = "Bank"

        def __init__(self, env: dict[str, str] | None = None) -> None:
            constructed.append(1)
            super().__init__(env)

    site = new_site(Slow)
    assert constructed == []

    def view() -> str:
        used.append(id(site.bank))
        site.bank.open_account()
        site.db.session.commit()
        return "done"

    def client() -> None:
        assert site.answer(view).status_code == 200

    in_threads([client] * 8)
    assert len(constructed) == 1
    assert len(used) == 8
    assert len(set(used)) == 1
    assert site.stored() == (8, 0)


def test_close_is_idempotent_and_lets_construct_again(site: Site) -> None:
    """``es.close()`` may be called twice; the application is constructed again when it is used after it."""
    account_id = site.opened()
    with site.app.app_context():
        first = site.bank
        site.es.close()
        site.es.close(site.app)
        assert first.closing.is_set()
        assert site.bank is not first
        assert site.bank.balance(account_id) == 0


def test_outside_an_app_context_recorders_commit_on_their_own(site: Site) -> None:
    """In a thread without an app context ``save()`` is durable when it returns, reads need no context either."""
    with site.app.app_context():
        bank = site.bank
    heard: list[object] = []
    with events_recorded.connected_to(lambda sender, **_: heard.append(sender), site.app):
        account_id = bank.open_account()
    bank.deposit(account_id, 3)
    assert bank.balance(account_id) == 3
    assert [n.originator_version for n in bank.notification_log.select(start=1, limit=10)] == [1, 2]
    assert site.stored() == (2, 0)
    assert heard == []


@on_sqlite_memory
def test_repository_is_the_faster_one(site: Site) -> None:
    """Applications of a Flask app rebuild aggregates with the repository that checks each class of events once."""
    with site.app.app_context():
        assert type(site.bank.repository) is CheckedRepository
