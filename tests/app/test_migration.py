"""The schema that the migrations make is the one that the classes describe."""

import re
from pathlib import Path

from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from sqlalchemy import inspect
from sqlmodel import SQLModel

import app.tables  # noqa: F401 - fills the metadata
from app.database import Database
from app.migration import migrate


def migrated(folder: Path) -> Database:
    database = Database(f"sqlite:///{folder / 'test.sqlite3'}")
    migrate(database)
    return database


def test_the_migrated_schema_equals_the_classes(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    with database.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True})
        assert compare_metadata(context, SQLModel.metadata) == []
        tables = set(inspect(connection).get_table_names())
    assert tables == {*SQLModel.metadata.tables, "alembic_version"}
    database.close()


def test_the_statements_that_make_each_table_are_the_same(tmp_path: Path) -> None:
    """What compare_metadata overlooks: names of constraints, AUTOINCREMENT, WITHOUT ROWID."""
    direct = Database(f"sqlite:///{tmp_path / 'direct.sqlite3'}")
    with direct.engine.connect().execution_options(writes=True) as connection:
        SQLModel.metadata.create_all(connection)
        connection.commit()
    by_migration = migrated(tmp_path)
    assert statements(by_migration) == statements(direct)
    assert any("AUTOINCREMENT" in statement for statement in statements(direct))
    direct.close()
    by_migration.close()


def statements(database: Database) -> set[str]:
    """Each without the order of its columns and constraints, which says nothing."""
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL AND name NOT IN ('alembic_version', 'sqlite_sequence')"
    with database.engine.connect() as connection:
        return {" ".join(sorted(re.findall(r"[\w.]+", sql))) for (sql,) in connection.exec_driver_sql(query)}


def test_migrating_twice_changes_nothing_and_foreign_keys_are_on_again(tmp_path: Path) -> None:
    database = migrated(tmp_path)
    before = statements(database)
    migrate(database)
    assert statements(database) == before
    with database.read() as session:
        assert session.connection().exec_driver_sql("PRAGMA foreign_keys").scalar() == 1
    database.close()
