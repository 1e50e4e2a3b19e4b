"""The web service, put together. `uvicorn --factory app.main:create_app`, or `pegbox web`.

Order at the start: the lock of the data directory, the schema, the first user, the loops; only then does the server
answer. At the end the loops stop first, so that nothing is written by a process that has given up its lock."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from time import time

from fastapi import Depends, FastAPI
from fastapi.concurrency import run_in_threadpool
from fastapi.staticfiles import StaticFiles

from app import health, hosts, job_api, live, models, preflight, presets, worker_api
from app.auth import admit, link_if_nobody_can_log_in
from app.auth.api import router as accounts_router
from app.auth.routes import router as auth_router
from app.auth.throttle import LoginThrottle
from app.data_dir import hold_data_dir
from app.datasets.routes import router as datasets_router
from app.dispatcher import Dispatcher
from app.migration import migrate
from app.pages import install_pages
from app.problems import install_problems
from app.recorder import StreamReader
from app.security import Border
from app.services import STATIC_DIR, Services, build_services
from app.settings import Settings, load_settings
from app.sweeper import Sweeper

# The first that matches answers, so /jobs/live stands before the pages' /jobs/{id}.
ROUTERS = (
    health.router,
    auth_router,
    accounts_router,
    datasets_router,
    hosts.router,
    models.router,
    presets.router,
    preflight.router,
    job_api.router,
    live.router,
    worker_api.router,
)


def create_app(
    settings: Settings | None = None, clock: Callable[[], float] = time, *, is_leader: bool = True
) -> FastAPI:
    """`is_leader`: the one process over a database that records, dispatches and sweeps."""
    services = build_services(settings or load_settings(), clock)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        with hold_data_dir(services.settings.data_dir):
            await run_in_threadpool(_prepare, services)
            loops = _loops(services) if is_leader else []
            for loop in loops:
                loop.start()
            app.state.is_ready = True
            yield
            app.state.is_ready = False
            services.wake.close()
            for loop in reversed(loops):
                await run_in_threadpool(loop.stop)
        services.database.close()

    app = FastAPI(
        title="Pegbox",
        lifespan=lifespan,
        dependencies=[Depends(admit)],
        # Served by app.health under the same rules as everything else.
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
    )
    app.state.services = services
    app.state.throttle = LoginThrottle(services.clock)
    app.state.is_ready = False
    install_problems(app)
    app.add_middleware(Border, settings=services.settings)
    for router in ROUTERS:
        app.include_router(router)
    install_pages(app, services)
    app.mount("/static", StaticFiles(directory=STATIC_DIR, check_dir=False), name="static")
    return app


def _prepare(services: Services) -> None:
    migrate(services.database)
    services.blobs.remove_unfinished()
    link = link_if_nobody_can_log_in(services)
    if link is not None:
        print(f"Log in once, within a day, at {link}", flush=True)  # noqa: T201 - for the person who starts it


def _loops(services: Services) -> tuple[Dispatcher | Sweeper | StreamReader, ...]:
    """What runs beside the requests, each a thread."""
    reader = (StreamReader(services),) if services.settings.redis_url else ()
    return (*reader, Dispatcher(services), Sweeper(services))
