"""A column for the id of the event at which a projection stands, so that another one at its position is noticed.

Revision 0004, revises 0003. It is nullable, so that no row is written again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Add the column."""
    op.add_column("bank_projections", sa.Column("last_event_id", sa.Text(), nullable=True))


def downgrade() -> None:
    """Take the column away."""
    op.drop_column("bank_projections", "last_event_id")
