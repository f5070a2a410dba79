"""PostgreSQL: reads the catalogs for the tables of a projection, and swaps them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import ClassVar

import sqlalchemy as sa
from sqlalchemy.engine import Connection

from .event_tables import POSITION
from .event_values import as_parameter
from .swapping import OWN, ForSwaps, Part


class PostgreSQLSwaps(ForSwaps):
    """The part of the dialect that rebuilds use."""

    overriding: ClassVar[str] = " OVERRIDING SYSTEM VALUE"

    def limit_ddl_waiting(self, connection: Connection, seconds: int) -> None:
        """Limit the waiting to the end of the transaction, and how long a frozen process keeps others waiting."""
        connection.exec_driver_sql(f"SET LOCAL lock_timeout = '{seconds}s'")
        connection.exec_driver_sql(_THAWED, (f"{5 * seconds}s",))

    def name_shadow(self, table: sa.Table, shadow: sa.Table, suffix: str) -> None:
        """Name its parts; it has no partitions, as rows are copied where the live one has some."""
        shadow.dialect_options["postgresql"]["partition_by"] = None
        super().name_shadow(table, shadow, suffix)

    def shadow_index_name(self, name: str, suffix: str) -> str:
        """Shorten a name that is too long with its suffix."""
        return self.fitting(name, suffix)

    def name_shadow_constraint(self, constraint: sa.Constraint, suffix: str) -> None:
        """Give what has an index of its name, as a key, the suffix: it is renamed with it."""
        has_index = not isinstance(constraint, sa.CheckConstraint | sa.ForeignKeyConstraint)
        if has_index and constraint.name is not None:
            constraint.name = sa.sql.quoted_name(self.fitting(str(constraint.name), suffix), None)

    def parts_of(self, connection: Connection, table: sa.Table, name: str) -> Collection[Part]:
        """Ask the catalogs; *name* is that of the table or of a shadow."""
        rows = connection.exec_driver_sql(_PARTS, (as_parameter(self.qualified(table, name)),)).all()
        found = set()
        for kind, what, definition, columns in rows:
            about = frozenset((columns or "").split("\n")) - {""}
            found.add(Part(what, definition or "", about, acts=kind == "acts", dependent=kind == "on"))
        return found

    def referrers(self, connection: Connection, table: sa.Table) -> Collection[str]:
        """Return the names of the tables that have a foreign key to a table, in whatever schema."""
        rows = connection.exec_driver_sql(_REFERRERS, (as_parameter(self.qualified(table, table.name)),))
        return {name for (name,) in rows}

    def holders(self, tables: Sequence[sa.Table], seconds: int) -> Sequence[str]:
        """Return the sessions and prepared transactions that have some tables locked."""
        names = [as_parameter(self.qualified(table, table.name)) for table in tables]
        marks = ", ".join(["%s::regclass"] * len(names))
        with self.engine.connect() as connection:
            rows = connection.exec_driver_sql(_HOLDERS.format(marks), (*names, seconds)).all()
        return [text for (text,) in rows]

    def rename_parts(self, connection: Connection, table: sa.Table, new: str, old: str) -> None:
        """Rename indexes, sequences and constraints, which have not changed their names with the table."""
        for name, renamed in (
            (table.name + old, lambda part: self.fitting(part, old)),
            (table.name, lambda part: part.replace(new, "")),
        ):
            qualified = as_parameter(self.qualified(table, name))
            for part, kind in connection.exec_driver_sql(_RENAMED, (qualified, qualified)).all():
                if renamed(part) != part:
                    statement = f"ALTER {kind} {self.qualified(table, part)} RENAME TO {self._quote(renamed(part))}"
                    connection.exec_driver_sql(statement)
        # Of those the names are unique within the table, so that the replaced one keeps them.
        for (part,) in connection.exec_driver_sql(
            _CONSTRAINTS, (as_parameter(self.qualified(table, table.name)),)
        ).all():
            if part.replace(new, "") != part:
                names = f"{self._quote(part)} TO {self._quote(part.replace(new, ''))}"
                connection.exec_driver_sql(f"ALTER TABLE {self.qualified(table, table.name)} RENAME CONSTRAINT {names}")

    def _quote(self, name: str) -> str:
        return self.engine.dialect.identifier_preparer.quote(name)

    def replace_rows(self, connection: Connection, tables: Sequence[sa.Table], new: str) -> None:
        """Replace the rows; row-level security that would hide some of them is an error."""
        connection.exec_driver_sql("SET LOCAL row_security = off")
        super().replace_rows(connection, tables, new)
        # What the commit would look at, and say of no table.
        connection.exec_driver_sql("SET CONSTRAINTS ALL IMMEDIATE")

    def gather_statistics(self, connection: Connection, table: sa.Table, name: str) -> None:
        """Gather them now: those of a replaced table are not the new one's, and autovacuum comes later."""
        connection.exec_driver_sql(f"ANALYZE {self.qualified(table, name)}")

    def go_on_counting(self, connection: Connection, table: sa.Table, new: str) -> None:
        """Set sequences to the higher of two values, as a rollback does not set them back."""
        live, shadow = (as_parameter(self.qualified(table, name)) for name in (table.name, table.name + new))
        for column in table.columns:
            names = connection.exec_driver_sql(_SEQUENCES, (live, column.name, shadow, column.name)).one()
            if None not in names and names[0] != names[1]:
                statement = _SET_SEQUENCE.format(live=names[0].replace("%", "%%"), new=names[1].replace("%", "%%"))
                connection.exec_driver_sql(statement, (names[0],), execution_options=OWN)

    def go_on_behind(self, connection: Connection, events: sa.Table, tracking: sa.Table, position: int) -> None:
        """Raise the sequence, at once for all sessions."""
        name = as_parameter(self.qualified(events, events.name))
        found = connection.exec_driver_sql(_SEQUENCE, (name, POSITION)).scalar_one()
        if found is not None:
            raised = _RAISED.format(found.replace("%", "%%"))
            connection.exec_driver_sql(raised, (found, position, position), execution_options=OWN)


