"""Gives a new bank half a year of life, so that there is something to see: ``seed()`` within an application context."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from itertools import count
from typing import TYPE_CHECKING

from sqlalchemy import select

from example_app import services
from example_app.domain import happening_at
from example_app.extensions import db, es

if TYPE_CHECKING:
    from uuid import UUID

DAYS = 183
RENT_DAY, PAY_DAY, SAVING_DAY = 3, 1, 5

Step = tuple[datetime, Callable[[], object]]


class Life:
    """What happens in the bank, each with its time; it is done in the order of the times."""

    def __init__(self, now: datetime) -> None:
        self._now = now
        self._steps: list[Step] = []
        self._numbers: dict[str, UUID] = {}

    def open(self, time: datetime, owner: str, cents: int) -> None:
        """Open an account with a first deposit."""

        def _open() -> None:
            self._numbers[owner] = services.open_account(owner, cents).id

        self._add(time, _open)

    def deposit(self, time: datetime, owner: str, cents: int, note: str) -> None:
        """Pay money in."""
        self._add(time, lambda: services.deposit(self._numbers[owner], cents, note))

    def withdraw(self, time: datetime, owner: str, cents: int, note: str) -> None:
        """Pay money out."""
        self._add(time, lambda: services.withdraw(self._numbers[owner], cents, note))

    def transfer(self, time: datetime, owner: str, recipient: str, cents: int, note: str) -> None:
        """Send money."""
        self._add(time, lambda: services.transfer(self._numbers[owner], self._numbers[recipient], cents, note))

    def close(self, time: datetime, owner: str) -> None:
        """Close an account."""
        self._add(time, lambda: services.close_account(self._numbers[owner]))

    def happen(self) -> int:
        """Do it all in one transaction, but for what is still to come, and return how many steps that were."""
        done = 0
        with es.transaction():
            for time, step in sorted(self._steps, key=lambda each: each[0]):
                if time < self._now:
                    with happening_at(time):
                        step()
                    done += 1
        return done

    def _add(self, time: datetime, step: Callable[[], object]) -> None:
        self._steps.append((time, step))


def seed(now: datetime | None = None) -> int:
    """Fill an empty bank, leave any other as it is, and return how many things happened in it."""
    if db.session.scalar(select(es.StoredEvent.topic).limit(1)) is not None:
        return 0
    now = now or datetime.now(UTC)
    life = Life(now)
    first = (now - timedelta(days=DAYS)).replace(hour=9, minute=0, second=0, microsecond=0)
    _people(life, first)
    for number in range(DAYS + 1):
        _day(life, first + timedelta(days=number), number)
    _events_of_note(life, first)
    return life.happen()


def _people(life: Life, first: datetime) -> None:
    minutes = count(0, 7)
    for owner, cents in (
        ("Ada Lovelace", 250_000),
        ("Ben Okafor", 120_000),
        ("Clara Lindqvist", 1_850_000),
        ("Harbour Bakery", 640_000),
        ("Quay Street Flats", 900_000),
    ):
        life.open(first + timedelta(minutes=next(minutes)), owner, cents)
    life.open(first + timedelta(days=38, hours=2), "Emil Novak", 5_000)
    life.open(first + timedelta(days=12, hours=4), "Summer Regatta", 0)


def _day(life: Life, day: datetime, number: int) -> None:
    """What comes back every month and every few days; the amounts differ from day to day, and are always the same."""
    if number == 0:
        return
    morning, evening = day.replace(hour=8, minute=5), day.replace(hour=18, minute=number * 7 % 60)
    if day.day == PAY_DAY:
        life.deposit(morning, "Ada Lovelace", 342_000, "Salary")
        life.transfer(morning + timedelta(minutes=1), "Harbour Bakery", "Ben Okafor", 218_000, "Wages")
    if day.day == RENT_DAY:
        life.transfer(morning, "Ada Lovelace", "Quay Street Flats", 98_000, "Rent")
        life.transfer(morning + timedelta(minutes=2), "Ben Okafor", "Quay Street Flats", 74_000, "Rent")
        life.transfer(morning + timedelta(minutes=4), "Harbour Bakery", "Quay Street Flats", 135_000, "Shop rent")
    if day.day == SAVING_DAY:
        life.transfer(morning, "Ada Lovelace", "Clara Lindqvist", 20_000, "For the boat")
    if number % 4 == 0:
        life.deposit(evening, "Harbour Bakery", 58_000 + number * 371 % 21_000, "Takings")
    if number % 9 == 2:
        life.withdraw(evening, "Ada Lovelace", 6_000 + number * 113 % 9_000, "Groceries")
    if number % 11 == 3:
        life.withdraw(evening, "Ben Okafor", 4_500 + number * 97 % 6_000, "Cash")
    if number % 14 == 6:
        life.transfer(evening, "Ben Okafor", "Harbour Bakery", 1_250 + number % 7 * 110, "Bread")


def _events_of_note(life: Life, first: datetime) -> None:
    """A boat is paid, a cash machine is used too often, and a regatta is over."""
    life.withdraw(first + timedelta(days=121, hours=3), "Clara Lindqvist", 1_240_000, "The boat")
    night = first + timedelta(days=160, hours=14, minutes=12)
    for seconds in (0, 19, 41):
        life.withdraw(night + timedelta(seconds=seconds), "Ben Okafor", 5_000, "Cash machine")
    life.transfer(first + timedelta(days=40), "Emil Novak", "Harbour Bakery", 2_400, "Birthday cake")
    for days, owner in ((15, "Ada Lovelace"), (16, "Ben Okafor"), (17, "Clara Lindqvist")):
        life.transfer(first + timedelta(days=days, hours=5), owner, "Summer Regatta", 4_000, "Entry fee")
    life.transfer(first + timedelta(days=52), "Summer Regatta", "Harbour Bakery", 12_000, "Buffet")
    life.close(first + timedelta(days=53), "Summer Regatta")
