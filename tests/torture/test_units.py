"""Many clients that save, roll back in every way and collide: accounts hold what was answered, and nothing else."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from eventsourcing.persistence import IntegrityError
from flask import jsonify
from werkzeug.test import TestResponse

from tests.bank import Site, make_site
from tests.domain import in_threads

CLIENTS, ACCOUNTS, SECONDS = 8, 4, 8.0
Claim = list[tuple[UUID, int]]
"""What a view says that it has stored."""
Way = Callable[["Client"], Claim]
WAYS: list[Way] = []


def way(function: Way) -> Way:
    """Add a way in which a view may go."""
    WAYS.append(function)
    return function


class Client:
    """One client, which sends requests and notes what it was told."""

    def __init__(self, site: Site, accounts: list[UUID], number: int) -> None:
        self.site = site
        self.accounts = accounts
        self.chance = random.Random(number)
        self.told: Claim = []
        self.answers: Counter[tuple[str, int]] = Counter()

    @property
    def session(self) -> Any:
        """The session of the request."""
        return self.site.db.session

    def drawn(self) -> tuple[UUID, int]:
        """Draw an account and an amount."""
        return self.chance.choice(self.accounts), self.chance.randint(1, 1000)

    def deposit(self) -> tuple[UUID, int]:
        """Pay in, and take one's time before and after."""
        account_id, amount = self.drawn()
        account = self.site.bank.account(account_id)
        time.sleep(self.chance.uniform(0, 0.003))
        account.deposit(amount)
        self.site.bank.save(account)
        return account_id, amount

    def execute(self, statement: str) -> None:
        """Execute a textual statement."""
        self.session.execute(sa.text(statement))

    def run(self) -> None:
        """Send requests until the time is up."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            chosen = self.chance.choice(WAYS)
            try:
                answer = self.site.answer(lambda: jsonify(chosen(self)))  # noqa: B023  # it is called at once
            except sa.exc.OperationalError as error:
                # A deadlock of MariaDB's ends savepoints too, which the end of the session is told when it leaves them.
                if "SAVEPOINT" not in str(error.orig):
                    raise
                self.answers[chosen.__name__, 500] += 1
            else:
                self.heard(chosen, answer)

    def heard(self, chosen: Way, answer: TestResponse) -> None:
        """Note an answer."""
        self.answers[chosen.__name__, answer.status_code] += 1
        if answer.status_code < 400:
            claim: Any = answer.json
            self.told += [(UUID(account_id), amount) for account_id, amount in claim]


@way
def commits(client: Client) -> Claim:
    """Save twice and commit."""
    claim = [client.deposit(), client.deposit()]
    client.session.commit()
    return claim


@way
def rolls_back(client: Client) -> Claim:
    """Save, roll back by one means or the other, save and commit."""
    client.deposit()
    driver = client.session.connection().connection.driver_connection
    means: list[Callable[[], Any]] = [client.session.rollback, driver.rollback, lambda: client.execute("ROLLBACK")]
    client.chance.choice(means)()
    claim = [client.deposit()]
    client.session.commit()
    return claim


@way
def forgets(client: Client) -> Claim:
    """Save, and close the session or do nothing."""
    claim = [client.deposit()]
    ends: list[Callable[[], Any]] = [client.session.close, client.session.remove, client.session.reset, lambda: None]
    client.chance.choice(ends)()
    return claim


@way
def uses_savepoints(client: Client) -> Claim:
    """Save in a savepoint of one level or the other that is released or rolled back, and commit the rest."""
    claim = [client.deposit()]
    level, keeps = client.chance.choice(("orm", "connection", "text")), client.chance.random() < 0.5
    if level == "text":
        client.execute("SAVEPOINT a")
        within = client.deposit()
        client.execute("RELEASE SAVEPOINT a" if keeps else "ROLLBACK TO SAVEPOINT a")
    else:
        opener = client.session if level == "orm" else client.session.connection()
        savepoint = opener.begin_nested()
        within = client.deposit()
        (savepoint.commit if keeps else savepoint.rollback)()
    client.session.commit()
    return [*claim, within] if keeps else claim


@way
def keeps_its_object(client: Client) -> Claim:
    """Save an object, lose that, and save the object once more."""
    account_id, amount = client.drawn()
    account = client.site.bank.account(account_id)
    savepoint = client.session.begin_nested()
    account.deposit(1)
    client.site.bank.save(account)
    savepoint.rollback()
    account.deposit(amount)
    client.site.bank.save(account)
    client.session.commit()
    return [(account_id, amount)]


@way
def tries_by_hand(client: Client) -> Claim:
    """Save an object until there is no conflict."""
    account_id, amount = client.drawn()
    account = client.site.bank.account(account_id)
    time.sleep(client.chance.uniform(0, 0.01))
    account.deposit(amount)
    for _ in range(3):
        try:
            client.site.bank.save(account)
            client.session.commit()
        except IntegrityError:
            client.session.rollback()
        else:
            return [(account_id, amount)]
    raise KeyError("tried three times")


@way
def runs_again(client: Client) -> Claim:
    """Save in a function that runs again after a conflict."""
    return client.site.es.retry_on_conflict(times=5)(lambda: [client.deposit(), client.deposit()])()


@way
def is_read_before(client: Client) -> Claim:
    """Read before a function that runs again after a conflict."""
    account_id, amount = client.drawn()
    account = client.site.bank.account(account_id)
    time.sleep(client.chance.uniform(0, 0.01))

    @client.site.es.retry_on_conflict
    def work() -> None:
        account.deposit(amount)
        client.site.bank.save(account)

    work()
    return [(account_id, amount)]


@way
def has_a_helper(client: Client) -> Claim:
    """Have a helper that ends the transaction within a unit of work, and catches every error of that."""

    @client.site.es.retry_on_conflict
    def work() -> Claim:
        claim = [client.deposit()]
        try:
            client.chance.choice((client.session.commit, client.session.rollback, client.session.close))()
        except Exception:  # noqa: BLE001  # as such helpers do
            claim.append(client.deposit())
        return [*claim, client.deposit()]

    return work()


@pytest.fixture(params=["sqlite", "postgres_url", "mariadb_url"])
def site(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Site]:
    """A site with a connection for each client."""
    url = f"sqlite:///{tmp_path}/units.db" if request.param == "sqlite" else request.getfixturevalue(request.param)
    options = {"pool_size": CLIENTS + 2}
    made = make_site(url, SQLALCHEMY_ENGINE_OPTIONS=options, PROPAGATE_EXCEPTIONS=False)
    made.quiet()
    yield made
    made.close()


@pytest.mark.torture
def test_accounts_hold_what_was_answered(site: Site) -> None:
    """After a load by many clients each account holds the sum of what was answered 2xx, and each stream can be read."""
    accounts = [site.opened() for _ in range(ACCOUNTS)]
    clients = [Client(site, accounts, number) for number in range(CLIENTS)]
    in_threads([client.run for client in clients], patience=SECONDS * 10)
    told: dict[UUID, list[int]] = {account_id: [] for account_id in accounts}
    for client in clients:
        for account_id, amount in client.told:
            told[account_id].append(amount)
    answers = sum((client.answers for client in clients), Counter[tuple[str, int]]())
    assert {name for name, status in answers if status == 200} >= {"commits", "runs_again", "rolls_back"}, answers
    with site.app.app_context():
        found = {each: sorted(event.amount for event in _deposits(site, each)) for each in accounts}
        assert found == {account_id: sorted(amounts) for account_id, amounts in told.items()}, answers
        for account_id in accounts:
            account = site.bank.account(account_id)
            assert (account.version, account.balance) == (1 + len(found[account_id]), sum(found[account_id]))


def _deposits(site: Site, account_id: UUID) -> list[Any]:
    return [event for event in site.bank.events.get(account_id) if hasattr(event, "amount")]