_THAWED = """
SELECT set_config('idle_in_transaction_session_timeout', %s, true)
WHERE current_setting('idle_in_transaction_session_timeout') = '0'"""

_SEQUENCE = "SELECT pg_get_serial_sequence(%s, %s)"

_RAISED = "SELECT setval(%s::regclass, %s) FROM {} WHERE last_value < %s + CASE WHEN is_called THEN 0 ELSE 1 END"

_SEQUENCES = "SELECT pg_get_serial_sequence(%s, %s), pg_get_serial_sequence(%s, %s)"

_SET_SEQUENCE = """
SELECT setval(%s::regclass, o.last_value, o.is_called)
FROM (SELECT last_value, is_called FROM {live} UNION ALL SELECT last_value, is_called FROM {new}) o
ORDER BY o.last_value DESC, o.is_called DESC LIMIT 1"""

_RENAMED = """
SELECT c.relname, 'INDEX' FROM pg_index i JOIN pg_class c ON c.oid = i.indexrelid WHERE i.indrelid = %s::regclass
UNION ALL
SELECT c.relname, 'SEQUENCE' FROM pg_depend d JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'
WHERE d.refobjid = %s::regclass AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')"""

_CONSTRAINTS = "SELECT conname FROM pg_constraint WHERE conrelid = %s::regclass"

_REFERRERS = """
SELECT c.relname FROM pg_constraint k JOIN pg_class c ON c.oid = k.conrelid
WHERE k.contype = 'f' AND k.confrelid = %s::regclass"""

_HOLDERS = """
SELECT DISTINCT CASE WHEN a.pid IS NULL THEN 'prepared transaction ' || p.gid || ', since ' || p.prepared
    ELSE 'process ' || a.pid || ' (' || concat_ws(', ', a.usename, nullif(a.application_name, ''), a.state)
    || '), in a transaction since ' || a.xact_start || ', its last statement began ' || a.query_start END
FROM pg_locks l LEFT JOIN pg_stat_activity a ON a.pid = l.pid
LEFT JOIN pg_prepared_xacts p ON l.pid IS NULL AND l.virtualtransaction = '-1/' || p.transaction
WHERE l.granted AND l.locktype = 'relation' AND l.relation IN ({})
AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
AND coalesce(a.xact_start, p.prepared) < clock_timestamp() - make_interval(secs => %s)"""

