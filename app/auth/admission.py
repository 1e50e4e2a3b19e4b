"""Nobody gets in by default.

`admit` is a dependency of the whole application, so it runs before every route, also before those that somebody adds
next year and forgets to think about. It knows the caller or turns them away; only the paths of PUBLIC are for
everybody. What a role may do follows from the method: reading needs `viewer`, changing needs `member`. A route that
needs more says `needs("admin")`; the few changes that a viewer may make stand in VIEWER_MAY_POST.

A browser sends its cookie along with whatever any page asks of it, so a request that changes something must also come
from our own pages (Origin, Sec-Fetch-Site) and carry the session's token. A bearer token is never sent by itself, so
these checks don't concern it."""

import re
from collections.abc import Callable
from hmac import compare_digest
from typing import Annotated
from urllib.parse import quote, urlsplit

from fastapi import Depends, Request
from fastapi.concurrency import run_in_threadpool
from starlette._utils import get_route_path

from app.auth.caller import Caller, Role
from app.auth.sessions import cookie_name, find_session
from app.auth.tokens import find_token
from app.problems import LogInFirst, Problem, is_api
from app.services import get_services
from app.settings import Settings
from core.errors import UserError
from core.wire import WORKER_PREFIX

# Matched against the path that the router matches, not a route's template, which lacks the prefix of an including one.
PUBLIC = re.compile(r"/login(/[^/]+)?|/healthz|/readyz")
VIEWER_MAY_POST = re.compile(
    r"/logout|/settings/password|(/api/v1)?/jobs/preflight|/knobs/[a-z]+|/api/v1/jobs/[^/]+/clone"
)
SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
FORM_TYPES = ("application/x-www-form-urlencoded", "multipart/form-data")


async def admit(request: Request) -> None:
    path = get_route_path(request.scope)
    scheme, _, credentials = request.headers.get("authorization", "").partition(" ")
    has_bearer = scheme.lower() == "bearer"
    if not has_bearer and request.method not in SAFE_METHODS:
        refuse_foreign_origin(request)
    caller = await _find_caller(request, credentials.strip() if has_bearer else None)
    request.state.caller = caller
    if PUBLIC.fullmatch(path):
        return
    if caller is None:
        raise _turned_away(request, has_bearer)
    if caller.kind == "session" and request.method not in SAFE_METHODS:
        await _check_csrf(request, caller)
    if not caller.may(_role_needed(request.method, path)):
        raise Problem(403, UserError("auth.forbidden", "", role=caller.role))


def _role_needed(method: str, path: str) -> Role:
    if path.startswith(f"{WORKER_PREFIX}/"):
        return "worker"
    return "viewer" if method in SAFE_METHODS or VIEWER_MAY_POST.fullmatch(path) else "member"


async def _find_caller(request: Request, token: str | None) -> Caller | None:
    services = get_services(request)
    if token is not None:
        return await run_in_threadpool(find_token, services.database, token, services.clock())
    cookie = request.cookies.get(cookie_name(services.settings))
    return await run_in_threadpool(find_session, services, cookie) if cookie else None


def _turned_away(request: Request, has_bearer: bool) -> Exception:
    """A page sends to the log-in page; a program gets 401."""
    if is_api(request) or has_bearer or "text/event-stream" in request.headers.get("accept", ""):
        code = "auth.bad_token" if has_bearer else "auth.who"
        return Problem(401, UserError(code), {"WWW-Authenticate": "Bearer"})
    root_path = request.scope.get("root_path", "")
    if "hx-request" in request.headers:
        # A redirect would be followed by the script and the log-in page swapped into a corner of this one.
        here = urlsplit(request.headers.get("hx-current-url", ""))
        return Problem(401, UserError("auth.who"), {"HX-Redirect": _login_location(root_path, here.path, here.query)})
    if request.method not in SAFE_METHODS:
        return LogInFirst(_login_location(root_path, "", ""))
    return LogInFirst(_login_location(root_path, request.url.path, request.url.query))


def _login_location(root_path: str, path: str, query: str) -> str:
    target = f"{path}?{query}" if query else path
    return f"{root_path}/login" + (f"?next={quote(target, safe='/')}" if target else "")


# -- requests of a browser -----------------------------------------------------------------------------------------


def refuse_foreign_origin(request: Request) -> None:
    """Raises Problem 403 when a browser says that another site's page made this request."""
    site = request.headers.get("sec-fetch-site")
    if site is not None and site not in ("same-origin", "none"):
        raise Problem(403, UserError("auth.foreign_origin"))
    origin = request.headers.get("origin")
    if origin is not None and not is_own_origin(origin, request.headers.get("host", ""), _settings(request)):
        raise Problem(403, UserError("auth.foreign_origin"))


def is_own_origin(origin: str, host: str, settings: Settings) -> bool:
    """The host header was checked against the allowed names before. Behind a proxy that ends TLS the schemes differ."""
    own = urlsplit(settings.url)
    return urlsplit(origin).netloc in {host, own.netloc} - {""}


def _settings(request: Request) -> Settings:
    return get_services(request).settings


async def _check_csrf(request: Request, caller: Caller) -> None:
    sent = request.headers.get("x-csrf-token")
    if sent is None and request.headers.get("content-type", "").startswith(FORM_TYPES):
        value = (await request.form()).get("_csrf")
        sent = value if isinstance(value, str) else None
    if sent is None or not compare_digest(sent.encode(), caller.csrf.encode()):
        raise Problem(403, UserError("auth.csrf"))


# -- for routes ----------------------------------------------------------------------------------------------------


def get_caller(request: Request) -> Caller:
    caller = request.state.caller
    assert isinstance(caller, Caller), "a public route asks for who may be nobody: see caller_or_nobody"
    return caller


def caller_or_nobody(request: Request) -> Caller | None:
    caller = getattr(request.state, "caller", None)
    assert caller is None or isinstance(caller, Caller)
    return caller


def needs(role: Role) -> Callable[[Request], Caller]:
    """A dependency: the caller, who has at least this role, else 403."""

    def check(request: Request) -> Caller:
        caller = get_caller(request)
        if not caller.may(role):
            raise Problem(403, UserError("auth.forbidden", "", role=caller.role))
        return caller

    return check


AnyCaller = Annotated[Caller, Depends(get_caller)]
Member = Annotated[Caller, Depends(needs("member"))]
Admin = Annotated[Caller, Depends(needs("admin"))]
Worker = Annotated[Caller, Depends(needs("worker"))]
