"""What a checkpoint belongs to: a log, the tables of its projection, and the code that wrote them.

If something does not fit, the state has a name, which is the same in runners, ``status`` and ``wait_for``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from ...exceptions import CheckpointMismatchError
from ...persistence.dialects.catalogs import are_filled, is_exact, made_of, table_ids
from ...persistence.dialects.locks import OpenWriter
from ..checkpoint import SWAPPING, CheckpointRow
from ..definitions.fingerprints import add_run, retired
from . import SUFFIXES, Consumer
from .logs import Found

AHEAD = "ahead of its log"
OTHER_LOG = "another log"
MADE_AGAIN = "tables made again"
MISSING = "tables missing"
OLD_CODE = "old code"
ORPHAN = "beside an orphan"
HELD_BACK = "held back"
NOT_APPLIED = "not applied inline"


@dataclass(frozen=True)
class Mismatch:
    """What does not fit: the name of the state, and a text for the operator with the remedy."""

    state: str
    text: str

    @property
    def error(self) -> CheckpointMismatchError:
        """The error that says so."""
        return CheckpointMismatchError(self.text)


class Belonging:
    """Checks whether a consumer's checkpoint fits its log, tables and code."""

    def __init__(self, consumer: Consumer) -> None:
        self.consumer = consumer
        self.name: str = consumer.name
        self._log = consumer.application.log

    # ------------------------------------------------------------------------------------------------------- to look

    def find_mismatch(self, connection: Connection, row: CheckpointRow) -> Mismatch | None:
        """Return what does not fit of log and tables."""
        if row.state != SWAPPING and (missing := self.find_missing(connection)) is not None:
            return missing
        if row.position == 0 and not self.consumer.projection_class.inline:
            return self._find_former(connection)
        return self.find_mismatch_of_log(connection, row) or self._of_tables(connection, row)

    def find_missing(self, connection: Connection) -> Mismatch | None:
        """Return the state of a projection without one of its tables."""
        if self.consumer.kind != "projection" or not self.consumer.tables:
            return None
        ids = table_ids(connection, self.consumer.tables)
        is_there = self.consumer.application.datastore.dialect.is_there
        # A view, or a name that the database folds, is known to the second only.
        missing = [t.fullname for t in self.consumer.tables if t.key not in ids and not is_there(connection, t)]
        if not missing:
            return None
        return Mismatch(
            MISSING,
            f"{self.name} lacks its table {', '.join(missing)}. Create it with your migrations or "
            f"{self.consumer.application.command('init-db')}; if the projection had applied events, run "
            f"{self.consumer.command('rebuild')} after that.",
        )

    def find_old_code(self, row: CheckpointRow) -> Mismatch | None:
        """Return the state of a worker whose code ran before other code rebuilt the projection."""
        if self.consumer.kind != "projection" or self.consumer.fingerprint not in retired(row.earlier_fingerprints):
            return None
        return Mismatch(
            OLD_CODE,
            f"This process does not run {self.name}, because it has old code: other code has rebuilt the tables since. "
            f"If you took that release back, run {self.consumer.command('projections accept')}, or rebuild "
            "the projection.",
        )

    def find_orphan(self, connection: Connection) -> Mismatch | None:
        """Return the state of one without a checkpoint beside one of a projection that is not registered.

        The projection may have been renamed: all its reactions would be called a second time, and all its events be
        applied to the rows that it has.
        """
        projection = self.consumer.projection_class
        if self.consumer.kind != "reactions":
            return self._find_former(connection)
        if projection.reactions_start == "end":
            return None
        names = connection.scalars(sa.select(self.consumer.checkpoint.table.c.name)).all()
        orphans = [n for n in names if n.endswith(SUFFIXES["reactions"]) and self.consumer.application.is_orphan(n)]
        if not orphans or not self._log.last_position(connection):
            return None
        old = orphans[0].removesuffix(SUFFIXES["reactions"])
        return Mismatch(
            ORPHAN,
            f"{self.name} has no checkpoint and would begin at the start of the log, but {orphans[0]} has one and is "
            f"not registered: if you renamed the projection, run "
            f"{self.consumer.application.command(f'projections rename {old} {projection.name}')}; if "
            f"not, {self.consumer.command('projections accept')}.",
        )

    def _find_former(self, connection: Connection) -> Mismatch | None:
        """Return the state of one at the beginning whose tables have the rows of one that is not registered."""
        if self.consumer.kind != "projection" or not self.consumer.tables:
            return None
        c, tables = self.consumer.checkpoint.table.c, {table.key: table for table in self.consumer.tables}
        noted = connection.execute(sa.select(c.name, c.tables_id).where(c.position > 0, c.tables_id.is_not(None))).all()
        for name, text in noted:
            shared = [table for key, table in tables.items() if key in json.loads(text)["tables"]]
            if not shared or not self.consumer.application.is_orphan(name) or self.find_missing(connection) is not None:
                continue
            if any(are_filled(connection, shared)):
                return Mismatch(
                    ORPHAN,
                    f"{self.name} would begin at the start of the log, but table {shared[0].name} has the rows of "
                    f"{name}, which is not registered: if you renamed the projection, run "
                    f"{self.consumer.application.command(f'projections rename {name} {self.name}')}; if not, "
                    f"{self.consumer.command('rebuild')}.",
                )
        return None

    def find_filled(self, connection: Connection) -> str | None:
        """Return the name of a table that has rows, if the consumer is a projection with such a table."""
        tables = self.consumer.tables if self.consumer.kind == "projection" else ()
        filled = zip(tables, are_filled(connection, tables), strict=True)
        return next((table.name for table, has_rows in filled if has_rows), None)

    def has_changed_code(self, row: CheckpointRow) -> bool:
        """Whether the code is another than at the last rebuild, or than when the projection first ran."""
        return (
            self.consumer.kind == "projection"
            and row.fingerprint is not None
            and row.fingerprint != self.consumer.fingerprint
        )

    def find_stall(self, mark: int, end: int, writer: OpenWriter | None) -> Mismatch | None:
        """Return the state of a log that a transaction in progress keeps from being read for too long.

        :param end: the last position that is committed.
        """
        application = self.consumer.application
        options = application.datastore.options
        limit = options.stall_limit
        if writer is None or writer.seconds is None or writer.seconds <= limit:
            return None
        return Mismatch(
            HELD_BACK,
            f"{self.name} is held back at position {mark}, and the log of {application.name} goes on to {end}: "
            f"{writer.name} has had a transaction open for {writer.seconds:.0f} s, in which it appended events. "
            f"End it: {writer.remedy}. {options.named('stall_limit')} is {limit:g} s.",
        )

    def find_mismatch_of_log(self, connection: Connection, row: CheckpointRow) -> Mismatch | None:
        """Return what does not fit of the log alone."""
        identity, found = self._log.look(connection, row.position)
        if row.log_id is not None and identity is not None and row.log_id != identity:
            return Mismatch(
                OTHER_LOG, f"{self.name} has followed another log than this one. {self._remedy('was made again')}"
            )
        if found is not None:
            if _is_noted(row, found):
                return None
            return Mismatch(
                OTHER_LOG,
                f"{self.name} has applied another event at position {row.position} than the log has there. "
                f"{self._remedy('was restored to an earlier point')}",
            )
        end = self._log.last_position(connection)
        if end >= row.position:
            return None
        return Mismatch(
            AHEAD,
            f"{self.name} is ahead of its log: it stands at position {row.position}, and the log ends at {end}. "
            f"{self._remedy('was restored to an earlier point')}",
        )

    def _remedy(self, what: str) -> str:
        rest = "to let it go on from the end of the log"
        accept = self.consumer.command("projections accept")
        if self.consumer.kind == "reactions" or not self.consumer.tables:
            return f"If the log {what}, run {accept} {rest}."
        return f"If the log {what}, run {self.consumer.command('rebuild')}; or {accept}, {rest}."

    # ------------------------------------------------------------------------------------------------------- tables

    def _of_tables(self, connection: Connection, row: CheckpointRow) -> Mismatch | None:
        if row.tables_id is None or self.consumer.kind != "projection" or not self.consumer.tables:
            return None
        noted = json.loads(row.tables_id)
        ids = table_ids(connection, [self.consumer.checkpoint.table, *self.consumer.tables])
        exact = is_exact(connection)
        if exact and made_of(ids.get(self.consumer.checkpoint.table.key, "")) != made_of(noted["own"] or ""):
            # All was restored from one dump, this row with it.
            return None
        changes = {
            table: what
            for table in self.consumer.tables
            if table.key in ids and (what := _change(noted["tables"].get(table.key), ids[table.key], row, noted))
        }
        filled = zip(changes.items(), are_filled(connection, list(changes)), strict=True)
        for (table, what), has_rows in filled:
            if not has_rows or (what == AGAIN and exact):
                return Mismatch(
                    MADE_AGAIN,
                    f"Table {table.name} of {self.name} {what} since the events up to position {row.position} were "
                    f"applied, so it lacks their rows. Run {self.consumer.command('rebuild')}; or, if the table is "
                    f"complete, {self.consumer.command('projections accept')}.",
                )
        return None

    def note_tables(self, connection: Connection, row: CheckpointRow) -> str | None:
        """Return what the checkpoint notes of the tables: which they are, and whether they have rows."""
        if self.consumer.kind != "projection" or not self.consumer.tables:
            return None
        own, tables = self.consumer.checkpoint.table, self.consumer.tables
        ids = table_ids(connection, [own, *tables])
        there = [table for table in tables if table.key in ids]
        filled = zip(there, are_filled(connection, there), strict=True)
        noted = {table.key: [ids[table.key], has_rows] for table, has_rows in filled}
        return json.dumps({"own": ids.get(own.key), "applied": row.applied, "tables": noted}) if ids else None

    # ------------------------------------------------------------------------------------------------------- to note

    def notes(self, connection: Connection, row: CheckpointRow) -> dict[str, Any]:
        """Return the columns that a claim writes: the log, the tables, and the code that is going to run."""
        noted: dict[str, Any] = {}
        if (tables := self.note_tables(connection, row)) is not None:
            noted["tables_id"] = tables
        if row.log_id is None and (identity := self._log.identity(connection)) is not None:
            noted["log_id"] = identity
        if self.consumer.kind == "projection":
            code = self.consumer.fingerprint
            if row.fingerprint is None:
                noted["fingerprint"] = code
            elif row.fingerprint != code:
                noted["earlier_fingerprints"] = add_run(row.earlier_fingerprints, code)
        return {} if all(getattr(row, name) == value for name, value in noted.items()) else noted


