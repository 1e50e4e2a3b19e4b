"""`pegbox tokens create`: tokens made on the server's own machine, beside a running web service or before its first
start. Needs what the web service needs, and nothing of a worker."""

from app.auth import create_token, owner_of_this_machine
from app.database import Database
from app.migration import migrate
from app.services import build_services
from app.settings import Settings


def open_database(settings: Settings) -> Database:
    """The database beside a running server, or before the first start of one."""
    services = build_services(settings)
    migrate(services.database)
    return services.database


def make_token(settings: Settings, name: str, role: str) -> str:
    """On the server's machine: a person's token works in the name of its administrator, a worker's in nobody's."""
    services = build_services(settings)
    migrate(services.database)
    try:
        user = None if role == "worker" else owner_of_this_machine(services)
        return create_token(services.database, name, role, user)
    finally:
        services.database.close()
