"""Record classes of the user's."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import Decimal
from io import StringIO
from typing import Any

import pytest
from django.core.management import call_command
from django.db import connections, models
from django.test import override_settings
from django.test.utils import isolate_apps
from eventsourcing.application import Application
from eventsourcing.domain import Aggregate, BaseAggregate, CanInitAggregate, CanMutateAggregate, event
from eventsourcing.persistence import IntegrityError

from flask_eventsourcing.contrib.django import get_application
from flask_eventsourcing.contrib.django.models import (
    AbstractSnapshot,
    AbstractStoredEvent,
    AbstractTracking,
    RecordTextField,
    event_models,
)
from flask_eventsourcing.exceptions import ConfigurationError, EventMetadataError
from flask_eventsourcing.metadata import event_metadata
from tests.django_host import project

VALUES = {"amount": Decimal("12.50"), "day": datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), "details": {"a": [1, None]}}
SITE = {
    "Bank": {"APPLICATION": "tests.domain.Bank", "DATABASE": "own"},
    "Books": {"APPLICATION": f"{__name__}.Books", "DATABASE": "own"},
}


ODD = {"APPLICATION": f"{__name__}.Odd", "DATABASE": "own"}


class Odd(Application[Any]):
    """An application whose table has an odd name."""


class Page(BaseAggregate[str]):
    """An aggregate whose id is a text."""

    @dataclass(frozen=True)
    class Event(CanMutateAggregate[str]):
        """Its events."""

        originator_id: str
        originator_version: int
        timestamp: datetime

    @dataclass(frozen=True)
    class Opened(Event, CanInitAggregate[str]):
        """Its first event."""

        originator_topic: str
        name: str
        values: dict[str, Any]

    @staticmethod
    def create_id(name: str) -> str:
        """Make the id of the name."""
        return f"page/{name}"

    def __init__(self, name: str, values: dict[str, Any]) -> None:
        self.name = name

    @event("Turned")
    def turn(self) -> None:
        """Change it."""


class Books(Application[str]):
    """An application whose events are in a record class of the user's."""


@pytest.fixture
def books(url: str) -> Iterator[Books]:
    """The application, with tables."""
    with project.database("own", url), override_settings(EVENTSOURCING=SITE):
        yield get_application(Books)


def rows() -> list[Any]:
    """Return what the ORM reads."""
    from tests.django_host.ledger.models import Journal

    return list(Journal.objects.using("own").order_by("notification_id"))


def test_columns_of_their_own(books: Books) -> None:
    """Fields of a record class are filled by ``column_values()``, as the ORM stores them, in saves of every size."""
    from tests.django_host.ledger.models import Reason

    key = Reason.objects.using("own").create(text="note").pk
    with event_metadata(tenant="north"):
        page = Page("a", {**VALUES, "note_key": key})
        for _ in range(3):
            page.turn()
        books.save(page)
    first, second, *_ = found = rows()
    assert {each.tenant for each in found} == {"north"}
    assert (first.amount, first.day, first.details, first.note_id) == (*VALUES.values(), key)
    assert (second.amount, second.day, second.details, second.note_id) == (None, None, None, None)
    assert all(each.stored_at.tzinfo is not None and each.metadata["tenant"] == "north" for each in found)
    large = Page("b", VALUES)
    for _ in range(300):
        large.turn()
    books.save(large)
    assert {each.details == VALUES["details"] for each in rows()[4:5]} == {True}
    assert len(rows()) == 305
    assert books.repository.get("page/b").version == 301


def test_conflict_is_seen(books: Books) -> None:
    """With the key of the abstract class a conflict is noticed, and the tables pass the check."""
    books.save(Page("a", {}))
    one: Any
    other: Any
    one, other = books.repository.get("page/a"), books.repository.get("page/a")
    one.turn()
    other.turn()
    books.save(one)
    with pytest.raises(IntegrityError):
        books.save(other)
    printed = StringIO()
    call_command("eventsourcing", "check", database="own", stdout=printed)
    assert "table ledger_journal ok" in printed.getvalue()


def test_value_of_another_column(books: Books) -> None:
    """``column_values()`` that returns what is no column of its own, or no value of it, stores nothing."""
    with pytest.raises(EventMetadataError, match="'topic'"):
        books.save(Page("a", {"topic": "x"}))
    for wrong in ("today", "\0", 7):
        with pytest.raises(EventMetadataError, match="value for 'day'"):
            books.save(Page("a", {"day": wrong}))
    assert rows() == []


