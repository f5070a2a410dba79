"""What is left of an aggregate that was erased, and how projections and caches learn of it.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing.application import AggregateNotFoundError, Application
from eventsourcing.persistence import IntegrityError
from eventsourcing.utils import get_topic
from sqlalchemy import orm

from flask_eventsourcing import (
    AggregateErased,
    AggregateErasedError,
    EventRedacted,
    IdentifierTypeError,
    MissingRightError,
    NotInitializedError,
    StaleAggregateError,
    UncommittedEventsError,
)
from flask_eventsourcing.applications.erasure import erase
from tests.bank import Site, make_site
from tests.domain import Account, Bank, Branch, Member, Shop, in_threads
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files, on_postgresql, on_sqlite_file
from tests.source import ROOT


@pytest.fixture(params=[False, True], ids=["delete", "redact"])
def redact(request: pytest.FixtureRequest) -> bool:
    """Both ways to erase."""
    found: bool = request.param
    return found


def erased(site: Site, account_id: UUID, *, redact: bool = False) -> Any:
    """Erase an account, and commit."""
    with site.app.app_context():
        done = site.es.erase(account_id, redact=redact)
        site.db.session.commit()
    return done


def all_events(_: Any, events: Any) -> Any:
    """Make no aggregate of events, but a list."""
    return list(events)


def repeat(function: Callable[[], object]) -> None:
    """Call a function until it fails."""
    while True:
        function()


def log(site: Site) -> list[tuple[int, int, str]]:
    """Return positions, versions and topics of the log, as a reader sees them."""
    with site.app.app_context():
        found = site.bank.recorder.select_notifications(1, 100)
        for each in found:
            site.bank.mapper.to_domain_event(each)
        return [(each.id, each.originator_version, each.topic) for each in found]


def snapshots(site: Site) -> int:
    """Count the snapshots."""
    with site.app.app_context():
        return site.db.session.scalar(sa.select(sa.func.count()).select_from(site.es.Snapshot)) or 0


def test_deleted_events_leave_a_tombstone(new_site: MakeSite) -> None:
    """Events and snapshots are gone, the log can be read, and its last event tells who was erased; others stay."""
    site = new_site(Branch)
    kept, account_id = site.opened(1), site.opened(1, 2, 3)
    assert snapshots(site) == 3
    done = erased(site, account_id)
    assert (done.events, done.snapshots, done.dead_letters) == (4, 2, 0)
    found = log(site)
    assert [version for _, version, _ in found] == [1, 2, 5]
    assert found[-1] == (done.position, 5, get_topic(AggregateErased))
    assert snapshots(site) == 1
    assert site.balance(kept) == 1
    assert site.stored()[0] == 3


def test_redacted_events_keep_their_positions(new_site: MakeSite) -> None:
    """Redacted events keep positions and versions, and their content is nowhere in the database."""
    site = new_site(Branch)
    account_id = site.opened(1, 2, 3)
    with site.app.app_context():
        record: Any = site.es.StoredEvent
        values = {record.event_metadata: {"user": "ada"}, record.correlation_id: "ada"}
        site.db.session.execute(sa.update(record).values(values))
        site.db.session.commit()
    done = erased(site, account_id, redact=True)
    assert (done.events, done.snapshots) == (4, 2)
    redacted = get_topic(EventRedacted)
    assert log(site)[:-1] == [(position, position, redacted) for position in (1, 2, 3, 4)]
    assert snapshots(site) == 0
    with site.app.app_context():
        rows = site.db.session.scalars(sa.select(record).order_by(record.notification_id)).all()
        assert [(row.event_metadata, row.correlation_id) for row in rows[:-1]] == [(None, None)] * 4
        assert {row.state for row in rows[:-1]} == {b"{}"}


def test_an_erased_aggregate_cannot_be_read(site: Site, redact: bool) -> None:
    """Reading an erased aggregate, at any version, raises one clear ``AggregateNotFoundError``."""
    account_id = site.opened(1)
    erased(site, account_id, redact=redact)
    with site.app.app_context():
        with pytest.raises(AggregateErasedError, match=f"{account_id} was erased"):
            site.bank.account(account_id)
        with pytest.raises(AggregateNotFoundError):
            site.bank.repository.get(account_id, version=1)
        assert account_id not in site.bank.repository
        # A projector function of one's own has never heard of these events.
        with pytest.raises(AggregateErasedError):
            site.bank.repository.get(account_id, projector_func=all_events)


def test_an_erased_aggregate_stays_erased(site: Site, redact: bool) -> None:
    """An object from before is refused when it is saved, then and later, and a new aggregate does not get its id."""
    account_id = site.opened(1)
    with site.app.app_context():
        stale = site.bank.account(account_id)
        site.db.session.commit()
        erased(site, account_id, redact=redact)
        stale.deposit(1)
        with pytest.raises(IntegrityError):
            site.bank.save(stale)
        site.db.session.rollback()
        stale.deposit(1)
        with pytest.raises(StaleAggregateError):
            site.bank.save(stale)
        site.db.session.rollback()
        again: Any = Account._create(Account.Created, id=account_id, owner="Eve")
        with pytest.raises(IntegrityError):
            site.bank.save(again)
        site.db.session.rollback()
    assert site.balance(account_id) is None


def test_erasure_is_part_of_the_transaction(site: Site, redact: bool) -> None:
    """Nothing is gone before the commit, and a rollback, of a savepoint too, brings all of it back."""
    account_id = site.opened(1)
    before = log(site)
    with site.app.app_context():
        site.note("kept")
        savepoint = site.db.session.begin_nested()
        site.es.erase(account_id, redact=redact)
        assert account_id not in site.bank.repository
        savepoint.rollback()
        assert site.bank.balance(account_id) == 1
        site.db.session.commit()
        site.es.erase(account_id, redact=redact)
        site.db.session.rollback()
        assert site.bank.balance(account_id) == 1
    assert log(site) == before
    assert site.stored() == (2, 1)


def test_erasure_in_the_mode_save(new_site: MakeSite) -> None:
    """If each save is committed, so is an erasure, as a whole; within a unit of work the unit commits it."""
    site = new_site(EVENTSOURCING_COMMIT="save")
    one, other = site.opened(1), site.opened(1)
    with site.app.app_context():
        site.es.erase(one)
        site.db.session.rollback()
    assert site.balance(one) is None
    with site.app.app_context(), suppress(ZeroDivisionError), site.es.transaction():
        site.es.erase(other)
        raise ZeroDivisionError
    assert site.balance(other) == 1


def test_erasing_again(site: Site) -> None:
    """A second erasure deletes what is left, such as redacted events, and adds no second tombstone."""
    account_id = site.opened(1)
    assert erased(site, account_id, redact=True).events == 2
    assert erased(site, account_id, redact=True).events == 0
    again = erased(site, account_id)
    assert (again.events, again.position) == (2, None)
    assert [version for _, version, _ in log(site)] == [3]


def test_what_cannot_be_erased(site: Site) -> None:
    """An unknown id, one of another type, and an aggregate with uncommitted events are refused, and nothing is done."""
    with site.app.app_context():
        with pytest.raises(AggregateNotFoundError, match="Bank has no aggregate"):
            site.es.erase(uuid4())
        with pytest.raises(IdentifierTypeError):
            site.es.erase("ada")
        account_id = site.bank.open_account()
        with pytest.raises(UncommittedEventsError, match="commit before you erase"):
            site.es.erase(account_id)
        bank = site.bank
        site.db.session.commit()
    with pytest.raises(NotInitializedError):
        erase(bank, account_id)
    assert site.balance(account_id) == 0


@on_files
def test_a_writer_meanwhile(site: Site, redact: bool) -> None:
    """A save during the erasure is erased or refused: no event of the aggregate is left."""
    account_id = site.opened(1)
    with site.app.app_context():
        assert site.bank.balance(account_id) == 1
        site.elsewhere(lambda: site.bank.deposit(account_id, 5))
        try:
            site.es.erase(account_id, redact=redact)
            site.db.session.commit()
        except IntegrityError:
            # Its transaction had read before.
            site.db.session.rollback()
            site.es.erase(account_id, redact=redact)
            site.db.session.commit()
    assert {topic for _, _, topic in log(site)} <= {get_topic(AggregateErased), get_topic(EventRedacted)}


@on_files
def test_many_writers_meanwhile(site: Site) -> None:
    """If many threads save events during the erasure, only the tombstone is left, and each gets an error."""
    account_id, other = site.opened(1), site.opened(1)
    begun = threading.Barrier(4, timeout=30)

    def deposit() -> None:
        with site.app.app_context():
            change = site.es.retry_on_conflict(times=50)(lambda: site.bank.deposit(account_id, 1))
            change()
            begun.wait()
            with pytest.raises(AggregateErasedError):
                repeat(change)

    def erase_it() -> None:
        with site.app.app_context():
            begun.wait()
            site.es.retry_on_conflict(times=50)(lambda: site.es.erase(account_id).position)()

    in_threads([deposit, deposit, deposit, erase_it])
    found = log(site)
    assert [topic for *_, topic in found[2:]] == [get_topic(AggregateErased)]
    assert site.balance(other) == 1


@pytest.mark.parametrize("fastforward", ["y", "n"])
def test_the_cache_of_this_process(new_site: MakeSite, fastforward: str) -> None:
    """A cache serves an aggregate until its erasure is committed, and after a rollback of that."""
    env = {"AGGREGATE_CACHE_MAXSIZE": "10", "AGGREGATE_CACHE_FASTFORWARD": fastforward}
    site = new_site(EVENTSOURCING_ENV=env)
    account_id = site.opened(1)
    assert site.balance(account_id) == 1
    with site.app.app_context():
        site.es.erase(account_id)
        assert site.bank.balance(account_id) is None
        site.db.session.rollback()
        assert site.bank.balance(account_id) == 1
    erased(site, account_id)
    assert site.balance(account_id) is None
    with site.app.app_context():
        cache: Any = site.bank.repository.cache
        with pytest.raises(KeyError):
            cache.get(account_id)


@on_files
def test_the_cache_of_another_process(new_site: MakeSite, uri: str) -> None:
    """A cache that is fast-forwarded sees another process's tombstone, and drops the aggregate."""
    site = new_site(EVENTSOURCING_ENV={"AGGREGATE_CACHE_MAXSIZE": "10"})
    account_id = site.opened(1)
    assert site.balance(account_id) == 1
    other = make_site(uri, create=False)
    erased(other, account_id)
    other.close()
    with site.app.app_context():
        cache: Any = site.bank.repository.cache
        assert cache.get(account_id).balance == 1
        with pytest.raises(AggregateErasedError):
            site.bank.account(account_id)
        with pytest.raises(KeyError):
            cache.get(account_id)


