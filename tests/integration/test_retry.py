"""``@es.retry_on_conflict``.

``site`` is a Flask app with the bank of ``tests/domain.py``, its database and the extension: ``tests/bank.py``.
"""

from __future__ import annotations

from collections.abc import Callable
from io import BytesIO
from typing import Any, cast
from uuid import UUID

import pytest
from eventsourcing.persistence import IntegrityError, StoredEvent
from flask import request

from flask_eventsourcing import ConfigurationError
from tests.bank import Site
from tests.domain import in_threads
from tests.integration.conftest import MakeSite
from tests.integration.marks import on_files


class Unlucky:
    """A unit of work that is overtaken by another request, a number of times."""

    def __init__(self, site: Site, times: int) -> None:
        self.site = site
        self.times = times
        self.tries = 0
        self.account_id: UUID = site.opened()

    def __call__(self, amount: int = 100) -> int:
        """Read, be overtaken, save, and add a note that tells the try."""
        self.tries += 1
        account = self.site.bank.account(self.account_id)
        account.deposit(amount)
        self.site.note(f"try {self.tries}")
        if self.tries <= self.times:
            self.site.db.session.rollback()
            self.site.elsewhere(lambda: self.site.bank.deposit(self.account_id, 1))
            self.site.note(f"try {self.tries}")
        self.site.bank.save(account)
        return self.tries


def notes(site: Site) -> list[str]:
    """Return the texts of the notes."""
    with site.app.app_context():
        return [note.text for note in site.db.session.query(site.Note).order_by(site.Note.id)]


@pytest.mark.parametrize("conflicts", [0, 1, 3])
def test_whole_unit_is_run_again(site: Site, conflicts: int) -> None:
    """After a conflict the whole unit is run again, on the new state; rows of earlier tries are not stored."""
    work = Unlucky(site, conflicts)
    with site.app.app_context():
        assert site.es.retry_on_conflict(work)(amount=100) == conflicts + 1
    assert site.balance(work.account_id) == 100 + conflicts
    assert notes(site) == [f"try {conflicts + 1}"]


@pytest.mark.parametrize("times", [0, 1, 2])
def test_gives_up_with_the_conflict(site: Site, times: int) -> None:
    """After so many retries the last conflict is raised, with their number, and nothing of the unit is stored."""
    work = Unlucky(site, 10)
    with site.app.app_context(), pytest.raises(IntegrityError) as raised:
        site.es.retry_on_conflict(times=times)(work)()
    assert raised.value.__notes__ == [f"Tried {times + 1} times."]
    assert work.tries == times + 1
    assert notes(site) == []
    assert site.balance(work.account_id) == times + 1


def test_other_errors_are_not_retried(site: Site) -> None:
    """Any other error passes at once, and rolls back."""
    tries: list[int] = []

    def work() -> None:
        tries.append(1)
        site.bank.open_account()
        raise KeyError

    with site.app.app_context(), pytest.raises(KeyError):
        site.es.retry_on_conflict(work)()
    assert len(tries) == 1
    assert site.stored() == (0, 0)


@pytest.mark.parametrize("times", [-1, 1.5, "3", None, True])
def test_bad_number_of_times_is_refused(site: Site, times: Any) -> None:
    """An invalid number of retries is refused when the function is decorated."""
    with pytest.raises(ConfigurationError, match=r"retry_on_conflict\(times=…\) takes a whole number"):
        site.es.retry_on_conflict(times=times)(lambda: None)


def test_nested_unit_is_left_to_the_outermost(site: Site) -> None:
    """Within another unit of work, the outermost is run again, as only the whole can be."""
    work = Unlucky(site, 2)
    outer_tries: list[int] = []
    inner = site.es.retry_on_conflict(times=5)(work)

    @site.es.retry_on_conflict(times=5)
    def outer() -> int:
        outer_tries.append(1)
        return inner()

    with site.app.app_context():
        assert outer() == 3
    assert len(outer_tries) == 3
    assert site.balance(work.account_id) == 102


def test_within_a_plain_transaction_the_conflict_passes(site: Site) -> None:
    """Within ``transaction()`` nothing can be run again: the conflict passes through."""
    work = Unlucky(site, 1)
    with site.app.app_context(), pytest.raises(IntegrityError), site.es.transaction():
        site.es.retry_on_conflict(times=5)(work)()
    assert work.tries == 1


