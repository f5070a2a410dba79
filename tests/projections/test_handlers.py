"""Which handler is called for which event, and what handlers may do.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from contextlib import suppress
from typing import Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from eventsourcing import utils
from eventsourcing.domain import Aggregate
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError
from flask_eventsourcing.exceptions import HandlerError
from flask_eventsourcing.projections import ModelProjection, on, reaction
from tests.domain import Account, Bank
from tests.projections.desk import Created, Deposited, Desk, PoisonError


class Savings(Account):
    """An account whose events are subclasses of those of an account."""


class Parcel(Aggregate):
    """Something that the bank has nothing to do with."""


on_sqlite = pytest.mark.parametrize("uri", ["sqlite-file"], indirect=True)


def listing(desk: Desk, *events: Any, **attributes: Any) -> type[ModelProjection]:
    """Register a projection that lists the events of some classes, under the name of the first."""

    class Listing(ModelProjection):
        models = (desk.Seen,)

        @on(*events)
        def noted(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "general")

    return desk.register(type("Listing", (Listing,), attributes))


def note(desk: Desk, session: orm.Session, event: Any, text: str) -> None:
    """Add a row to the list."""
    session.add(desk.Seen(account_id=str(event.originator_id), version=event.originator_version, text=text))


def seen(desk: Desk) -> list[tuple[int, str]]:
    """Return the versions and texts in the list, in their order."""
    with desk.context():
        rows = desk.session.execute(sa.select(desk.Seen.version, desk.Seen.text).order_by(desk.Seen.id))
        return [(version, text) for version, text in rows]


@on_sqlite
def test_the_most_specific_handler_is_called_and_only_that_one(desk: Desk) -> None:
    """A handler takes the events of its class and of subclasses that have no handler of their own."""

    class Listing(ModelProjection):
        models = (desk.Seen,)

        @on(Account.Event)
        def general(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "general")

        @on(Deposited)
        def special(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "special")

    desk.register(Listing)
    with desk.context() as bank:
        account = Savings("Ada")
        account.deposit(1)
        bank.save(account)
        desk.session.commit()
    desk.open(5)
    assert not desk.run_once()
    assert seen(desk) == [(1, "general"), (2, "special"), (1, "general"), (2, "special")]


@on_sqlite
def test_a_handler_overridden_in_a_subclass_without_a_mark_is_none(desk: Desk) -> None:
    """A projection class inherits handlers, and removes one by overriding it without a decorator."""

    class Listing(ModelProjection):
        models = (desk.Seen,)

        @on(Created)
        def noted(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "general")

    class Silent(Listing):
        def noted(self, event: Any, session: orm.Session) -> None: ...

        @on(Deposited)
        def other(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "other")

    desk.register(Silent)
    desk.open(1)
    assert not desk.run_once("Silent")
    assert seen(desk) == [(2, "other")]


def test_events_of_other_topics_are_not_even_read(desk: Desk) -> None:
    """The database filters by topic; the position moves past events that nobody handles."""
    listing(desk, Created)
    desk.open(*range(1, 30))
    read: list[Any] = []
    host = desk.consumer("Listing").application
    with desk.context():
        mapper: Any = host.mapper
    original = mapper.to_domain_event

    def to_domain_event(stored: Any) -> Any:
        read.append(stored.topic)
        return original(stored)

    mapper.to_domain_event = to_domain_event
    assert not desk.run_once()
    assert read == [utils.get_topic(Created)]
    assert desk.row("Listing").position == desk.head() == 30
    assert desk.row("Listing").applied == 1


def test_a_log_of_unhandled_events_moves_the_position(desk: Desk) -> None:
    """A projection whose events are not in the log is at the head of the log, and waiting for it ends."""
    listing(desk, Parcel.Created)
    desk.open(1, 2)
    assert not desk.run_once()
    assert (desk.row("Listing").position, desk.row("Listing").applied) == (3, 0)
    assert desk.status("Listing").lag_events == 0


@on_sqlite
def test_events_of_renamed_classes_are_handled(desk: Desk) -> None:
    """Events stored under a topic that was registered for a renamed class reach its handler."""
    listing(desk, Deposited)
    desk.open(7)
    old = "tests.no_such_module:Konto"
    with desk.context():
        table = desk.events_table
        new = utils.get_topic(Deposited)
        moved = sa.update(table).where(table.c.topic == new).values(topic=f"{old}.Deposited")
        desk.session.execute(moved)
        desk.session.commit()
    utils.register_topic(old, Account)
    try:
        assert not desk.run_once()
        assert seen(desk) == [(2, "general")]
    finally:
        for topic in [each for each in utils._topic_cache if each.startswith(old)]:
            del utils._topic_cache[topic]


@on_sqlite
def test_subclasses_that_are_imported_later_are_handled(desk: Desk) -> None:
    """A running worker applies events whose class was made after it had started."""
    listing(desk, Created)
    with desk.running():
        desk.open()

        # A class of another name each time, as its topic is known to the process from then on.
        late: Any = type(f"Late{uuid4().hex}", (Account,), {})
        with desk.context() as bank:
            bank.save(late("Ada"))
            desk.session.commit()
            desk.wait_for("Listing", 2, timeout=20)
    assert seen(desk) == [(1, "general"), (1, "general")]


@pytest.mark.parametrize("ending", ["commit", "rollback", "commit_twice"])
def test_a_handler_that_ends_the_transaction_is_an_error(desk: Desk, ending: str) -> None:
    """A handler that commits or rolls back halts its projection; nothing of the batch is stored, and nothing lost."""
    ends = [True]

    class Ending(ModelProjection):
        models = (desk.Seen,)
        retries = 0

        @on(Account.Event)
        def noted(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "noted")
            if ends[0] and event.originator_version == 3:
                if ending == "commit_twice":
                    try:
                        session.commit()
                    except HandlerError:
                        session.commit()
                else:
                    getattr(session, ending)()

    desk.register(Ending)
    desk.open(1, 2, 3, 4)
    (error,) = desk.run_once()
    assert isinstance(error.__cause__, HandlerError)
    assert "ended the transaction" in str(error)
    assert desk.row("Ending").position == 2
    assert [version for version, _ in seen(desk)] == [1, 2]
    ends[0] = False
    desk.consumer("Ending").checkpoint.resume()
    assert not desk.run_once()
    assert [version for version, _ in seen(desk)] == [1, 2, 3, 4, 5]


def test_a_handler_may_use_savepoints(desk: Desk) -> None:
    """Within a handler, what is rolled back with a savepoint is gone and the rest is stored."""

    class Careful(ModelProjection):
        models = (desk.Seen,)

        @on(Account.Event)
        def noted(self, event: Any, session: orm.Session) -> None:
            with session.begin_nested():
                note(desk, session, event, "kept")
            inner = session.begin_nested()
            note(desk, session, event, "dropped")
            inner.rollback()

    desk.register(Careful)
    desk.open(1)
    assert not desk.run_once()
    assert seen(desk) == [(1, "kept"), (2, "kept")]


def test_a_handler_that_goes_on_after_an_error_of_the_database_is_told_so(desk: Desk) -> None:
    """Where an error aborts the transaction, ignoring it halts the projection with that event named."""
    ignore = [True]

    class Ignoring(ModelProjection):
        models = (desk.Seen,)
        retries = 0

        @on(Account.Event)
        def noted(self, event: Any, session: orm.Session) -> None:
            note(desk, session, event, "noted")
            session.flush()
            if ignore[0] and event.originator_version == 3:
                with suppress(sa.exc.DBAPIError):
                    session.execute(sa.text("SELECT no_such_column FROM seen"))

    desk.register(Ignoring)
    desk.open(1, 2, 3)
    errors = desk.run_once()
    if desk.consumer("Ignoring").application.engine.dialect.name == "postgresql":
        assert "went on after an error of the database" in str(errors[0])
        assert desk.row("Ignoring").failed_position == 3
        ignore[0] = False
        desk.consumer("Ignoring").checkpoint.resume()
        errors = desk.run_once()
    assert not errors
    assert [version for version, _ in seen(desk)] == [1, 2, 3, 4]


def test_a_handler_that_ignores_a_failed_flush_is_halted_not_tried_for_ever(desk: Desk) -> None:
    """An ignored error of a flush is the handler's fault, not an outage of the database."""

    class Ignoring(ModelProjection):
        models = (desk.Balance, desk.Seen)
        retries = 0

        @on(Deposited)
        def noted(self, event: Any, session: orm.Session) -> None:
            session.add(desk.Balance(account_id=event.originator_id, amount=None))
            with suppress(sa.exc.DBAPIError):
                session.flush()
            session.scalar(sa.select(desk.Seen.id))

    desk.register(Ignoring)
    desk.open(1, 2)
    (error,) = desk.run_once()
    assert "PendingRollbackError" in str(error)
    assert desk.row("Ignoring").failed_position == 2