class Wiki(Application[str]):
    """An application with text ids."""


def test_text_ids(new_site: MakeSite, redact: bool) -> None:
    """An aggregate with a text id is erased as others are, and only the one with exactly that id."""
    site = new_site(Wiki)
    wiki: Any
    with site.app.app_context():
        wiki = site.es.application
        for name in ("ada", "Ada", "ada "):
            wiki.save(Member(name))
        site.db.session.commit()
        assert site.es.erase("ada", redact=redact).events == 1
        site.db.session.commit()
        assert [name in wiki.repository for name in ("ada", "Ada", "ada ")] == [False, True, True]
        assert [type(each) for each in wiki.events.get("ada")][-1] is AggregateErased


@on_sqlite_file
def test_an_encrypted_log(new_site: MakeSite, redact: bool) -> None:
    """Tombstones and redacted events are encrypted and compressed like other events, and can be read."""
    env = {"COMPRESSOR_TOPIC": "eventsourcing.compressor:ZlibCompressor"}
    site = new_site(EVENTSOURCING_ENV=env)
    erased(site, site.opened(1), redact=redact)
    assert len(log(site)) == (3 if redact else 1)
    with site.app.app_context():
        event: Any = site.bank.mapper.to_domain_event(site.bank.recorder.select_notifications(1, 10)[-1])
        assert event.timestamp.tzinfo is not None


