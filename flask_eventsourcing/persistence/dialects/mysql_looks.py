"""MariaDB and MySQL: the checks before the first append or read, and the limits of statements."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext, suppress
from functools import cached_property
from typing import Any, ClassVar, TypeVar
from uuid import UUID

import sqlalchemy as sa
from eventsourcing.persistence import DataError, PersistenceError, StoredEvent
from sqlalchemy.dialects import mysql
from sqlalchemy.engine import Connection, Engine
from sqlalchemy.engine import Dialect as SQLAlchemyDialect

from ...config import DialectOptions
from ...exceptions import IdentifierTypeError, MissingTableError, UnsafeSettingError
from .base import Dialect
from .calls import BLOCK, root_engine
from .event_tables import POSITION, VERSION, EventTable, begins, gap
from .looks import APPEND, USES, Finding, FoundColumn, FoundTable, Seen, keys_of

T = TypeVar("T")
# The default collations take "Ada" for "ada", and some "é" for "e".
EXACT = "utf8mb4_bin"
ORDER = "__order__"
"""The name of the row that counts the positions."""
EXACT_UNPADDED = {True: "utf8mb4_nopad_bin", False: "utf8mb4_0900_bin"}
"""Those that do not take "Ada " for "Ada", by whether it is MariaDB."""
ESCAPED = b"\\'\"\0\n\r\x1a"
"""What has two bytes in the text of a statement."""
NO_LIMIT = 2**63 - 1
"""What ``sql_select_limit`` has at least where it does not limit: its default is this or, on 64 bits, twice as much."""
LEVEL = "flask_eventsourcing.level"
"""Where a connection of the driver has its isolation level."""
BLOCKS = "flask_eventsourcing.blocks"
"""Where it has whether the server runs blocks."""
OF_ROW = 100
"""The bytes of a statement beside those of a row's ids, topics and states."""
OF_STATEMENT = 3000
MOST_PLACES = 1024
"""Aggregates with a conflict of which the place is known where the next tries queue."""


APPEND_ONE = (
    BLOCK
    + """
DECLARE is_next BOOLEAN;
{draw};
SELECT IF(ROW_COUNT(), {condition}, NULL) INTO is_next;
IF is_next THEN {into} VALUES (LAST_INSERT_ID(){marks}); END IF;
SELECT LAST_INSERT_ID(), is_next;
END"""
)
"""What draws a position and inserts an event with it; where there is no row that counts, the second value is NULL.

A read that is not part of the INSERT locks nothing.
"""


class ExactText(sa.types.TypeDecorator[str]):
    """Text of up to 255 characters that is compared exactly: case, accents, and spaces at the end."""

    impl: sa.types.TypeEngine[Any] | type[sa.types.TypeEngine[Any]] = sa.String
    cache_ok: bool | None = True

    def __init__(self) -> None:
        super().__init__(255)

    def load_dialect_impl(self, dialect: SQLAlchemyDialect) -> sa.types.TypeEngine[Any]:
        """Return the type with a collation of the server's."""
        is_mariadb = bool(getattr(dialect, "is_mariadb", False))
        return mysql.VARCHAR(255, collation=EXACT_UNPADDED[is_mariadb])

    def __repr__(self) -> str:
        return "ExactText()"


_nodes: weakref.WeakKeyDictionary[Engine, bool] = weakref.WeakKeyDictionary()
_places: weakref.WeakKeyDictionary[Engine, dict[tuple[str, Any], int]] = weakref.WeakKeyDictionary()
"""The position of an aggregate's first event, by the table's name and the id."""