AGAIN = "was made again"


def _change(noted: Sequence[Any] | None, found: str, row: CheckpointRow, notes: Mapping[str, Any]) -> str | None:
    """Return what happened to a table that may lack rows now, or None; a table that had none lacks none."""
    if noted is None:
        return "was added"
    if made_of(noted[0]) != made_of(found):
        return AGAIN if noted[1] or row.applied > notes["applied"] else None
    # Events that were applied since may have emptied it. Notes of earlier versions do not name the table's file.
    is_other = "/" in noted[0] and noted[0] != found
    return "was emptied" if is_other and noted[1] and row.applied == notes["applied"] else None


def _is_noted(row: CheckpointRow, found: Found) -> bool:
    """Whether an event may be the one that a row notes; an unknown or erased id rules nothing out."""
    if row.last_event_id is not None and found.event_id is not None and row.last_event_id != found.event_id:
        return False
    if row.last_originator_id is None:
        return True
    noted = (_as(found.originator_id, str(row.last_originator_id)), row.last_originator_version)
    return noted == (found.originator_id, found.originator_version)


def _as(found: Any, noted: str) -> Any:
    """Return a noted id as the column has it."""
    if not isinstance(found, UUID):
        return noted
    try:
        return UUID(noted)
    except ValueError:
        return noted
