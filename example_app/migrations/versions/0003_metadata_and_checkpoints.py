"""Columns for the metadata of events, for what checkpoints and dead letters note, and a table of inline ranges.

Revision 0003, revises 0002. All new columns are nullable, so that no row is written again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import mysql

from flask_eventsourcing.models import MetadataType, UUIDType

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

BIG = sa.BigInteger().with_variant(sa.Integer(), "sqlite")
EXACT = "utf8mb4_bin"
NAME = (
    sa.String(length=255)
    .with_variant(sa.Text(), "postgresql")
    .with_variant(mysql.VARCHAR(255, collation=EXACT), "mysql", "mariadb")
)
CORRELATION = sa.String(length=128).with_variant(mysql.VARCHAR(128, collation=EXACT), "mysql", "mariadb")
MOMENT = sa.DateTime(timezone=True).with_variant(mysql.DATETIME(fsp=6), "mysql", "mariadb")

NEW_COLUMNS = {
    "bank_events": {
        "event_id": UUIDType(),
        "metadata": MetadataType(),
        "recorded_at": MOMENT,
        "correlation_id": CORRELATION,
    },
    "bank_snapshots": {"event_id": UUIDType(), "metadata": MetadataType()},
    "bank_projections": {
        "claim": BIG,
        "earlier_fingerprints": sa.Text(),
        "log_id": BIG,
        "last_originator_id": NAME,
        "last_originator_version": BIG,
        "tables_id": sa.Text(),
        "topics": sa.Text(),
        "topics_position": BIG,
        "changed_by": sa.String(length=255),
        "reason": sa.Text(),
    },
    "bank_dead_letters": {"changed_by": sa.String(length=255), "reason": sa.Text()},
}


def upgrade() -> None:
    """Add the columns and the table."""
    for table, columns in NEW_COLUMNS.items():
        for name, kind in columns.items():
            op.add_column(table, sa.Column(name, kind, nullable=True))
    op.create_table(
        "bank_inline_ranges",
        sa.Column("id", BIG, autoincrement=True, nullable=False),
        sa.Column("projection", NAME, nullable=False),
        sa.Column("first_position", BIG, nullable=False),
        sa.Column("last_position", BIG, nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_bank_inline_ranges"),
        sqlite_autoincrement=True,
    )


def downgrade() -> None:
    """Take the columns and the table away."""
    op.drop_table("bank_inline_ranges")
    for table, columns in NEW_COLUMNS.items():
        for name in columns:
            op.drop_column(table, name)
