"""What several commands need: the tables, errors in one line, and consumers by their names."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click
import sqlalchemy as sa
from eventsourcing.persistence import PersistenceError

from ..exceptions import FlaskEventSourcingError
from ..projections.consumers import Consumer
from ..projections.outages import is_outage
from ..state import EventSourcingState


def tables(state: EventSourcingState) -> list[tuple[str, sa.Table]]:
    """Return the tables of applications, then those that projections need, each with whom it belongs to."""
    found = [(name, table) for name, models in state.models.items() for table in models.tables.values()]
    known = {table for _, table in found}
    return found + [("Projections", table) for table in state.projections.tables() if table not in known]


def missing_tables(state: EventSourcingState) -> list[sa.Table]:
    """Return the tables that are not in the database.

    :raises click.ClickException: when the database cannot be reached.
    """
    with clear_errors():
        inspector = sa.inspect(state.datastore.engine)
        return [table for _, table in tables(state) if not inspector.has_table(table.name, schema=table.schema)]


def require_tables(state: EventSourcingState) -> None:
    """Check that there is every table.

    :raises click.ClickException: naming those that are missing, and the remedy.
    """
    missing = missing_tables(state)
    if missing:
        names = ", ".join(table.fullname for table in missing)
        raise click.ClickException(
            f"Tables are missing ({names}): run 'flask eventsourcing init-db' or your migrations."
        )


@contextmanager
def clear_errors() -> Iterator[None]:
    """Show errors of the database and of this package as one message, without a traceback."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, PersistenceError, FlaskEventSourcingError) as error:
        raise click.ClickException(message_of(error)) from error


def message_of(error: Exception) -> str:
    """Return what is said of an error."""
    # The driver's own words, without the statement and the address of a manual.
    text = str(getattr(error, "orig", None) or error).strip()
    if is_outage(error):
        return f"The database cannot be reached: {text}"
    return text if isinstance(error, FlaskEventSourcingError) else f"{type(error).__name__}: {text}"


def qualified(consumer: Consumer) -> str:
    """Return the name that also tells the application."""
    return f"{consumer.host.application_name}.{consumer.name}"


def named(consumers: Sequence[Consumer], name: str) -> list[Consumer]:
    """Return the consumers that a name stands for: a projection with its reactions, or the one of that name.

    Where several applications have one of that name, the application's name goes before it: ``Bank.Balances``.

    :raises click.ClickException: when there is none, or there are several.
    """
    found = []
    for consumer in consumers:
        names = {consumer.name, consumer.projection_class.name}
        if name in names or name in {f"{consumer.host.application_name}.{each}" for each in names}:
            found.append(consumer)
    if not found:
        raise click.ClickException(f"There is no projection {name!r}. {registered(consumers)}")
    applications = list(dict.fromkeys(consumer.host.application_name for consumer in found))
    if len(applications) > 1:
        choices = " or ".join(f"{application}.{name}" for application in applications)
        raise click.ClickException(f"Several applications have a projection {name!r}: say {choices}.")
    return found


def registered(consumers: Sequence[Consumer]) -> str:
    """Return a sentence with the names that can be given."""
    if not consumers:
        return "No projection is registered: decorate a class with @es.projection(of=…)."
    names = [consumer.name for consumer in consumers]
    shown = [qualified(each) if names.count(each.name) > 1 else each.name for each in consumers]
    return f"Registered: {', '.join(shown)}."


def as_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table of text; columns whose cells are all numbers are set to the right."""
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(len(cell) for cell in column) for column in columns]
    numbers = [all(cell[:1].isdigit() or cell == "-" for cell in column[1:]) for column in columns]

    def line(cells: Sequence[str]) -> str:
        parts = zip(cells, widths, numbers, strict=True)
        return "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in parts).rstrip()

    return "\n".join(line(row) for row in (heads, *rows))