@pytest.mark.parametrize("before", ["event", "row"])
def test_work_before_the_unit_is_never_lost(site: Site, before: str) -> None:
    """If something was saved before the unit, a conflict is raised at once, as a retry would lose it."""
    work = Unlucky(site, 0)
    with site.app.app_context():
        stale = site.bank.account(work.account_id)
        stale.deposit(1000)
        site.db.session.rollback()
        site.elsewhere(lambda: site.bank.deposit(work.account_id, 1))
        if before == "event":
            site.bank.open_account()
        else:
            site.note("before")
        tries: list[int] = []

        @site.es.retry_on_conflict(times=3)
        def unit() -> None:
            tries.append(1)
            site.bank.save(stale)

        with pytest.raises(IntegrityError) as raised:
            unit()
        assert len(tries) == 1
        assert raised.value.__notes__[0].startswith("Not tried again, as the session had changes")
    assert site.stored() == (2, 0)


def test_view_is_run_again_and_keeps_its_name(site: Site) -> None:
    """Above a view the decorator gives one transaction, committed when the view returns, and run again whole."""
    work = Unlucky(site, 1)

    @site.es.retry_on_conflict(times=3)
    def deposit() -> tuple[str, int]:
        """Deposit."""
        return f"try {work()}", 201

    answer = site.answer(deposit)
    assert (answer.status_code, answer.text) == (201, "try 2")
    assert (deposit.__name__, deposit.__doc__) == ("deposit", "Deposit.")
    assert site.balance(work.account_id) == 101


READINGS: dict[str, tuple[Callable[[Any], bytes], bool, bool]] = {
    # How the view reads, whether the body is a form, and whether it is large.
    "upload": (lambda request: request.files["file"].read(), True, False),
    "large upload": (lambda request: request.files["file"].read(), True, True),
    "stream": (lambda request: request.stream.read(), False, False),
    "part of a stream": (lambda request: request.stream.read(2), False, False),
    "data not kept": (lambda request: request.get_data(cache=False), False, False),
    "large data": (lambda request: request.get_data(), False, True),
    "large stream": (lambda request: request.stream.read(), False, True),
}


@pytest.mark.parametrize("reading", READINGS)
@pytest.mark.parametrize("is_async", [False, True])
def test_retried_view_reads_its_request_again(site: Site, reading: str, is_async: bool) -> None:
    """Each try of a view reads the same, or there is no further try where a body too large to keep was read."""
    read, is_form, is_large = READINGS[reading]
    work, seen = Unlucky(site, 1), list[bytes]()
    site.app.testing = False

    def view() -> str:
        seen.append(read(request))
        work()
        return "done"

    async def awaited() -> str:
        return view()

    decorated: Any = site.es.retry_on_conflict(awaited if is_async else view)
    site.app.add_url_rule("/read", view_func=decorated, methods=["POST"])
    body = b"Ada" * (1_000_000 if is_large else 1)
    sent: Any = (
        {"data": {"file": (BytesIO(body), "ada.txt")}} if is_form else {"data": body, "content_type": "text/plain"}
    )
    answer = site.app.test_client().post("/read", **sent)
    # A file, where it is large, which the test client has made.
    answer.request.input_stream.close()
    is_read_once = reading == "large stream"
    assert answer.status_code == (500 if is_read_once else 200)
    assert seen == [body[:2] if "part" in reading else body] * (1 if is_read_once else 2)


@pytest.mark.parametrize(("kind", "seen"), [("upload", [b"Gr", b"ace", b"ace"]), ("stream", [b"Grace", b"", b""])])
def test_what_was_read_before_the_unit_is_not_read_again(site: Site, kind: str, seen: list[bytes]) -> None:
    """A function that is run again finds uploads and streams where they were when it began first."""
    work, read = Unlucky(site, 1), list[bytes]()

    @site.es.retry_on_conflict
    def store(stream: Any) -> None:
        read.append(stream.read(3))
        work()

    @site.app.post("/read")
    def view() -> str:
        found: Any = request.files["file"] if kind == "upload" else request.stream
        read.append(found.read(2) if kind == "upload" else found.read())
        store(found)
        return "done"

    sent: Any = {"file": (BytesIO(b"Grace"), "grace.txt")} if kind == "upload" else b"Grace"
    content_type = None if kind == "upload" else "text/plain"
    answer = site.app.test_client().post("/read", data=sent, content_type=content_type)
    assert answer.status_code == 200
    assert read == seen


@pytest.mark.parametrize("mode", ["request", "save"])
def test_works_in_the_other_commit_modes(new_site: MakeSite, mode: str) -> None:
    """In every commit mode a conflict runs the unit again."""
    site = new_site(EVENTSOURCING_COMMIT=mode)
    work = Unlucky(site, 2)
    assert site.answer(site.es.retry_on_conflict(lambda: str(work()))).text == "3"
    assert site.balance(work.account_id) == 102
    assert notes(site) == ["try 3"]


