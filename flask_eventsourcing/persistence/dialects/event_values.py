"""Checks that every database returns values and names as they were stored, and describes rows that cannot be read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, NamedTuple, NoReturn
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import Notification, Tracking
from sqlalchemy import orm

from ...config import is_plain
from ...exceptions import ConfigurationError, EventValueError, IdentifierTypeError, UnreadableEventError

LONGEST_ID = 600
"""The most characters of a text id whose column has no limit: an index of PostgreSQL's takes 2,704 bytes."""
LONGEST_TOPIC = 16_383
"""The most characters of a topic: a TEXT column of MySQL's has 65,535 bytes, and a character up to four."""
LONGEST_NAME = 255
LARGEST = 2**63 - 1
NOT_PLAIN = "has control characters, line breaks or unpaired surrogates"


def bounded(number: int | None) -> int | None:
    """Return a bound of versions or positions that every driver takes, and that selects the same ones."""
    return None if number is None else max(-1, min(number, LARGEST))


def printable(text: str) -> str:
    """Return a text in which characters that end a line, or control a terminal, are escapes."""
    if is_plain(text):
        return text
    return "".join(each if is_plain(each) else each.encode("unicode_escape").decode() for each in text)


def shown_id(value: Any) -> str:
    """Return a text that shows an id that cannot be read."""
    return printable(value if isinstance(value, str) else str(value))[:LONGEST_NAME]


def as_bytes(state: Any) -> bytes:
    """Return a state that a driver gives in another class.

    :raises TypeError: when it is no binary value.
    """
    # From an int, ``bytes()`` would make as many zeros.
    if isinstance(state, bytes | bytearray | memoryview):
        return bytes(state)
    raise TypeError(f"its state is of type {type(state).__name__} and not binary")


def as_text(value: Any) -> str:
    """Return an id that is a text.

    :raises TypeError: when it is none.
    """
    if isinstance(value, str):
        return value
    raise TypeError(f"its id is of type {type(value).__name__} and not text")


