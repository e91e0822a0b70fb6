"""Locks that only the program's roles may take, instead of advisory locks.

Lock: none that matters, the table is new. The service may run meanwhile.
"""

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"


def upgrade() -> None:
    op.create_table(
        "locks",
        sa.Column("name", sa.Text(), nullable=False, comment="What is locked."),
        sa.Column(
            "session_pid",
            sa.Integer(),
            nullable=True,
            comment="Process id of the session that has it.",
        ),
        sa.Column(
            "virtual_transaction",
            sa.Text(),
            nullable=True,
            comment="That session's transaction; the lock is free when pg_locks no longer shows it.",
        ),
        sa.Column(
            "server_started_at",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="Start of the server that the session belongs to.",
        ),
        sa.Column("role", sa.Text(), nullable=True, comment="Login of the session."),
        sa.Column(
            "application", sa.Text(), nullable=True, comment="What the session calls itself."
        ),
        sa.Column("host", sa.Text(), nullable=True, comment="Where its process runs."),
        sa.Column(
            "process_id", sa.Integer(), nullable=True, comment="Id of that process on its host."
        ),
        sa.Column(
            "since",
            sa.DateTime(timezone=True),
            nullable=True,
            comment="When the session took it.",
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("locks_pkey")),
        schema="pipeline",
        comment="Locks of the program. Rows stay when a lock is free; the table may be emptied while no command runs.",
        postgresql_with={"fillfactor": "50"},
        # `migrate` has made it already, as it takes a lock before the first migration.
        if_not_exists=True,
    )


def downgrade() -> None:
    op.drop_table("locks", schema="pipeline")