def test_unit_queues_at_its_first_read_or_not_at_all(site: Site) -> None:
    """A unit never queues for an aggregate while it holds the cache's lock."""
    account_id = site.opened()
    host = site.app.extensions["eventsourcing"].host
    queued: list[int] = []

    @site.es.retry_on_conflict
    def unit() -> None:
        site.bank.account(account_id)
        host.unit().units.contended.add((cast(Any, site.bank.recorder).events_table.name, account_id))
        site.bank.account(account_id)
        queued.append(len(host.unit().queue._queued))

    with site.app.app_context():
        unit()
        unit()
    assert queued == [0, 1]


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
@pytest.mark.parametrize("number", [0, 1, 2])
def test_the_queue_for_one_aggregate_keeps_no_other_waiting(new_site: MakeSite, number: int) -> None:
    """Saves of other aggregates, or of new ones, do not wait for a unit that queues for an aggregate."""
    site = new_site(EVENTSOURCING_LOCK_TIMEOUT=1)
    ids = sorted(site.opened(1) for _ in range(3))
    host = site.app.extensions["eventsourcing"].host

    @site.es.retry_on_conflict
    def unit() -> None:
        host.unit().units.contended.add((cast(Any, site.bank.recorder).events_table.name, ids[number]))
        site.bank.account(ids[number])
        assert host.unit().queue._queued
        for other in ids:
            if other != ids[number]:
                site.elsewhere(lambda other=other: site.bank.deposit(other, 1))  # type: ignore[misc]
        for _ in range(5):
            site.elsewhere(site.bank.open_account)

    with site.app.app_context():
        unit()


@pytest.mark.parametrize("uri", ["postgresql", "mariadb"], indirect=True)
def test_the_queue_at_a_first_change_keeps_no_other_waiting(new_site: MakeSite) -> None:
    """While a unit queues for a new account, a late save has a conflict at once, and other accounts are saved."""
    site = new_site(EVENTSOURCING_LOCK_TIMEOUT=1)
    ids = sorted(site.opened() for _ in range(3))
    tries: list[int] = []

    @site.es.retry_on_conflict
    def unit() -> None:
        account = site.bank.account(ids[1])
        tries.append(1)
        if len(tries) == 1:
            site.elsewhere(lambda: site.bank.deposit(ids[1], 1))
        else:
            late = StoredEvent(ids[1], 2, "late:Event", b"{}")
            with pytest.raises(IntegrityError):
                site.elsewhere(lambda: cast(Any, site.bank.recorder).insert_events([late]))
            for other in (ids[0], ids[2]):
                site.elsewhere(lambda other=other: site.bank.deposit(other, 1))  # type: ignore[misc]
            for _ in range(5):
                site.elsewhere(site.bank.open_account)
        account.deposit(1)
        site.bank.save(account)

    with site.app.app_context():
        unit()
    assert len(tries) == 2


@on_files
def test_contended_aggregate_loses_no_update(site: Site) -> None:
    """Many clients on one account all succeed with few retries, because after a conflict they queue."""
    account_id = site.opened()

    @site.es.retry_on_conflict(times=10)
    def view() -> str:
        site.bank.deposit(account_id, 1)
        return "done"

    def client() -> None:
        for _ in range(10):
            assert site.answer(view).status_code == 200

    in_threads([client] * 6)
    assert site.balance(account_id) == 60


def test_what_a_try_has_lost_is_not_told_when_the_next_one_succeeds(site: Site) -> None:
    """A try that closes its session and has a conflict leaves nothing behind, and the next try answers."""
    account_id = site.opened()
    tries: list[int] = []

    def work() -> str:
        tries.append(1)
        account = site.bank.account(account_id)
        if len(tries) == 1:
            site.bank.open_account()
            site.db.session.close()
            site.elsewhere(lambda: site.bank.deposit(account_id, 1))
        account.deposit(100)
        site.bank.save(account)
        return "done"

    answer = site.answer(site.es.retry_on_conflict(work))
    assert (answer.status_code, len(tries)) == (200, 2)
    assert site.balance(account_id) == 101


@on_files
def test_unit_on_translated_schemas_queues(new_site: MakeSite) -> None:
    """With a ``schema_translate_map`` on the engine, a unit that had a conflict queues and succeeds."""
    options = {"execution_options": {"schema_translate_map": {None: None, "tenant": None}}}
    site = new_site(SQLALCHEMY_ENGINE_OPTIONS=options)
    work = Unlucky(site, 1)
    with site.app.app_context():
        site.es.retry_on_conflict(work)()
    assert work.tries == 2
    assert site.balance(work.account_id) == 101