class MySQLLooks(Dialect):
    """The part of the dialect that looks, and that queues for aggregates."""

    equal_families: ClassVar[frozenset[frozenset[str]]] = frozenset(
        frozenset(pair) for pair in (("text", "uuid"), ("truth", "integer"), ("json", "text"), ("number", "integer"))
    )

    def __init__(self, engine: Engine, options: DialectOptions) -> None:
        super().__init__(engine, options)
        self._places: dict[tuple[str, Any], int] = _places.setdefault(root_engine(engine), {})

    def scope(self, connection: Connection) -> Any:
        """Return the database."""
        return self.fetch(connection, "SELECT DATABASE()")[0][0]

    def found_settings(self, connection: Connection, seen: Seen) -> Iterable[Finding]:
        """Look at the modes of the session."""
        is_mariadb = bool(getattr(self.engine.dialect, "is_mariadb", False))
        isolation = "@@tx_isolation" if is_mariadb else "@@transaction_isolation"
        settings = f"@@sql_mode, {isolation}, @@max_allowed_packet, @@sql_select_limit"
        mode, level, seen.longest, most = self.fetch(connection, f"SELECT {settings}")[0]
        # Asked now, while there is a connection: the next caller may hold the last one of the pool.
        is_node = self.is_node(connection)
        connection.info[BLOCKS] = is_mariadb and not is_node and "ORACLE" not in mode
        if "STRICT_TRANS_TABLES" not in mode and "STRICT_ALL_TABLES" not in mode:
            text = (
                "The session's sql_mode is not strict, so the server would truncate ids and events that are too long: "
                "add STRICT_TRANS_TABLES to the server's sql_mode, or to the engine's, with "
                "SQLALCHEMY_ENGINE_OPTIONS = {'connect_args': {'init_command': \"SET sql_mode = 'TRADITIONAL'\"}}."
            )
            yield Finding(text, APPEND, UnsafeSettingError)
        level = connection.info[LEVEL] = level.replace(" ", "-").upper()
        if level == "READ-UNCOMMITTED":
            text = "With the isolation level READ UNCOMMITTED readers would see events that are rolled back later"
            yield Finding(f"{text}: use READ COMMITTED or REPEATABLE READ.", USES, UnsafeSettingError)
        if int(most) < NO_LIMIT:
            text = f"The session's sql_select_limit is {most}, so that longer streams would be read without their end"
            yield Finding(f"{text}: SET sql_select_limit = DEFAULT.", USES, UnsafeSettingError)

    def is_node(self, connection: Connection | None = None) -> bool:
        """Ask the server, once for each engine, whether it replicates with Galera."""
        found = _nodes.get(self.engine)
        if found is None:
            with nullcontext(connection) if connection is not None else self.engine.connect() as used:
                answer = self.fetch(used, "SHOW VARIABLES LIKE 'wsrep_on'")
            found = _nodes[self.engine] = bool(answer) and answer[0][1] == "ON"
        return found

    def found_table(self, connection: Connection, table: sa.Table) -> FoundTable | None:
        """Return a table as the server's schema has it."""
        schema = self.schema_of(connection, table) or self.scope(connection)
        place = (schema, table.name)
        where = "WHERE TABLE_SCHEMA = %s AND TABLE_NAME = %s"
        tables = self.fetch(connection, f"SELECT ENGINE FROM information_schema.TABLES {where}", place)
        if not tables:
            return None
        names = "COLUMN_NAME, COLUMN_TYPE, IS_NULLABLE, COLUMN_DEFAULT, EXTRA, COLLATION_NAME"
        rows = self.fetch(connection, f"SELECT {names} FROM information_schema.COLUMNS {where}", place)
        columns = {
            name: FoundColumn(name, _text(kind), nullable == "YES", default is not None or bool(extra), collation)
            for name, kind, nullable, default, extra, collation in rows
        }
        names = "SELECT INDEX_NAME, COLUMN_NAME FROM information_schema.STATISTICS"
        keys = keys_of(self.fetch(connection, f"{names} {where} AND NON_UNIQUE = 0", place))
        return FoundTable(columns, tables[0][0], keys=keys)

    def is_there(self, connection: Connection, table: sa.Table) -> bool:
        """Ask whether it is there, and no more."""
        where = "TABLE_SCHEMA = coalesce(%s, DATABASE()) AND TABLE_NAME = %s"
        place = (self.schema_of(connection, table), table.name)
        return bool(self.fetch(connection, f"SELECT 1 FROM information_schema.TABLES WHERE {where}", place))

    def beside_snapshots(
        self, connection: Connection, table: EventTable, events: Sequence[StoredEvent], work: Callable[[bool], T]
    ) -> tuple[bool, T]:
        """Call work that is to open the snapshots too if they are read before these events; return whether it did so.

        That there is a table of them is remembered until a tenant has none: the work fails once then, before it has
        changed anything, and the server is asked each time.
        """
        if table.snapshots in self._with_snapshots and any(map(begins, events)):
            with suppress(MissingTableError):
                return True, work(True)
            self._tenants_differ = True
            self._with_snapshots.clear()
        snapshots = self.needs_snapshots(connection, table, events)
        done = work(snapshots)
        if snapshots and table.snapshots is not None and not self._tenants_differ:
            self._with_snapshots.add(table.snapshots)
        return snapshots, done

    _tenants_differ: bool = False

    @cached_property
    def _with_snapshots(self) -> set[str]:
        return set()

    def found_more(self, connection: Connection, table: sa.Table, found: FoundTable) -> list[Finding]:
        """Look at the engine, and at the collation of text ids."""
        findings = []
        name = self.name_of(connection, table)
        if (found.engine or "").upper() != "INNODB":
            text = f"Table {table.fullname} has the engine {found.engine}, which cannot roll back"
            findings.append(Finding(f"{text}: ALTER TABLE {name} ENGINE=InnoDB.", APPEND))
        column = found.columns.get("originator_id")
        if VERSION in table.c and column is not None and isinstance(table.c.originator_id.type, sa.String):
            collation = column.collation or "binary"
            if not (collation.endswith("_bin") or collation == "binary"):
                text = f"{table.fullname}.originator_id has the collation {collation}, where different ids are equal"
                kind = f"{column.kind} CHARACTER SET utf8mb4 COLLATE {self._unpadded()}"
                findings.append(Finding(f"{text}: ALTER TABLE {name} MODIFY originator_id {kind} NOT NULL.", USES))
            elif self._is_padded(collation):
                text = f"{table.fullname}.originator_id has the collation {collation}, which ignores spaces at the end"
                text += f", so that ids with such spaces are refused; {self._unpadded()} does not"
                findings.append(Finding(f"{text}.", is_fault=False, error=IdentifierTypeError))
        return findings

    def _unpadded(self) -> str:
        return EXACT_UNPADDED[bool(getattr(self.engine.dialect, "is_mariadb", False))]

    @staticmethod
    def _is_padded(collation: str) -> bool:
        return collation != "binary" and "nopad" not in collation and "0900" not in collation

    def refuse_padded(self, connection: Connection, table: EventTable, ids: Iterable[UUID | str]) -> None:
        """Refuse text ids with spaces at the end where the column takes them for those without.

        :raises IdentifierTypeError: for such an id.
        """
        if not any(each.endswith(" ") for each in ids if isinstance(each, str)):
            return
        for key, findings in self.looked_at.items():
            if key[1] == table.name and (
                text := next((f.text for f in findings if f.error is IdentifierTypeError), "")
            ):
                raise IdentifierTypeError(f"An id ends with a space: {text}")

    def counter_of(self, table: EventTable) -> str:
        """Return the name of the table whose row counts the positions."""
        if table.counter is None:
            raise MissingTableError(f"The recorder of {table.name} was made without a tracking table, which counts.")
        return table.counter

    @staticmethod
    def runs_blocks(connection: Connection) -> bool:
        """Whether the server runs a block of statements that is sent as one; Oracle's are of another grammar.

        On a node of a cluster, where another one may end the transaction between two of them, each is sent by itself.
        """
        return bool(connection.info.get(BLOCKS))

    @staticmethod
    def reads_latest(connection: Connection) -> bool:
        """Whether each statement sees what is committed by then, and INSERT … SELECT locks nothing that it reads.

        As it was when the connection was looked at first; a level that a transaction has for itself may lock more.
        """
        return connection.info.get(LEVEL) == "READ-COMMITTED"

    def check_gap(
        self, connection: Connection, table: EventTable, first: Sequence[StoredEvent], count: int, *, snapshots: bool
    ) -> None:
        """Refuse events that would leave a gap, and give their positions back.

        :raises IntegrityError: for such an event.
        """
        # Not before the positions are drawn: the read makes a snapshot, and what waits for the counting row with one
        # would find there what it must not see. A snapshot that is older than what others have stored since may lack
        # the predecessor, which a locking read finds.
        missing = self.find_gap(connection, table, first, "", snapshots=snapshots)
        if missing is not None:
            missing = self.find_gap(connection, table, first, " LOCK IN SHARE MODE", snapshots=snapshots)
        if missing is not None:
            # The row is locked, so no other transaction has seen the positions.
            back = "SET notification_id = notification_id - %s WHERE application_name = %s"
            self.modify(connection, f"UPDATE {self.counter_of(table)} {back}", (count, ORDER))
            raise gap(missing)

    # ------------------------------------------------------------------------------------------ queues for aggregates

    def note_places(self, connection: Connection, table: EventTable, events: Sequence[StoredEvent]) -> None:
        """After a conflict, note the position of each aggregate's first event, at which the next tries queue.

        Later it could be read only with a snapshot, or with a lock that keeps others waiting.
        """
        for originator_id in {event.originator_id for event in events}:
            encoded = table.encode_id(originator_id)
            statement = f"SELECT min({POSITION}) FROM {table.name} WHERE originator_id = %s"
            # The caller is told of the conflict, and not of what became of its connection since.
            with suppress(PersistenceError):
                position = self.fetch(connection, statement, (encoded,))[0][0]
                if position is not None:
                    self._places[table.name, encoded] = position
            while len(self._places) > MOST_PLACES:
                self._places.pop(next(iter(list(self._places))), None)

    def queue_for(self, connection: Connection, table: EventTable, originator_id: UUID | str, *, wait: bool) -> None:
        """Lock its first event by the position; a locking read makes no snapshot, so what follows reads the latest.

        Nobody who appends wants that lock. Of the key of ids and versions InnoDB would lock the gap too, where others
        append to another aggregate, or the row that others try to insert as well: they have the counting row that
        this unit will want, and of the two it would be ended each time. Where the position is not known, as after a
        conflict at the commit in a cluster, the second event is locked so, if there is one.
        """
        if not wait:
            return
        table = self.located(connection, table)
        encoded = table.encode_id(originator_id)
        place = self._places.get((table.name, encoded))
        if place is not None:
            self.fetch(connection, f"SELECT 1 FROM {table.name} WHERE {POSITION} = %s FOR UPDATE", (place,))
            return
        statement = f"SELECT 1 FROM {table.name} WHERE originator_id = %s AND {VERSION} = 2 FOR UPDATE"
        self.fetch(connection, statement, (encoded,))

    def opening(self, table: EventTable, *, snapshots: bool) -> tuple[str, str]:
        """Return what lets a statement on the counting row open the tables first that are read or written after it.

        Without it, a writer has the row and waits for a table that a migration is about to change, the migration for
        a transaction that has read the table, and that for the row: nobody sees this deadlock, and all of them wait
        for the end of a timeout. None of their rows is read or locked.

        :returns: what follows the row's table, which is called c, and what follows the condition.
        """
        names = [table.name, table.snapshots] if snapshots else [table.name]
        if getattr(self.engine.dialect, "is_mariadb", False):
            # A join with the row takes longer than the rest of the statement. MySQL wants more rights for FOR UPDATE.
            return "", f" AND (SELECT 1 FROM {', '.join(map(str, names))} WHERE FALSE FOR UPDATE) IS NULL"
        opened = zip("es", names, (POSITION, VERSION), strict=False)
        return "".join(f" LEFT JOIN {name} AS {a} ON {a}.{column} = NULL" for a, name, column in opened), ""

    def check_log(self, connection: Connection, table: EventTable) -> list[Finding]:
        """Compare the counting row with the table."""
        table = self.located(connection, table)
        count = f"(SELECT notification_id FROM {self.counter_of(table)} WHERE application_name = %s)"
        statement = f"SELECT {count}, (SELECT max({POSITION}) FROM {table.name})"
        counted, last = self.fetch(connection, statement, (ORDER,))[0]
        if counted is None or last is None or counted >= last:
            return []
        text = (
            f"The row {ORDER} of {self.counter_of(table)} stands at {counted}, behind position {last} of {table.name}"
        )
        remedy = f"UPDATE {self.counter_of(table)} SET notification_id = {last} WHERE application_name = '{ORDER}'"
        return [Finding(f"{text}, so that positions would be given twice: {remedy}.")]

    # ------------------------------------------------------------------------------------------ the longest statement

    @cached_property
    def _as_hex(self) -> bool:
        """Whether the driver writes bytes as hexadecimal digits, as later versions of PyMySQL do."""
        escape = getattr(getattr(self.engine.dialect.dbapi, "converters", None), "escape_bytes", None)
        return escape is not None and b"x".hex() in escape(b"x")

    def chunks(
        self, connection: Connection, rows: Sequence[tuple[Any, ...]], more: int = 0
    ) -> Sequence[Sequence[tuple[Any, ...]]]:
        """Cut by bytes as well as by rows: the server ends a connection that sends it a longer statement.

        :raises DataError: when one row is too long by itself.
        """
        seen: Seen | None = connection.info.get(Seen.KEY)
        longest = seen.longest if seen is not None else 0
        if not longest:
            return super().chunks(connection, rows, more)
        found: list[list[tuple[Any, ...]]] = [[]]
        bytes_left = longest - OF_STATEMENT
        for row in rows:
            size = _size(row, bytes_left, self._as_hex)
            if size > longest - OF_STATEMENT:
                raise DataError(
                    f"An event of {size:,} bytes is longer than the server's max_allowed_packet of {longest:,} bytes "
                    "takes: raise that on the server, or keep large data elsewhere."
                )
            if found[-1] and (size > bytes_left or len(found[-1]) >= self.rows_at_once):
                found.append([])
                bytes_left = longest - OF_STATEMENT
            found[-1].append(row)
            bytes_left -= size
        return found


