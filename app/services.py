"""What every request and loop of the web service shares, handed in and never imported as a global."""

import asyncio
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from time import time
from typing import Annotated, Protocol

from fastapi import Depends, Request
from fastapi.templating import Jinja2Templates

from app.blobs import BlobStore
from app.database import Database
from app.settings import Settings
from core.memo import Memo

# Selections, runs, packing reports and their like, of the forms that are open. Of a million samples a selection or a
# run takes up to 100 MB.
MOST_PLANNED = 24

ROOT = Path(__file__).resolve().parent.parent
STATIC_DIR = ROOT / "static"


class Wake:
    """Tells whoever waits on a topic that something was committed; from any thread, to threads and to coroutines.

    A waiter first reads `version(topic)`, then looks at the database, then waits for a version other than that: what
    is committed between the look and the wait is not slept through. A notice carries no data, and a lost one costs
    only the waiter's time-out, because the database is what everybody reads."""

    def __init__(self) -> None:
        self._condition = threading.Condition()
        self._versions: dict[str, int] = {}
        self._sleepers: dict[str, set[tuple[asyncio.AbstractEventLoop, asyncio.Event]]] = {}
        self.is_closed = False

    def version(self, topic: str) -> int:
        with self._condition:
            return self._versions.get(topic, 0)

    def notify(self, *topics: str) -> None:
        """Call it after the commit."""
        with self._condition:
            for topic in topics:
                self._versions[topic] = self._versions.get(topic, 0) + 1
                for loop, event in self._sleepers.get(topic, ()):
                    loop.call_soon_threadsafe(event.set)
            self._condition.notify_all()

    def close(self) -> None:
        """The service stops: everybody is woken, and open streams end. A server waits for them before it exits."""
        with self._condition:
            self.is_closed = True
            topics = list(self._sleepers)
        self.notify(*topics)

    def wait(self, topic: str, seen: int, timeout_s: float) -> int:
        """Blocks this thread until the version is no longer `seen`, at most `timeout_s`; returns the version."""
        with self._condition:
            self._condition.wait_for(lambda: self._versions.get(topic, 0) != seen, timeout_s)
            return self._versions.get(topic, 0)

    async def wait_async(self, topic: str, seen: int, timeout_s: float) -> int:
        """The same for a coroutine."""
        sleeper = (asyncio.get_running_loop(), asyncio.Event())
        with self._condition:
            if self.is_closed or self._versions.get(topic, 0) != seen:
                return self._versions.get(topic, 0)
            self._sleepers.setdefault(topic, set()).add(sleeper)
        try:
            async with asyncio.timeout(timeout_s):
                await sleeper[1].wait()
        except TimeoutError:
            pass
        finally:
            with self._condition:
                self._sleepers[topic].discard(sleeper)
                if not self._sleepers[topic]:
                    del self._sleepers[topic]
        return self.version(topic)


class Launcher(Protocol):
    """The fast road to a host. Best effort: a host also asks for its work by HTTP, so a lost message costs seconds."""

    def send_launch(self, host: str, job: str, attempt: int, fence: int) -> None: ...

    def send_prepare(self, host: str, profile: str) -> None: ...


class NullLauncher:
    """Without Redis nothing is sent; hosts learn of their work from the reply to their beat."""

    def send_launch(self, host: str, job: str, attempt: int, fence: int) -> None:
        return None

    def send_prepare(self, host: str, profile: str) -> None:
        return None


@dataclass(frozen=True)
class Services:
    settings: Settings
    database: Database
    blobs: BlobStore
    clock: Callable[[], float]  # seconds since the epoch; the only clock that decides
    wake: Wake
    launcher: Launcher
    templates: Jinja2Templates
    planned: Memo = field(default_factory=lambda: Memo(MOST_PLANNED))


def build_services(settings: Settings, clock: Callable[[], float] = time) -> Services:
    """Opens the database and the folders; starts nothing. `pegbox tokens create` uses it beside a running server."""
    from app.pages.environment import build_templates  # which knows callers, and they know services

    launcher: Launcher = NullLauncher()
    if settings.redis_url:
        from app.launcher import CeleryLauncher  # Celery's import takes a while, and many need none

        launcher = CeleryLauncher(settings.redis_url)
    return Services(
        settings=settings,
        database=Database(settings.database_url),
        blobs=BlobStore(settings.blob_dir),
        clock=clock,
        wake=Wake(),
        launcher=launcher,
        templates=build_templates(),
    )


def get_services(request: Request) -> Services:
    services = request.app.state.services
    assert isinstance(services, Services)
    return services


AnyServices = Annotated[Services, Depends(get_services)]