_PARTS = """
WITH r AS (SELECT * FROM pg_class WHERE oid = %s::regclass),
s AS (SELECT c.oid, c.relname, c.relacl, c.relowner FROM r JOIN pg_depend d ON d.refclassid = 'pg_class'::regclass
    AND d.refobjid = r.oid AND d.classid = 'pg_class'::regclass AND d.deptype IN ('a', 'i')
    JOIN pg_class c ON c.oid = d.objid AND c.relkind = 'S'),
g AS (
    SELECT '' AS at, NULL AS col, aclexplode(coalesce(relacl, acldefault('r', relowner))) AS x FROM r
    UNION ALL SELECT ' (' || attname || ')', attname, aclexplode(attacl) FROM r JOIN pg_attribute ON attrelid = r.oid
    UNION ALL SELECT ' on sequence ' || relname, NULL, aclexplode(coalesce(relacl, acldefault('s', relowner))) FROM s),
n AS (
    SELECT DISTINCT d.classid, d.objid, d.objsubid FROM r JOIN pg_depend d
    ON (d.refclassid = 'pg_class'::regclass AND d.refobjid IN (SELECT r.oid UNION SELECT oid FROM s))
    OR (d.refclassid = 'pg_type'::regclass AND d.deptype <> 'i'
        AND d.refobjid IN (SELECT oid FROM pg_type WHERE oid = r.reltype OR typelem = r.reltype)))
SELECT 'own' AS kind, 'the owner ' || pg_get_userbyid(relowner) AS what, NULL AS definition, NULL AS columns FROM r
UNION ALL SELECT 'own', 'the storage',
    concat_ws(' ', relkind, relpersistence, relreplident, reltablespace, reloptions), NULL FROM r
UNION ALL SELECT 'own', 'its schema ' || relnamespace::regnamespace, NULL, NULL FROM r
UNION ALL SELECT 'own', 'its place in table ' || inhparent::regclass, pg_get_expr(relpartbound, oid), NULL
    FROM r JOIN pg_inherits ON inhrelid = oid
UNION ALL SELECT 'own', 'row-level security', concat(relforcerowsecurity), NULL FROM r WHERE relrowsecurity
UNION ALL SELECT 'acts', 'row-level security, which holds for this role too', NULL, NULL FROM r
    WHERE row_security_active(r.oid)
UNION ALL SELECT 'own', 'policy ' || polname, concat_ws(' ', polcmd, polpermissive, polroles,
    pg_get_expr(polqual, polrelid), pg_get_expr(polwithcheck, polrelid)), NULL
    FROM r JOIN pg_policy ON polrelid = r.oid
UNION ALL SELECT 'own', 'the right to ' || (x).privilege_type || at || ' of '
    || CASE (x).grantee WHEN 0 THEN 'PUBLIC' ELSE pg_get_userbyid((x).grantee) END, concat((x).is_grantable), col FROM g
UNION ALL SELECT 'own', 'the limits of the rights' || at,
    string_agg(concat_ws(' ', (x).grantee, (x).privilege_type), ', ' ORDER BY (x).grantee, (x).privilege_type), col
    FROM g GROUP BY at, col
UNION ALL SELECT 'own', 'index ' || c.relname, pg_get_indexdef(c.oid),
    (SELECT string_agg(attname, E'\\n') FROM pg_attribute WHERE attrelid = i.indrelid AND attnum = ANY (i.indkey))
    FROM r JOIN pg_index i ON i.indrelid = r.oid JOIN pg_class c ON c.oid = i.indexrelid
    WHERE NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = c.oid AND conrelid = r.oid)
UNION ALL SELECT 'own', 'constraint ' || conname, pg_get_constraintdef(k.oid),
    (SELECT string_agg(attname, E'\\n') FROM pg_attribute WHERE attrelid = k.conrelid AND attnum = ANY (k.conkey))
    FROM r JOIN pg_constraint k ON conrelid = r.oid AND contype <> 't'
UNION ALL SELECT 'own', 'the order by index ' || indexrelid::regclass, NULL, NULL
    FROM r JOIN pg_index ON indrelid = r.oid AND indisclustered
UNION ALL SELECT 'own', 'the collation or storage of column ' || attname, concat_ws(' ', nullif(attcollation,
    typcollation)::regcollation, nullif(attstorage, typstorage), attcompression, attstattarget, attoptions), attname
    FROM r JOIN pg_attribute ON attrelid = r.oid AND attnum > 0 AND NOT attisdropped JOIN pg_type t ON t.oid = atttypid
    WHERE attcollation <> typcollation OR attstorage <> typstorage OR attcompression <> '' OR attstattarget >= 0
    OR attoptions IS NOT NULL
UNION ALL SELECT 'own', 'the default of column ' || attname, pg_get_expr(adbin, adrelid), attname
    FROM r JOIN pg_attrdef ON adrelid = r.oid JOIN pg_attribute ON attrelid = r.oid AND attnum = adnum
UNION ALL SELECT 'own', 'the comment on ' || pg_describe_object(classoid, objoid, objsubid), description,
    (SELECT attname FROM pg_attribute WHERE objsubid > 0 AND attrelid = r.oid AND attnum = objsubid)
    FROM r JOIN pg_description ON classoid = 'pg_class'::regclass AND (objoid = r.oid
        OR objoid IN (SELECT indexrelid FROM pg_index WHERE indrelid = r.oid))
    OR classoid = 'pg_constraint'::regclass AND objoid IN (SELECT oid FROM pg_constraint WHERE conrelid = r.oid)
UNION ALL SELECT 'acts', 'trigger ' || tgname, pg_get_triggerdef(t.oid), NULL
    FROM r JOIN pg_trigger t ON tgrelid = r.oid AND NOT tgisinternal
UNION ALL SELECT 'acts', 'rule ' || rulename, pg_get_ruledef(w.oid), NULL FROM r JOIN pg_rewrite w ON ev_class = r.oid
UNION ALL SELECT DISTINCT 'on', CASE relkind WHEN 'm' THEN 'materialized view ' ELSE 'view ' END
    || ev_class::regclass, NULL, NULL
    FROM n JOIN pg_rewrite w ON n.classid = 'pg_rewrite'::regclass AND w.oid = n.objid
    JOIN pg_class c ON c.oid = ev_class
    WHERE ev_class NOT IN (SELECT oid FROM r)
UNION ALL SELECT 'on', pg_describe_object(classid, objid, objsubid), NULL, NULL FROM n WHERE classid NOT IN (
    'pg_rewrite'::regclass, 'pg_constraint'::regclass, 'pg_attrdef'::regclass, 'pg_trigger'::regclass,
    'pg_type'::regclass, 'pg_class'::regclass)
    AND NOT (classid = 'pg_policy'::regclass AND objid IN (SELECT p.oid FROM pg_policy p JOIN r ON p.polrelid = r.oid))
UNION ALL SELECT 'on', 'table ' || inhrelid::regclass || ', which inherits from it', NULL, NULL
    FROM r JOIN pg_inherits ON inhparent = r.oid
UNION ALL SELECT DISTINCT 'on', 'the default of column ' || attname || ' of table ' || adrelid::regclass, NULL, NULL
    FROM n JOIN pg_attrdef e ON n.classid = 'pg_attrdef'::regclass AND n.objid = e.oid
    JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum WHERE adrelid NOT IN (SELECT oid FROM r)
UNION ALL SELECT DISTINCT 'on', 'table ' || objid::regclass || ', which has a column of its type', NULL, NULL
    FROM n WHERE classid = 'pg_class'::regclass AND objsubid > 0 AND objid NOT IN (SELECT oid FROM r)"""
"""What a table has beside its columns: its kind, its name, its definition, and the columns that it is about."""
