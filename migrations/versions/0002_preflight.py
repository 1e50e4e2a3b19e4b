"""What preflight keeps: a profile's progress and its sampled rows, a job's trial and its forecast."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("profile", sa.Column("progress", sa.Float(), nullable=True))
    op.add_column("profile", sa.Column("sampled", sa.LargeBinary(), nullable=True))
    op.add_column("job", sa.Column("trial", sa.JSON(), nullable=True))
    op.add_column("job", sa.Column("forecast", sa.JSON(), nullable=True))