def test_a_handler_may_save_events(desk: Desk) -> None:
    """Events that a handler saves are committed with the position, or not at all."""
    fail = [True]

    class Bonus(ModelProjection):
        retries = 0

        @on(Created)
        def welcome(self, event: Any, session: orm.Session) -> None:
            desk.bank.deposit(event.originator_id, 100)
            if fail[0]:
                raise RuntimeError("no money left")

    desk.register(Bonus)
    account_id = desk.open()
    assert desk.run_once()
    with desk.context() as bank:
        assert bank.balance(account_id) == 0
    fail[0] = False
    desk.consumer("Bonus").checkpoint.resume()
    assert not desk.run_once()
    with desk.context() as bank:
        assert bank.balance(account_id) == 100


async def _coroutine(self: Any, event: Any, session: Any) -> None: ...


def _generator(self: Any, event: Any, session: Any) -> Any:
    yield


@pytest.mark.parametrize(
    ("handler", "message"),
    [
        (_coroutine, "coroutine or a generator"),
        (_generator, "coroutine or a generator"),
        (lambda self, event: None, r"must take \(self, event, session\)"),
        (staticmethod(lambda event, session, more: None), "static or class method"),
        (classmethod(lambda cls, event, session: None), "static or class method"),
    ],
)
def test_a_handler_that_could_not_be_called_is_refused(handler: Any, message: str) -> None:
    """Coroutines, generators, wrong signatures and static methods are refused when the class is made."""
    with pytest.raises(ConfigurationError, match=message):
        type("Wrong", (ModelProjection,), {"handler": on(Created)(handler)})


