"""Thousands of dead letters are read, tried and reported in pages.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

import json
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

import pytest
import sqlalchemy as sa

from flask_eventsourcing.projections import dead_letters
from flask_eventsourcing.projections.dead_letters import DeadLetter
from flask_eventsourcing.projections.upkeep import repair
from flask_eventsourcing.projections.upkeep.repair import Outcome, retry
from tests.projections.desk import Desk

PAGE = 7
MANY = 70_000
"""More than a statement of any database may have parameters."""
MEGABYTE = 2**20


class EnoughError(Exception):
    """Ends a retry."""


@pytest.fixture
def small_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    """Read a few letters at a time."""
    for module in (dead_letters, repair):
        monkeypatch.setattr(module, "PAGE", PAGE)


@pytest.fixture
def picky(desk: Desk) -> Desk:
    """A desk whose projection sets events aside."""
    desk.balances(on_failure="dead-letter", retries=0)
    return desk


def put(desk: Desk, number: int, aggregates: int, text: str = "PoisonError: no") -> None:
    """Insert letters directly: of each aggregate the first has failed, and the others wait."""
    table = desk.consumer().application.models.tables["dead_letters"]
    rows = [
        {
            "projection": "Balances",
            "position": position,
            "originator_id": f"aggregate {position % aggregates}",
            "originator_version": position // aggregates + 1,
            "topic": "tests.domain:Account.Deposited",
            "error": text if position <= aggregates else None,
            "traceback": text if position <= aggregates else None,
            "attempts": 1 if position <= aggregates else 0,
        }
        for position in range(1, number + 1)
    ]
    with desk.context(), desk.engine.begin() as connection:
        for start in range(0, number, 5000):
            connection.execute(sa.insert(table), rows[start : start + 5000])


def command(desk: Desk, *arguments: str) -> tuple[int, str]:
    """Run a command on dead letters; returns the exit status and what it prints."""
    result = desk.command("dead-letters", *arguments)
    assert result.exception is None or isinstance(result.exception, SystemExit)
    return result.exit_code, result.output


@contextmanager
def peak_below(megabytes: float) -> Iterator[None]:
    """See that what is done within it never holds more memory than so much."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < megabytes * MEGABYTE
    finally:
        tracemalloc.stop()


@pytest.mark.usefixtures("small_pages")
def test_a_list_of_thousands(picky: Desk) -> None:
    """The list has each of very many letters once, in order, as text and as JSON."""
    put(picky, 2000, 300)
    code, output = command(picky, "list")
    lines = output.splitlines()
    assert code == 0
    assert [int(line.split()[2]) for line in lines[1:]] == list(range(1, 2001))
    assert lines[0].split()[:3] == ["ID", "PROJECTION", "POSITION"]
    found = json.loads(command(picky, "list", "--json")[1])
    assert [each["position"] for each in found] == list(range(1, 2001))


@pytest.mark.usefixtures("small_pages")
@pytest.mark.parametrize("limit", [1, PAGE, 20])
def test_a_list_with_a_limit(picky: Desk, limit: int) -> None:
    """``--limit`` lists the first ones only, and gives the number of all."""
    put(picky, 100, 30)
    lines = command(picky, "list", "--limit", str(limit))[1].splitlines()
    assert [int(line.split()[2]) for line in lines[1:-1]] == list(range(1, limit + 1))
    assert lines[-1] == f"{limit} of 100 dead letters."
    assert len(json.loads(command(picky, "list", "--json", "--limit", str(limit))[1])) == limit
    assert command(picky, "list", "--limit", "100")[1].splitlines()[-1].split()[2] == "100"
    assert command(picky, "list", "--limit", "0")[0] == 2


@pytest.mark.usefixtures("small_pages")
def test_a_list_of_one_aggregate(picky: Desk) -> None:
    """``--aggregate`` lists the letters of one aggregate, over as many pages as they have."""
    put(picky, 100, 10)
    found = json.loads(command(picky, "list", "--json", "--aggregate", "aggregate 3")[1])
    assert [each["position"] for each in found] == list(range(3, 101, 10))
    lines = command(picky, "list", "--aggregate", "aggregate 3", "--limit", "2")[1].splitlines()
    assert lines[-1] == "2 of 10 dead letters."
    assert command(picky, "list", "--aggregate", "nobody") == (0, "There are no dead letters.\n")
    assert command(picky, "list", "--aggregate", "nobody", "--json") == (0, "[]\n")


