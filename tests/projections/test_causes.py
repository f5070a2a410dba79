"""Events saved while an event is handled: their correlation and cause, and the argument ``recorded`` of handlers.

``desk`` is a bank with read models on one host, and what a test does with it: ``tests/projections/desk.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextvars import Context, copy_context
from typing import Any
from uuid import UUID

import pytest
import sqlalchemy as sa
from sqlalchemy import orm

from flask_eventsourcing import ConfigurationError
from flask_eventsourcing.metadata import Recorded, get_metadata_from_context
from flask_eventsourcing.projections import ModelProjection, on, reaction
from tests.projections.conftest import MakeFlaskDesk
from tests.projections.desk import Created, Deposited
from tests.projections.desk_hosts import FlaskDesk


@pytest.fixture
def host() -> str:
    """Flask, whose contexts have metadata of their own."""
    return "flask"


def records(desk: FlaskDesk) -> Sequence[Any]:
    """Return the stored events in their order."""
    with desk.app.app_context():
        return desk.db.session.scalars(
            sa.select(desk.es.StoredEvent).order_by(desk.es.StoredEvent.notification_id)
        ).all()


def chained(desk: FlaskDesk, *, inline: bool = False) -> None:
    """Register a projection whose handler and reaction save: an account of Ada's is answered by Bea's, and Cleo's."""
    is_inline = inline

    class Chain(ModelProjection):
        inline = is_inline

        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            if event.owner == "Ada":
                desk.es.application.open_account("Bea")

        @reaction(Created)
        def answered(self, event: Any, key: str) -> None:
            if event.owner == "Bea":
                desk.es.application.open_account("Cleo")

    desk.register(Chain)


@pytest.mark.parametrize("inline", [False, True])
def test_correlation_is_one_and_causation_a_tree(desk: FlaskDesk, inline: bool) -> None:
    """Events that handlers and reactions save have the handled event's correlation, and its id as their cause."""
    chained(desk, inline=inline)
    with desk.context() as bank, desk.es.event_metadata(correlation_id="c", reason="mine"):
        bank.open_account("Ada")
        desk.db.session.commit()
    with desk.context() as bank:
        bank.open_account("Ada")
        desk.db.session.commit()
    for _ in range(3):
        assert not desk.run_once()
    found = records(desk)
    assert len(found) == 6
    by_correlation: dict[str, list[Any]] = {}
    for each in found:
        by_correlation.setdefault(each.correlation_id, []).append(each)
    assert sorted(map(len, by_correlation.values())) == [3, 3]
    for chain in by_correlation.values():
        causes = [each.event_metadata.get("causation_id") for each in chain]
        assert causes == [None, str(chain[0].event_id), str(chain[1].event_id)]
    # Inline, it is saved within what the user has put.
    reasons = [each.event_metadata.get("reason") for each in by_correlation["c"]]
    assert reasons == ["mine", "mine" if inline else None, None]


def test_what_a_handler_has_started_keeps_its_event_as_the_cause(desk: FlaskDesk) -> None:
    """Work in a copy of a handler's context saves events with the handler's event as their cause, however late."""
    started: list[tuple[Context, UUID]] = []

    class Starting(ModelProjection):
        @on(Created)
        def opened(self, event: Any, session: orm.Session, recorded: Recorded) -> None:
            assert recorded.event_id is not None
            started.append((copy_context(), recorded.event_id))

    desk.register(Starting)
    with desk.context() as bank:
        for _ in range(12):
            bank.open_account()
        desk.db.session.commit()
        assert not desk.run_once()
        causes = [context.run(get_metadata_from_context)["causation_id"] for context, _ in started]
        assert causes == [str(event_id) for _, event_id in started]
        assert len(set(causes)) == 12
    assert get_metadata_from_context() == {}


def test_event_without_a_correlation_begins_one(desk: FlaskDesk) -> None:
    """Events caused by one without metadata share a correlation, and have no cause."""

    class Twice(ModelProjection):
        @on(Created)
        def opened(self, event: Any, session: orm.Session) -> None:
            if event.owner == "Ada":
                desk.es.application.open_account("Bea")
                desk.es.application.open_account("Bea")

    desk.register(Twice)
    with desk.context() as bank:
        bank.open_account("Ada")
        bank.open_account("Ada")
        desk.db.session.commit()
        record = desk.es.StoredEvent
        desk.db.session.execute(sa.update(record).values(event_id=None, correlation_id=None, event_metadata=None))
        desk.db.session.commit()
    assert not desk.run_once()
    correlations = [each.correlation_id for each in records(desk)[2:]]
    assert correlations[0] == correlations[1] != correlations[2] == correlations[3]
    assert all("causation_id" not in each.event_metadata for each in records(desk)[2:])


