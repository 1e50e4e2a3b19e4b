"""The real application over a real database file, and a fixed cast: alice administrates, bob is a member, victor may
only look, wanda is a worker's token. The suite's clock stands still until a test moves it."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from app.auth import create_token, mint_login_link
from app.ids import new_id
from app.main import create_app
from app.services import Services
from app.settings import Settings
from app.tables import User

NOW = 1_800_000_000.0
ORIGIN = "http://127.0.0.1:8000"


@dataclass
class Clock:
    now: float = NOW

    def __call__(self) -> float:
        return self.now


def settings_in(data_dir: Path) -> Settings:
    return Settings(
        data_dir=data_dir,
        host="127.0.0.1",
        port=8000,
        root_path="",
        database_url=f"sqlite:///{data_dir / 'pegbox.sqlite3'}",
        redis_url="",
        url=ORIGIN,
    )


@dataclass
class House:
    app: FastAPI
    clock: Clock
    tokens: dict[str, str] = field(default_factory=dict)
    users: dict[str, str] = field(default_factory=dict)

    @property
    def services(self) -> Services:
        services = self.app.state.services
        assert isinstance(services, Services)
        return services

    def client(self, **headers: str) -> TestClient:
        return TestClient(self.app, base_url=ORIGIN, headers=headers, follow_redirects=False)

    def api(self, who: str) -> TestClient:
        """A program with this person's token."""
        return self.client(Authorization=f"Bearer {self.tokens[who]}")

    def browser(self, who: str) -> TestClient:
        """A browser in which this person has logged in, sending what a form or script of ours sends."""
        client = self.client(Origin=ORIGIN)
        link = mint_login_link(self.services, who)
        assert client.post(link.removeprefix(ORIGIN)).status_code == 303
        return client


@pytest.fixture
def house(tmp_path: Path) -> Iterator[House]:
    clock = Clock()
    # No loops: a test makes the dispatcher's and the sweeper's rounds itself.
    app = create_app(settings_in(tmp_path / "data"), clock=clock, is_leader=False)
    house = House(app, clock)
    with TestClient(app, base_url=ORIGIN):
        with house.services.database.write() as session:
            for name, role in (("alice", "admin"), ("bob", "member"), ("victor", "viewer")):
                house.users[name] = new_id("user")
                session.add(User(id=house.users[name], name=name, role=role, created_at=NOW))
        for name, role in (("alice", "admin"), ("bob", "member"), ("victor", "viewer"), ("wanda", "worker")):
            house.tokens[name] = create_token(house.services.database, f"{name}'s", role, house.users.get(name))
        yield house
