"""The commands of every host: what they do and print. Each host reads the command line itself.

A host makes a :class:`Subject` and calls a command with it and an :class:`Output`. A command returns the exit status,
or raises a :class:`CommandError`.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol, TextIO

import sqlalchemy as sa
from eventsourcing.application import Application
from eventsourcing.persistence import PersistenceError

from ..applications.apart import EventStore
from ..exceptions import FlaskEventSourcingError
from ..persistence import Datastore
from ..persistence.dialects import (
    Dialect,
    dialect_for,
    has_waited,
    hide_values,
    is_full,
    is_outage,
    is_serialization_failure,
    without_values,
)
from ..projections.consumers import Consumer
from ..projections.registry import BoundProjections, PlainProjections


@dataclass(frozen=True)
class Subject:
    """The databases, applications and projections on which commands work.

    A program on ``PlainHost`` makes one with :meth:`of_plain_host`.

    :param commit_mode: who commits, as ``check`` tells it.
    :param datastore: the database of the events, or None where they are apart, and there are no projections.
    :param application_tables: the tables of applications, each with the application's name.
    :param applications: returns the applications of this process by their names; may construct them.
    :param elsewhere: the tables that are in another database than the datastore's, with that database.
    :param store: where the events are, when they are apart.
    :param program: how the user calls the commands, if no datastore knows it.
    """

    commit_mode: str
    datastore: Datastore | None
    application_tables: Sequence[tuple[str, sa.Table]]
    applications: Callable[[], Mapping[str, Application[Any]]]
    projections: BoundProjections
    elsewhere: Mapping[sa.Table, sa.Engine] = field(default_factory=dict)
    store: EventStore | None = None
    program: str = ""

    @classmethod
    def of_plain_host(cls, projections: PlainProjections) -> Subject:
        """Return the subject of commands in a program on a ``PlainHost``.

        They see the projections, and the applications that the host has.
        """
        host = projections.host
        models = {application_class.name: each for application_class, each in host.models.items()}
        return cls(
            commit_mode="explicit",
            datastore=host.datastore,
            application_tables=[(name, table) for name, each in models.items() for table in each.tables.values()],
            applications=lambda: {cls.name: application for cls, application in host.applications.items()},
            projections=projections,
        )

    def command(self, words: str) -> str:
        """Return how messages name a command."""
        return f"{self.program} {words}" if self.datastore is None else self.datastore.dialect.command(words)

    @property
    def database(self) -> Datastore:
        """The database of the events.

        :raises CommandError: when there is none.
        """
        if self.datastore is None:
            raise CommandError("The events are not in a database of SQLAlchemy, which this command needs.")
        return self.datastore

    def engine_of(self, table: sa.Table) -> sa.Engine:
        """Return the database that has a table."""
        return self.elsewhere.get(table, self.database.engine)

    def dialect_of(self, engine: sa.Engine) -> Dialect:
        """Return the dialect of a database."""
        store = self.database
        return store.dialect if engine is store.engine else dialect_for(engine, store.options)

    def engines(self) -> list[sa.Engine]:
        """Return the databases; the one of the first application comes first."""
        own = [] if self.datastore is None else [self.datastore.engine]
        return list(dict.fromkeys([*own, *self.elsewhere.values()]))

    def tables(self) -> list[tuple[str, sa.Table]]:
        """Return the tables of applications, then those of projections, each with its owner."""
        known = {table for _, table in self.application_tables}
        further = [("Projections", table) for table in self.projections.tables() if table not in known]
        return [*self.application_tables, *further]

    def consumers(self) -> list[Consumer]:
        """Return the consumers that workers run, and inline projections, in the order of their registration."""
        return list(self.projections)


class CommandError(Exception):
    """A command failed. The message is for the user, without a traceback."""

    exit_status: ClassVar[int] = 1


class UsageError(CommandError):
    """A command was called in a way that makes no sense."""

    exit_status = 2


class UnreachableError(CommandError):
    """The database failed in a transient way; the cause is the database's error."""


class Bar(Protocol):
    """A progress bar on a terminal."""

    def move(self, position: int, length: int, note: str) -> None:
        """Show the progress, with a note beside it; the length may change."""

    def finish(self) -> None:
        """End its line."""


class Output(Protocol):
    """Where a command prints and asks questions; each host has its own."""

    def write(self, text: str) -> None:
        """Print lines on standard output."""

    def confirm(self, question: str) -> bool:
        """Ask whether to go on. Instead of returning False, a host may raise an error that ends the program."""

    def bar(self, length: int, label: str) -> Bar | None:
        """Show a progress bar, or return None if there is no terminal."""


class PlainOutput:
    """An output for hosts that have none of their own. It has no progress bar.

    :param stream: where it prints, standard output unless told otherwise.
    """

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream

    def write(self, text: str) -> None:
        """Print lines."""
        # Looked up each time, because other code may have replaced it. It is None if it was closed.
        stream = self._stream or sys.stdout
        if stream is None:
            return
        try:
            stream.write(f"{encodable(text, stream)}\n")
            stream.flush()
        except BrokenPipeError:
            # The reader has closed the pipe, as 'head' does. Otherwise Python would write to it again at its end.
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            raise SystemExit(1) from None

    def confirm(self, question: str) -> bool:
        """Ask on standard input; any answer but yes, and the end of the input, means no."""
        try:
            return input(f"{question} [y/N]: ").strip().lower() in ("y", "yes")
        except EOFError:
            return False

    def bar(self, length: int, label: str) -> Bar | None:
        """Return None: log lines show the progress."""