def surely_follows(table: EventTable, row: Sequence[Any], *, first: bool, snapshots: bool) -> tuple[str, Sequence[Any]]:
    """Return a condition that needs few looks, with its parameters; what it refuses is looked at more closely."""
    if not first:
        key = "originator_id = %s AND originator_version = %s"
        return f"EXISTS (SELECT 1 FROM {table.name} WHERE {key})", (row[0], row[1] - 1)
    names = [table.name, table.snapshots] if snapshots else [table.name]
    # One look into the key, made before there is a plan. NOT EXISTS takes about twice as long.
    conditions = [f"(SELECT MIN({VERSION}) FROM {name} WHERE originator_id = %s) IS NULL" for name in names]
    return " AND ".join(conditions), [row[0]] * len(names)


def _size(row: Sequence[Any], enough: int, as_hex: bool) -> int:
    """Return the bytes that a row may have in a statement: twice its values, and exactly what they are if need be."""
    texts = [each.encode() if isinstance(each, str) else each for each in row if isinstance(each, str | bytes)]
    size = OF_ROW + 2 * sum(map(len, texts))
    if size <= enough:
        return size
    found = OF_ROW
    for value, text in zip((each for each in row if isinstance(each, str | bytes)), texts, strict=True):
        is_hex = as_hex and isinstance(value, bytes)
        found += len(text) + (len(text) if is_hex else sum(text.count(each) for each in ESCAPED))
    return found


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
