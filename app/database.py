"""The one SQLite file, and how it is written.

WAL with synchronous=FULL: what was acknowledged survives a power cut. Readers never wait. Every write transaction
starts with BEGIN IMMEDIATE, because a read transaction that turns into a write fails at once with SQLITE_BUSY_SNAPSHOT
whatever busy_timeout says; and inside this process a lock lets one writer in at a time, so that writers queue in order
instead of polling the file. Write transactions are short, and nothing slow (hashing, network, files) happens in one.

`pysqlite3` brings its own SQLite: Debian 12's has the WAL-reset bug that was fixed in 3.51.3.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pysqlite3.dbapi2 as sqlite
from sqlalchemy import Connection, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.pool import ConnectionPoolEntry
from sqlmodel import Session

SAFE_WAL_SQLITE = (3, 51, 3)


class Database:
    def __init__(self, url: str) -> None:
        if make_url(url).get_backend_name() != "sqlite":
            raise ValueError(f"PEGBOX_DATABASE_URL {url!r}: only sqlite is built in this release")
        assert sqlite.sqlite_version_info >= SAFE_WAL_SQLITE, sqlite.sqlite_version
        path = make_url(url).database
        assert path, "a file, so that a restart finds everything"
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self.engine = create_engine(url, module=sqlite, pool_size=8, max_overflow=8, pool_timeout=10)
        event.listen(self.engine, "connect", _prepare_connection)
        event.listen(self.engine, "begin", _begin)
        self._writing = threading.Lock()

    @contextmanager
    def read(self) -> Iterator[Session]:
        """A consistent view; nothing done in it is kept."""
        with Session(self.engine, expire_on_commit=False, autoflush=False) as session:
            yield session

    @contextmanager
    def write(self) -> Iterator[Session]:
        """One short transaction: committed at the end, rolled back when anything is raised."""
        with (
            self._writing,
            self.engine.connect().execution_options(writes=True) as connection,
            Session(connection, expire_on_commit=False) as session,
        ):
            yield session
            session.commit()

    def close(self) -> None:
        self.engine.dispose()


def _prepare_connection(connection: Any, _: ConnectionPoolEntry) -> None:
    connection.isolation_level = None  # transactions are ours: see _begin
    for pragma in (
        "journal_mode=WAL",
        "synchronous=FULL",
        "foreign_keys=ON",
        "busy_timeout=5000",
        "temp_store=MEMORY",
        "trusted_schema=OFF",
    ):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    writes = connection.get_execution_options().get("writes", False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