def refused(match: str, **given: Any) -> None:
    """Check that record classes are refused."""
    with pytest.raises(ConfigurationError, match=match):
        event_models(__name__, "Refused", **given)


@isolate_apps("tests.django_host.ledger")
def test_refused_record_classes() -> None:
    """A record class that would lose events is refused when it is declared, with the remedy."""

    class Base:
        app_label = "ledger"

    class Plain(models.Model):
        class Meta(Base):
            pass

    class Keyless(AbstractStoredEvent):
        class Meta(Base):
            pass

    class Defaulted(AbstractStoredEvent):
        tenant = models.CharField(max_length=3, default="a")

        class Meta(Base, AbstractStoredEvent.Meta):
            pass

    class Dated(AbstractStoredEvent):
        day = models.DateTimeField(auto_now_add=True)

        class Meta(Base, AbstractStoredEvent.Meta):
            pass

    class Needing(AbstractStoredEvent):
        tenant = models.CharField(max_length=3)

        class Meta(Base, AbstractStoredEvent.Meta):
            pass

    class Changed(AbstractStoredEvent):
        state = models.TextField()

        class Meta(Base, AbstractStoredEvent.Meta):
            pass

    class Whole(AbstractStoredEvent):
        class Meta(Base, AbstractStoredEvent.Meta):
            pass

    class Further(Whole):
        tenant = models.CharField(max_length=3, null=True)

        class Meta(Base):
            pass

    class Texts(AbstractSnapshot):
        originator_id = RecordTextField(kind="text id")

        class Meta(Base):
            pass

    class Tracking(AbstractTracking):
        notification_id = None

        class Meta(Base):
            pass

    for model in (Plain, AbstractStoredEvent, "Whole"):
        refused("derive it from AbstractStoredEvent", stored_event_model=model)
    refused("no unique key of originator_id, originator_version", stored_event_model=Keyless)
    for model in (Defaulted, Dated):
        refused("give it a db_default", stored_event_model=model)
    refused("NOT NULL and has no db_default", stored_event_model=Needing)
    refused("Field 'state'", stored_event_model=Changed)
    refused("in the table of Whole", stored_event_model=Further)
    refused("two types of originator_id", stored_event_model=Whole, snapshot_model=Texts)
    refused("Field 'notification_id'", tracking_model=Tracking)
    assert connections["default"].vendor


@pytest.mark.parametrize("table", ["of journal", "Order", 'books"."journal', '"books"."journal"', '"plain"'])
def test_table_with_an_odd_name(url: str, table: str) -> None:
    """``db_table`` may need quotes, have them already, or name a schema of PostgreSQL, as Django allows it."""
    has_schema, body = "books" in table, {"db_table": table, "app_label": "ledger"}
    if '"' in table and not url.startswith("postgresql"):
        return
    module = "tests.django_host.ledger.models"
    with isolate_apps("tests.django_host.ledger"):
        meta = type("Meta", (AbstractStoredEvent.Meta,), body)
        model: Any = type("Odd", (AbstractStoredEvent,), {"__module__": module, "Meta": meta})
        records = event_models(module, "Odd", stored_event_model=model)
    with project.alias("own", url), override_settings(EVENTSOURCING={"Odd": ODD}):
        if has_schema:
            with connections["own"].cursor() as cursor:
                cursor.execute("CREATE SCHEMA books")
        with connections["own"].schema_editor() as editor:
            for each in records.models:
                editor.create_model(each)
        odd = get_application(Odd)
        aggregate = Aggregate()
        odd.save(aggregate)
        odd.save(Aggregate(), Aggregate())
        assert odd.repository.get(aggregate.id).id == aggregate.id
        assert len(odd.notification_log.select(1, 10)) == 3
        call_command("check", databases=["own"])
        assert model.objects.using("own").count() == 3


@isolate_apps("tests.django_host.ledger")
def test_migrations_know_record_classes() -> None:
    """The migration of a record class describes its whole table, and a second one finds nothing to change."""
    from django.db.migrations.state import ModelState, ProjectState

    class Whole(AbstractStoredEvent):
        class Meta(AbstractStoredEvent.Meta):
            app_label = "ledger"

    state = ModelState.from_model(Whole)
    assert [each.name for each in state.options["constraints"]] == ["ledger_whole_originator_key"]
    project_state = ProjectState(models={("ledger", "whole"): state})
    rendered = project_state.apps.get_model("ledger", "Whole")
    assert ModelState.from_model(rendered).options["constraints"] == state.options["constraints"]
