"""The repository that checks each class of events once."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from eventsourcing.application import Repository, project_aggregate

from flask_eventsourcing.applications import CheckedRepository, install_repository, project_checked
from tests.domain import Account, Bank


class OwnRepository(Repository[UUID]):
    """A repository that an application has brought."""


class OwnBank(Bank):
    """An application that brings a repository of its own."""

    def construct_repository(self) -> Repository[UUID]:
        """Make it."""
        return OwnRepository(self.events)


class NoEvent:
    """Something with a mutator that lacks what an event has."""

    def mutate(self, aggregate: Any) -> Any:
        """Return something else than an aggregate."""
        return "mutated"


@pytest.fixture
def bank() -> Iterator[Bank]:
    """A bank in memory, with the repository."""
    with Bank() as made:
        install_repository(made)
        yield made


def test_aggregates_are_what_the_library_makes_of_them(bank: Bank) -> None:
    """Aggregates come out as the library's own repository rebuilds them, at any version."""
    account_id = bank.open_account()
    for amount in range(10):
        bank.deposit(account_id, amount)
    assert type(bank.repository) is CheckedRepository
    plain = Repository(bank.events)
    for version in (None, 1, 5):
        found: Account = bank.repository.get(account_id, version=version)
        expected: Account = plain.get(account_id, version=version)
        assert vars(found) == vars(expected)
    assert account_id in bank.repository
    assert uuid4() not in bank.repository


def test_what_is_no_event_is_refused() -> None:
    """An object without an event's attributes is refused as by the library, each time that it comes."""
    for _ in range(2):
        with pytest.raises(AssertionError):
            project_checked(None, [NoEvent()])


def test_a_function_that_is_given_is_used(bank: Bank) -> None:
    """A caller's own projector function gets the events."""
    account_id = bank.open_account()

    def count(aggregate: Any, events: Iterable[Any]) -> Any:
        return len(list(events))

    found: Any = bank.repository.get(account_id, projector_func=count)
    assert found == 1


def test_a_repository_of_the_applications_own_stays() -> None:
    """An application that brings a repository of its own keeps it."""
    with OwnBank() as bank:
        install_repository(bank)
        assert type(bank.repository) is OwnRepository


def test_an_event_is_checked_once_for_its_class(bank: Bank, monkeypatch: pytest.MonkeyPatch) -> None:
    """The library's check is made for the first event of a class and not again."""
    account_id = bank.open_account()
    bank.deposit(account_id)
    bank.account(account_id)
    calls: list[Any] = []

    def noted(aggregate: Any, events: Iterable[Any]) -> Any:
        calls.append(events)
        return project_aggregate(aggregate, events)

    monkeypatch.setattr("flask_eventsourcing.applications.project_aggregate", noted)
    assert project_checked(None, bank.events.get(account_id)).balance == 1
    assert calls == []