@dataclass(frozen=True)
class Accepted:
    """The values that the columns of a table accept, so that each database returns them unchanged.

    :param name: the name of the table in messages.
    """

    name: str
    id_class: type[UUID] | type[str]
    longest_id: int = LONGEST_ID
    longest_topic: int = LONGEST_TOPIC
    latest_version: int = LARGEST

    @classmethod
    def by(cls, name: str, originator_id: Any, version: Any, topic: Any) -> Accepted:
        """Return the accepted values of columns, by their types on all databases: what fits one fits the others."""
        is_text = isinstance(originator_id, sa.String)
        return cls(
            name,
            str if is_text else UUID,
            getattr(originator_id, "length", None) or LONGEST_ID,
            min(getattr(topic, "length", None) or LONGEST_TOPIC, LONGEST_TOPIC),
            _largest(version),
        )

    def values(self, values: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return an event's values, in the order of ``EVENT_COLUMNS``, in classes that every driver knows.

        :raises IdentifierTypeError: for an id of another type than those of the table.
        :raises EventValueError: for any other value that cannot be stored and read back.
        """
        originator_id: Any = values[0]
        id_class: type[Any] = type(originator_id)
        _, version, topic, state = values[:4]
        if (
            type(state) is bytes
            and type(version) is int
            and 0 <= version <= self.latest_version
            and type(topic) is str
            and topic.isprintable()
            and 0 < len(topic) <= self.longest_topic
            and id_class is self.id_class
            and (self.id_class is UUID or (0 < len(originator_id) <= self.longest_id and originator_id.isprintable()))
        ):
            return values
        return (self.id(originator_id), self._version(version), self._topic(topic), self._state(state), *values[4:])

    def id(self, found: Any) -> Any:
        """Return an aggregate's id.

        :raises IdentifierTypeError: for a text where ids are UUIDs, and the reverse.
        :raises EventValueError: for a text that cannot be stored.
        """
        if not isinstance(found, self.id_class):
            self._refuse_id(found)
        return found if isinstance(found, UUID) else self._text("id of an aggregate", found, self.longest_id)

    def _refuse_id(self, found: object) -> NoReturn:
        remedy = "pass str(…), or set EVENTSOURCING_ORIGINATOR_ID_TYPE to 'uuid'"
        if self.id_class is UUID:
            remedy = "pass uuid.UUID(…), and declare <uuid:id> in a route that has it in its address"
        expected = "UUIDs" if self.id_class is UUID else "texts"
        raise IdentifierTypeError(f"The ids in {self.name} are {expected}; found {type(found).__name__}: {remedy}.")

    def _version(self, found: Any) -> int:
        if not isinstance(found, int) or isinstance(found, bool):
            self._refuse("version of an event", f"is of type {type(found).__name__}, and must be an int")
        if not 0 <= found <= self.latest_version:
            self._refuse("version of an event", f"must be from 0 to {self.latest_version}")
        return int(found)

    def _topic(self, found: Any) -> str:
        if not isinstance(found, str):
            self._refuse("topic of an event", f"is of type {type(found).__name__}, and must be a string")
        return self._text("topic of an event", found, self.longest_topic)

    def _state(self, found: Any) -> bytes:
        if isinstance(found, bytes | bytearray | memoryview):
            return bytes(found)
        text = f"is of type {type(found).__name__}, and must be bytes: let the transcoder, or the mapper, return bytes"
        return self._refuse("state of an event", text)

    def _text(self, what: str, found: str, longest: int) -> str:
        if not found:
            self._refuse(what, "is empty")
        if len(found) > longest:
            self._refuse(what, f"has {len(found)} characters, and {longest} can be stored")
        if not is_plain(found):
            self._refuse(what, NOT_PLAIN)
        # For a subclass, such as an enumeration, some drivers would store another value.
        return str.__str__(found)

    def _refuse(self, what: str, text: str) -> NoReturn:
        raise EventValueError(f"The {what} for {self.name} {text}.")


def _largest(version: Any) -> int:
    if isinstance(version, sa.SmallInteger):
        return 2**15 - 1
    return 2**31 - 1 if isinstance(version, sa.Integer) and not isinstance(version, sa.BigInteger) else LARGEST


def check_tracking(tracking: Tracking) -> None:
    """Check a position of an upstream application.

    :raises EventValueError: for a name or a position that cannot be stored and read back.
    """
    name: Any = tracking.application_name
    position: Any = tracking.notification_id
    if not isinstance(name, str) or not 0 < len(name) <= LONGEST_NAME or not is_plain(name):
        raise EventValueError(f"The name of an upstream application must be text of 1 to {LONGEST_NAME} characters.")
    if not isinstance(position, int) or isinstance(position, bool) or not 0 <= position <= LARGEST:
        raise EventValueError(f"The position of an upstream application must be an int from 0 to {LARGEST}.")


@dataclass(frozen=True)
class UnreadableNotification(Notification):
    """Stands for a row of the log that cannot be read: its id as a text, its version and topic if it has them."""

    error: UnreadableEventError

    @classmethod
    def of(cls, name: str, row: tuple[Any, ...], error: Exception) -> UnreadableNotification:
        """Make it of a row of the table *name*, with the position before the columns of an event."""
        position, originator_id, version, topic = row[:4]
        return cls(
            originator_id=shown_id(originator_id),
            originator_version=version if isinstance(version, int) else 0,
            topic=topic if isinstance(topic, str) else "",
            state=b"",
            id=position,
            error=UnreadableEventError(f"The event at position {position} of {name} {_cannot(error)}"),
        )


class DamagedPage(list[Notification]):
    """A page of the log in which some rows could not be read."""

    def before_damage(self) -> list[Notification]:
        """Return the notifications before the first of these rows.

        :raises UnreadableEventError: when it is the first of the page.
        """
        if isinstance(self[0], UnreadableNotification):
            raise self[0].error
        return self[: next(n for n, each in enumerate(self) if isinstance(each, UnreadableNotification))]


def unreadable_version(name: str, originator_id: Any, version: Any, error: Exception) -> UnreadableEventError:
    """Return the error of an aggregate's event that cannot be read."""
    return UnreadableEventError(
        f"Version {version} of aggregate {printable(str(originator_id))} in {name} {_cannot(error)}"
    )


def _cannot(error: Exception) -> str:
    # The text of another package's error may contain the value.
    why = str(error) if isinstance(error, TypeError) else "its id is no UUID"
    return f"cannot be read: {why}. Another program wrote it: correct the row, or delete it."


def check_names(tables: Iterable[sa.Table], title: str, longest: int, counted: str) -> None:
    """Check that the names of tables, and of what belongs to them, are not too long for a database.

    :param counted: what its limit counts: ``bytes`` or ``characters``.
    :raises ConfigurationError: for one that is.
    """
    for table in tables:
        parts = [*table.columns, *table.constraints, *table.indexes]
        for name in [str(each) for each in (table.name, table.schema, *(part.name for part in parts)) if each]:
            length = len(name.encode() if counted == "bytes" else name)
            if length > longest:
                raise ConfigurationError(
                    f"{title} takes names of {longest} {counted}, and {name!r} has {length}: give the application "
                    "another class attribute 'name', or your record class a shorter __tablename__."
                )


def as_parameter(quoted: str) -> str:
    """Return a name, quoted for a driver whose placeholders begin with a percent sign, as the value of a parameter."""
    return quoted.replace("%%", "%")


Check = Callable[[Any], bool]
"""A function that tells whether a column takes a value, other than None, and returns it unchanged."""


def check_of(column: sa.ColumnElement[Any]) -> Check | None:
    """Return such a function for a column, or None if the column may change or refuse any value.

    For times, it does not tell whether the database keeps their microseconds.
    """
    kind = column.type
    if isinstance(kind, _CHANGING):
        return None
    return next((make(kind) for found, make in _CHECKS if isinstance(kind, found)), None)


def is_one(expected: type[Any]) -> Check:
    """Return a function that tells whether a value is of a class, and not of a subclass."""
    return lambda value: type(value) is expected


def _whole(kind: Any) -> Check:
    bits = 64 if isinstance(kind, sa.BigInteger) else 16 if isinstance(kind, sa.SmallInteger) else 32
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    return lambda value: type(value) is int and low <= value <= high


def _text(kind: Any) -> Check:
    longest = min(kind.length or LONGEST_TOPIC, LONGEST_TOPIC)
    # Not every database takes a NUL or half a surrogate pair, and neither is printable.
    return lambda value: type(value) is str and len(value) <= longest and value.isprintable()


def _binary(kind: Any) -> Check:
    longest = min(kind.length or LONGEST_TOPIC, LONGEST_TOPIC)
    return lambda value: type(value) is bytes and len(value) <= longest


def _moment(kind: Any) -> Check | None:
    if kind.timezone:
        return None
    return lambda value: type(value) is datetime and value.tzinfo is None and value.year >= EARLIEST_YEAR


EARLIEST_YEAR = 1000
"""The year in which the times of MySQL begin."""
_CHANGING = (sa.Enum, sa.CHAR, sa.NCHAR, sa.TIMESTAMP)
"""Types whose values come back padded or in another class, or that have a shorter range."""
_CHECKS: tuple[tuple[type[Any], Callable[[Any], Check | None]], ...] = (
    (sa.Integer, _whole),
    (sa.Boolean, lambda kind: is_one(bool)),
    (sa.String, _text),
    (sa.Uuid, lambda kind: is_one(UUID)),
    (sa.LargeBinary, _binary),
    (sa.DateTime, _moment),
)


class PlainColumn(NamedTuple):
    """A column of a plain class."""

    key: str
    name: str
    """Its name in the table, in lower case."""
    check: Check
    may_lack: bool
    """Whether a row can be stored without a value for it."""
    is_key: bool
    attribute: Any


def plain_columns(model: type[Any], uuid_type: type[Any]) -> Sequence[PlainColumn] | None:
    """Return the columns of a class whose rows are stored as they are, or None if its model does more.

    The checks of the database are not considered.

    :param uuid_type: a further type of columns with UUIDs.
    """
    mapper = sa.inspect(model, raiseerr=False)
    if not isinstance(mapper, orm.Mapper) or not isinstance(mapper.local_table, sa.Table):
        return None
    if not _has_columns_alone(mapper, mapper.local_table):
        return None
    found = [_plain_column(each, uuid_type) for each in mapper.column_attrs]
    return None if None in found else [each for each in found if each is not None]


def _has_columns_alone(mapper: orm.Mapper[Any], table: sa.Table) -> bool:
    """Whether a model does nothing more than store its columns."""
    listeners = (getattr(mapper.dispatch, f"{when}_{what}") for when in ("before", "after") for what in _OPERATIONS)
    return not (
        mapper.relationships
        or mapper.inherits
        or mapper.polymorphic_on is not None
        or mapper.version_id_col is not None
        or any(len(listener) for listener in listeners)
        or any(key.onupdate for key in _keys_to(table))
    )


def _plain_column(mapped: orm.ColumnProperty[Any], uuid_type: type[Any]) -> PlainColumn | None:
    column = mapped.columns[0]
    if len(mapped.columns) > 1 or not isinstance(column, sa.Column):
        return None
    check = is_one(UUID) if isinstance(column.type, uuid_type) else check_of(column)
    if check is None or (column.onupdate, column.server_onupdate, column.computed) != (None, None, None):
        return None
    has_default = column.default is not None or column.server_default is not None
    may_lack = bool(column.nullable or column.primary_key or has_default)
    return PlainColumn(mapped.key, column.name.lower(), check, may_lack, column.primary_key, mapped.class_attribute)


_OPERATIONS = ("insert", "update", "delete")


def _keys_to(table: sa.Table) -> Iterator[sa.ForeignKeyConstraint]:
    for other in table.metadata.tables.values():
        yield from (key for key in other.foreign_key_constraints if key.referred_table is table)