def encodable(text: str, stream: Any) -> str:
    """Return a text with escapes in the place of what the encoding of a stream lacks."""
    encoding = getattr(stream, "encoding", None)
    return text.encode(encoding, "backslashreplace").decode(encoding) if encoding else text


def has_terminal() -> bool:
    """Whether standard error is a terminal; it is None where it was closed."""
    return bool(sys.stderr and sys.stderr.isatty())


def missing_tables(subject: Subject) -> list[sa.Table]:
    """Return the tables that are missing in the database.

    :raises CommandError: when the database cannot be reached.
    """
    with clear_errors():
        inspectors = {engine: sa.inspect(engine) for engine in subject.engines()}
        tables = [table for _, table in subject.tables()]
        return [t for t in tables if not inspectors[subject.engine_of(t)].has_table(t.name, schema=t.schema)]


def require_tables(subject: Subject) -> None:
    """Check that every table exists.

    :raises CommandError: naming those that are missing, and the remedy.
    """
    missing = missing_tables(subject)
    if missing:
        names = ", ".join(table.fullname for table in missing)
        raise CommandError(f"Tables are missing ({names}): {remedy_of_missing(subject)}.")


def remedy_of_missing(subject: Subject) -> str:
    """Return the remedy for missing tables."""
    return f"run {subject.command('init-db')} or your migrations"


@contextmanager
def clear_errors() -> Iterator[None]:
    """Turn errors of the database and of this package into a ``CommandError``, which is shown without a traceback."""
    try:
        yield
    except (sa.exc.SQLAlchemyError, PersistenceError, FlaskEventSourcingError) as error:
        error_class = UnreachableError if is_outage(error) else CommandError
        raise error_class(message_of(error)) from error


def message_of(error: Exception) -> str:
    """Return the message for an error."""
    # The driver's own words, without the statement, its values and the address of a manual.
    hide_values(error)
    driver_error = getattr(error, "orig", None)
    text = str(error).strip() if driver_error is None else without_values(driver_error)
    if is_serialization_failure(error) or has_waited(error):
        return f"Another transaction was in the way: {text.rstrip('.')}. Run the command again."
    if is_full(error):
        return f"The database has no room to write: {text.rstrip('.')}. Free some, and run the command again."
    if is_outage(error):
        return f"The database cannot be reached: {text}"
    return text if isinstance(error, FlaskEventSourcingError) else f"{type(error).__name__}: {text}"


def qualified(consumer: Consumer, name: str | None = None) -> str:
    """Return the name that also tells the application."""
    return f"{consumer.application.name}.{name or consumer.name}"


def named(consumers: Sequence[Consumer], name: str) -> list[Consumer]:
    """Return the consumers with a name: a projection with its reactions, or reactions alone.

    If several applications have one with that name, put the application's name before it: ``Bank.Balances``.

    :raises CommandError: when there is none, or there are several.
    """
    found = []
    for consumer in consumers:
        names = {consumer.name, consumer.projection_class.name}
        if name in names or name in {qualified(consumer, each) for each in names}:
            found.append(consumer)
    if not found:
        raise CommandError(f"There is no projection {name!r}. {registered(consumers)}")
    choices = list(dict.fromkeys(qualified(consumer, name) for consumer in found))
    if len(choices) > 1:
        raise CommandError(f"Several applications have a projection {name!r}: write {' or '.join(choices)}.")
    return found


def registered(consumers: Sequence[Consumer]) -> str:
    """Return a sentence with the names that can be given."""
    if not consumers:
        return "No projection is registered: register its class, in a Flask app with @es.projection(of=…)."
    names = [consumer.name for consumer in consumers]
    shown = [qualified(each) if names.count(each.name) > 1 else each.name for each in consumers]
    return f"Registered: {', '.join(shown)}."


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``1 dead letter``, ``2 dead letters``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def as_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return rows as a table of text; columns whose cells are all numbers are set to the right."""
    return TextTable(heads).add(rows)


class TextTable:
    """A table of text that is printed in parts: its columns grow if a later part needs it."""

    def __init__(self, heads: Sequence[str]) -> None:
        self._heads: Sequence[str] | None = heads
        self._widths = [len(head) for head in heads]

    def add(self, rows: Sequence[Sequence[str]]) -> str:
        """Return the lines of some rows, those of the heads before the first of them."""
        columns = list(zip(*rows, strict=True)) or [()] * len(self._widths)
        numbers = [all(cell[:1].isdigit() or cell == "-" for cell in column) for column in columns]
        pairs = zip(self._widths, columns, strict=True)
        self._widths = [max((width, *map(len, column))) for width, column in pairs]
        shown = rows if self._heads is None else (self._heads, *rows)
        self._heads = None

        def line(cells: Sequence[str]) -> str:
            parts = zip(cells, self._widths, numbers, strict=True)
            return "  ".join(c.rjust(width) if right else c.ljust(width) for c, width, right in parts).rstrip()

        return "\n".join(line(row) for row in shown)