@on_postgresql
def test_a_tenant(site: Site, redact: bool) -> None:
    """Where a schema is that of a tenant, by ``schema_translate_map``, its aggregate is erased and no other."""
    with site.app.app_context():
        engine = site.db.engine
    with engine.begin() as connection:
        connection.execute(sa.schema.CreateSchema("tenant"))
        there = connection.execution_options(schema_translate_map={None: "tenant"})
        site.db.metadata.create_all(there)
    tenant = engine.execution_options(schema_translate_map={None: "tenant"})
    with site.app.app_context(), orm.Session(tenant) as session:
        with site.es.using(session):
            account_id = site.bank.open_account()
            session.commit()
        created = site.bank.events
        own: Any = Account._create(Account.Created, id=account_id, owner="Ada")
        site.bank.save(own)
        site.db.session.commit()
        with site.es.using(session):
            assert site.es.erase(account_id, redact=redact).events == 1
            session.commit()
            assert account_id not in site.bank.repository
        assert [type(each) for each in created.get(account_id)] == [Account.Created]


@on_postgresql
def test_a_role_without_the_right_to_delete(site: Site, uri: str) -> None:
    """A role that may not delete gets an error that says so, and nothing is changed."""
    account_id = site.opened(1)
    role = f"web_{uuid4().hex}"
    with site.app.app_context():
        engine = site.db.engine
    with engine.begin() as connection:
        for statement in (
            f"CREATE ROLE {role} LOGIN",
            f"GRANT USAGE ON SCHEMA public TO {role}",
            f"GRANT SELECT, INSERT ON ALL TABLES IN SCHEMA public TO {role}",
            f"GRANT USAGE, SELECT ON ALL SEQUENCES IN SCHEMA public TO {role}",
        ):
            connection.execute(sa.text(statement))
    web = make_site(sa.make_url(uri).set(username=role).render_as_string(hide_password=False), create=False)
    try:
        for option in ("--yes", "--redact"):
            code, printed = run(web, "erase", str(account_id), option, answer="y\n")
            assert code == 1
            assert "permission denied for table bank_events: grant what the role needs" in printed
        with web.app.app_context():
            with pytest.raises(MissingRightError):
                web.es.erase(account_id)
            web.db.session.commit()
    finally:
        web.close()
        with engine.begin() as connection:
            for statement in (f"DROP OWNED BY {role}", f"DROP ROLE {role}"):
                connection.execute(sa.text(statement))
    assert site.balance(account_id) == 1
    assert len(log(site)) == 2