def test_two_handlers_for_one_class_are_refused() -> None:
    """Each event class has one handler of a kind."""
    with pytest.raises(ConfigurationError, match=r"two handlers for Account\.Created: one and other"):

        class Twice(ModelProjection):
            @on(Created)
            def one(self, event: Any, session: Any) -> None: ...

            @on(Created)
            def other(self, event: Any, session: Any) -> None: ...


@pytest.mark.parametrize("mark", [on, reaction])
@pytest.mark.parametrize("arguments", [(), ("Created",), (Created, None)])
def test_marks_take_event_classes(mark: Any, arguments: Any) -> None:
    """``@on`` and ``@reaction`` need one class or more."""
    with pytest.raises(ConfigurationError, match="takes one or more event classes"):
        mark(*arguments)


@pytest.mark.parametrize("mark", [on, reaction])
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (Account, r"Account is an aggregate class: name one of its events"),
        (Aggregate, "Aggregate is an aggregate class"),
        (str, "str is a class of Python's own"),
        (UUID, "UUID is a class of Python's own"),
        (Bank, "Bank is not an event class"),
        (PoisonError, "PoisonError is not an event class"),
    ],
)
def test_classes_that_no_event_has_are_refused(mark: Any, wrong: Any, message: str) -> None:
    """An aggregate class in the place of one of its events is refused where it is written, as is what is no event."""
    with pytest.raises(ConfigurationError, match=message):
        mark(wrong)
    with pytest.raises(ConfigurationError, match=message):
        mark(Created, wrong)


def test_every_event_and_those_with_a_mixin_may_be_named() -> None:
    """``object``, the library's base classes and a user's mixins are accepted as event classes."""

    class Mixin:
        """Of some events."""

    for each in (object, Aggregate.Event, Aggregate.Created, Mixin):
        assert callable(on(each)(lambda self, event, session: None))


def test_reactions_start_at_the_beginning_or_the_end() -> None:
    """Another start of a reaction is refused, and so are two different ones in a class."""
    with pytest.raises(ConfigurationError, match="'beginning' or 'end'; found 'middle'"):
        reaction(Created, start="middle")  # type: ignore[call-overload]
    with pytest.raises(ConfigurationError, match="share one position"):

        class Mixed(ModelProjection):
            @reaction(Created)
            def one(self, event: Any, key: str) -> None: ...

            @reaction(Deposited, start="end")
            def other(self, event: Any, key: str) -> None: ...