@pytest.mark.parametrize("inline", [False, True])
def test_handlers_that_name_it_are_told_what_was_recorded(desk: FlaskDesk, inline: bool) -> None:
    """A handler or reaction with a parameter ``recorded`` gets position, id, time and metadata."""
    told: list[tuple[str, Recorded]] = []
    is_inline = inline

    class Told(ModelProjection):
        inline = is_inline

        @on(Created)
        def opened(self, event: Any, session: orm.Session, recorded: Recorded) -> None:
            told.append(("handler", recorded))

        @on(Deposited)
        def deposited(self, event: Any, session: orm.Session) -> None:
            told.append(("plain", Recorded(0, None, None, {})))

        @reaction(Created)
        def answered(self, event: Any, key: str, *, recorded: Recorded) -> None:
            assert key == f"Bank/Told/{recorded.event_id}"
            told.append(("reaction", recorded))

    desk.register(Told)
    with desk.es.event_metadata(reason="r"):
        desk.open(1)
    assert not desk.run_once()
    (first, _) = records(desk)
    assert sorted(name for name, _ in told) == ["handler", "plain", "reaction"]
    for recorded in (each for name, each in told if name != "plain"):
        assert recorded.position == first.notification_id
        assert recorded.event_id == first.event_id
        assert recorded.correlation_id == first.correlation_id
        assert recorded.metadata["reason"] == "r"
        assert recorded.time is not None
        assert recorded.time.utcoffset() is not None
        assert recorded.time.replace(tzinfo=None) == first.recorded_at.replace(tzinfo=None)


def test_many_events_are_read_at_once(desk: FlaskDesk) -> None:
    """Metadata of the events of a batch are read with one query, and only if a handler asks for them."""
    told: list[UUID | None] = []

    class Told(ModelProjection):
        @on(Created)
        def opened(self, event: Any, session: orm.Session, recorded: Recorded) -> None:
            told.append(recorded.event_id)

    desk.register(Told)
    desk.balances()
    with desk.context() as bank:
        for _ in range(50):
            bank.open_account()
        desk.db.session.commit()
        engine = desk.db.engine
    statements: list[str] = []

    def note(connection: Any, cursor: Any, statement: str, *_: Any) -> None:
        if "metadata" in statement:
            statements.append(statement)

    sa.event.listen(engine, "before_cursor_execute", note)
    try:
        assert not desk.run_once("Balances")
        assert statements == []
        assert not desk.run_once("Told")
        assert len(statements) < 50
    finally:
        sa.event.remove(engine, "before_cursor_execute", note)
    assert told == [each.event_id for each in records(desk)]


def test_without_metadata_handlers_are_told_of_none(new_desk: MakeFlaskDesk) -> None:
    """Where no metadata are stored, ``recorded`` has the position alone, and nothing is caused."""
    desk = new_desk(EVENTSOURCING_METADATA=False)
    told: list[Recorded] = []

    class Told(ModelProjection):
        @on(Created)
        def opened(self, event: Any, session: orm.Session, recorded: Recorded) -> None:
            told.append(recorded)

    desk.register(Told)
    chained(desk)
    with desk.context() as bank:
        bank.open_account("Ada")
        desk.db.session.commit()
    assert not desk.run_once()
    assert told[0] == Recorded(1, None, None, {})
    assert {each.correlation_id for each in records(desk)} == {None}


def test_rebuild_tells_it_too(desk: FlaskDesk) -> None:
    """A rebuild calls handlers with ``recorded`` as a worker does."""

    class Told(ModelProjection):
        models = (desk.Seen,)

        @on(Created)
        def opened(self, event: Any, session: orm.Session, recorded: Recorded) -> None:
            row = desk.Seen(
                account_id=str(event.originator_id), version=recorded.position, text=recorded.metadata["why"]
            )
            session.add(row)

    desk.register(Told)
    with desk.es.event_metadata(why="because"):
        desk.open()
        desk.open()
    assert not desk.run_once()
    result = desk.app.test_cli_runner().invoke(args=["eventsourcing", "rebuild", "Told"])
    assert result.exit_code == 0, result.output
    with desk.app.app_context():
        rows = desk.db.session.execute(sa.select(desk.Seen.version, desk.Seen.text).order_by(desk.Seen.version)).all()
    assert [tuple(row) for row in rows] == [(1, "because"), (2, "because")]


def test_a_further_parameter_of_another_name_is_refused() -> None:
    """A handler with an unknown parameter is refused when its class is defined."""
    with pytest.raises(ConfigurationError, match="must take"):

        class Wrong(ModelProjection):
            @on(Created)  # type: ignore[arg-type]  # as type checkers say too
            def opened(self, event: Any, session: orm.Session, metadata: Any) -> None: ...


def test_ids_that_others_have_left_out(desk: FlaskDesk) -> None:
    """The nil UUID, which version 10 of the library stores where an event has no id, is the id of none."""
    keys: dict[str, str] = {}
    told: dict[str, Recorded] = {}

    class Told(ModelProjection):
        @reaction(Created)
        def answered(self, event: Any, key: str, recorded: Recorded) -> None:
            keys[event.owner], told[event.owner] = key, recorded
            if event.owner == "Ada":
                desk.es.application.open_account("Bea")

    desk.register(Told)
    with desk.context() as bank:
        bank.open_account("Ada")
        bank.open_account("Cleo")
        desk.db.session.commit()
        desk.db.session.execute(sa.update(desk.es.StoredEvent).values(event_id=UUID(int=0)))
        desk.db.session.commit()
    for _ in range(2):
        assert not desk.run_once()
    assert len(set(keys.values())) == 3
    assert (told["Ada"].event_id, told["Cleo"].event_id) == (None, None)
    assert "causation_id" not in told["Bea"].metadata