def test_topics_are_found_without_an_import() -> None:
    """A process that has only imported the library finds the classes of the two events, without Flask."""
    for name in ("AggregateErased", "EventRedacted"):
        program = (
            "import sys; sys.modules.update(dict.fromkeys(('flask', 'flask_sqlalchemy')));"
            "from eventsourcing.utils import get_topic, resolve_topic;"
            f"topic = 'flask_eventsourcing:{name}'; print(get_topic(resolve_topic(topic)) == topic)"
        )
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, cwd=ROOT, check=False)
        assert done.stdout == "True\n", done.stderr


# ------------------------------------------------------------------------------------------------------ the command


def run(site: Site, *arguments: str, answer: str = "") -> tuple[int, str]:
    """Run a command, answer its question, and return its exit status and what it prints."""
    result = site.app.test_cli_runner().invoke(args=["eventsourcing", *arguments], input=answer)
    return result.exit_code, result.output


def test_command(site: Site) -> None:
    """The command reports what it would erase, asks, and reports what it did; ``--yes`` does not ask."""
    account_id = site.opened(1)
    code, printed = run(site, "erase", str(account_id), answer="n\n")
    assert code == 1
    assert f"Bank {account_id}: 2 events, 0 snapshots." in printed
    assert site.balance(account_id) == 1
    code, printed = run(site, "erase", str(account_id), "--redact", "--yes")
    assert (code, printed.splitlines()[1]) == (0, "Redacted: 2 events, 0 snapshots.")
    assert "Event 3 tells projections" in printed
    code, printed = run(site, "erase", str(account_id), answer="y\n")
    assert code == 0
    assert "Erased: 2 events, 0 snapshots.\n" in printed
    assert run(site, "erase", str(account_id)) == (0, f"Bank {account_id} was erased before, and nothing is left.\n")


@on_sqlite_file
def test_command_refuses(new_site: MakeSite) -> None:
    """An unknown id, text that is not an id, and a missing application name are one line each."""
    site = new_site(Bank, Shop)
    unknown = str(uuid4())
    assert run(site, "erase", unknown)[0] == 2
    assert "Choose the application with --application: Bank, Shop." in run(site, "erase", unknown)[1]
    code, printed = run(site, "erase", unknown, "--application", "Shop")
    assert (code, "Shop has no aggregate" in printed) == (1, True)
    code, printed = run(site, "erase", "ada", "--application", "Shop")
    assert (code, "'ada' is not a UUID, and the ids of Shop are." in printed) == (2, True)


@on_files
def test_command_on_another_database(new_site: MakeSite, uri: str) -> None:
    """An aggregate of an application that has a database of its own is erased there."""
    site = new_site(Bank, Shop, SQLALCHEMY_BINDS={"shop": "sqlite:///:memory:"}, EVENTSOURCING_BINDS={"Shop": "shop"})
    with site.app.app_context():
        shop = site.es[Shop]
        account_id = shop.open_account()
        site.db.session.commit()
    code, printed = run(site, "erase", str(account_id), "--application", "Shop", "--yes")
    assert code == 0, printed
    with site.app.app_context():
        assert account_id not in shop.repository