@pytest.mark.parametrize(("number", "text"), [(1, "1 dead letter: see"), (2, "2 dead letters: see")])
def test_one_letter_is_no_plural(picky: Desk, number: int, text: str) -> None:
    """The status says "1 dead letter" and "2 dead letters"."""
    put(picky, number, number)
    result = picky.command("status")
    assert f"Balances: {text} 'flask eventsourcing dead-letters list'" in result.output


@pytest.mark.usefixtures("small_pages")
def test_retry_all_by_pages(picky: Desk) -> None:
    """A retry of all letters goes through them in pages, in order, and tries each once."""
    picky.poison = {13}
    accounts = [picky.open(1, 13, 2) for _ in range(20)]
    for account_id in accounts:
        picky.deposit(account_id, 17, 4)
    assert not picky.run_once()
    assert (picky.status().dead_letters, picky.status().waiting) == (20, 60)
    picky.poison = {17}
    told: list[tuple[Outcome, int, str]] = []

    def tell(outcome: Outcome, letter: DeadLetter) -> None:
        told.append((outcome, letter.originator_version, letter.originator_id))

    result = retry(picky.consumer(), tell=tell)
    assert (result.applied, result.failed) == ([], [])
    expected = [("applied", 3), ("applied", 4), ("failed", 5)]
    assert told == [(outcome, version, str(each)) for each in accounts for outcome, version in expected]
    assert (picky.status().dead_letters, picky.status().waiting) == (20, 20)
    picky.poison = set()
    code, output = command(picky, "retry", "--all")
    assert code == 0
    assert [line.split()[1] for line in output.splitlines()] == ["applied:"] * 40
    assert picky.amounts() == dict.fromkeys(accounts, 37)
    assert command(picky, "retry", "--all") == (0, "There are no dead letters.\n")


@pytest.mark.usefixtures("small_pages")
def test_retry_of_many_ids(picky: Desk) -> None:
    """Any number of ids is retried in the order of the log; if one is unknown, none is tried."""
    picky.poison = {13}
    accounts = [picky.open(13) for _ in range(20)]
    assert not picky.run_once()
    picky.poison = set()
    ids = [each["id"] for each in json.loads(command(picky, "list", "--json")[1])]
    code, output = command(picky, "retry", *map(str, ids), "4711")
    assert (code, output.splitlines()[0]) == (
        1,
        "Error: There is no dead letter 4711: see 'flask eventsourcing dead-letters list'.",
    )
    code, output = command(picky, "retry", *map(str, reversed(ids)))
    assert code == 0
    assert [UUID(line.split()[6]) for line in output.splitlines()] == accounts
    assert picky.status().dead_letters == 0


@pytest.mark.long
@pytest.mark.parametrize("uri", ["postgresql"], indirect=True)
def test_seventy_thousand_letters(picky: Desk) -> None:
    """With 70,000 letters the list, the status, the worker and a retry hold a few of them in memory at a time."""
    text = "x" * 3000
    put(picky, MANY, MANY, text)
    account_id = picky.open(1, 2)
    with peak_below(20):
        lines = command(picky, "list", "--limit", "3")[1].splitlines()
    assert lines[-1] == "3 of 70,000 dead letters."
    with peak_below(20):
        assert picky.status().dead_letters == MANY
    with peak_below(20):
        assert not picky.run_once()
    assert picky.amounts() == {account_id: 3}
    consumer = picky.consumer()
    letters, engine = consumer.application.dead_letters, consumer.application.engine
    with peak_below(20):
        assert sum(map(len, letters.pages(engine, "Balances"))) == MANY
    told: list[int] = []

    def tell(outcome: Outcome, letter: DeadLetter) -> None:
        told.append(letter.id)
        if len(told) == 300:
            raise EnoughError

    with peak_below(20), pytest.raises(EnoughError):
        retry(consumer, tell=tell)
    del told[:]
    with pytest.raises(EnoughError):
        retry(consumer, range(1000, MANY + 1), tell=tell)
    assert told == list(range(1000, 1300))
