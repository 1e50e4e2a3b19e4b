"""Brings the database's schema up to date, from Python: whoever opens the database first does it.

All pending revisions run in one transaction, so that a process killed half-way leaves the schema it found. Foreign
keys are off meanwhile (a table is changed by moving its rows to a new one, and ON DELETE would follow the old one) and
checked as a whole before the commit. Two processes that start at once queue at BEGIN IMMEDIATE; the second finds
nothing to do."""

from pathlib import Path

from alembic import command
from alembic.config import Config

from app.database import Database

SCRIPTS = Path(__file__).resolve().parent.parent / "migrations"


def migrate(database: Database) -> None:
    config = Config()
    config.set_main_option("script_location", str(SCRIPTS))
    config.set_main_option("path_separator", "os")
    with database.engine.connect().execution_options(writes=True) as connection:
        driver = connection.connection.driver_connection
        assert driver is not None
        driver.execute("PRAGMA foreign_keys=OFF")  # has no effect inside a transaction
        try:
            with connection.begin():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                broken = connection.exec_driver_sql("PRAGMA foreign_key_check").all()
                assert not broken, f"rows without what they refer to after the migration: {broken[:10]}"
        finally:
            driver.execute("PRAGMA foreign_keys=ON")
