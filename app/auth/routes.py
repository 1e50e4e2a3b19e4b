"""Log in, log out, and one's own password."""

from typing import Annotated

from fastapi import APIRouter, Form, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import RedirectResponse, Response
from sqlmodel import select

from app.auth import sessions
from app.auth.admission import AnyCaller, caller_or_nobody
from app.auth.passwords import hash_password, is_password
from app.auth.throttle import LoginThrottle
from app.problems import Problem
from app.services import AnyServices, Services
from app.tables import User
from core.errors import UserError

router = APIRouter(include_in_schema=False)

Text = Annotated[str, Form(max_length=2000)]


@router.get("/login")
def login_page(request: Request, services: AnyServices, next: str = "") -> Response:
    if caller_or_nobody(request) is not None:
        return _to(request, next)
    return services.templates.TemplateResponse(request, "login.html", {"next": next, "name": "", "errors": {}})


@router.post("/login")
async def log_in(
    request: Request, services: AnyServices, name: Text = "", password: Text = "", next: Text = ""
) -> Response:
    address = request.client.host if request.client else ""
    throttle: LoginThrottle = request.app.state.throttle
    try:
        throttle.count_try(name, address)
        user = await run_in_threadpool(_find_user, services, name)
        if not await is_password(user.password_hash if user else None, password) or user is None:
            raise Problem(403, UserError("auth.wrong", "password"))
    except Problem as problem:
        context = {"next": next, "name": name, "errors": {"password": str(problem.error)}}
        return services.templates.TemplateResponse(
            request, "login.html", context, status_code=problem.status, headers=problem.headers
        )
    throttle.forgive(name, address)
    return await _enter(request, services, user.id, next)


@router.get("/login/{token}")
def link_page(request: Request, services: AnyServices, token: str) -> Response:
    """Only a button: mail and chat programs open a link to show a preview, and must not use it up."""
    is_valid = sessions.is_link_valid(services, token)
    return services.templates.TemplateResponse(
        request, "login_link.html", {"is_valid": is_valid}, status_code=200 if is_valid else 410
    )


@router.post("/login/{token}")
async def log_in_by_link(request: Request, services: AnyServices, token: str) -> Response:
    user = await run_in_threadpool(sessions.use_link, services, token)
    if user is None:
        return services.templates.TemplateResponse(request, "login_link.html", {"is_valid": False}, status_code=410)
    return await _enter(request, services, user, "")


@router.post("/logout")
async def log_out(request: Request, services: AnyServices, caller: AnyCaller) -> Response:
    if caller.kind == "session":
        await run_in_threadpool(sessions.close_session, services, caller.id)
    response = RedirectResponse(f"{request.scope.get('root_path', '')}/login", 303)
    response.delete_cookie(
        sessions.cookie_name(services.settings), secure=services.settings.is_https, httponly=True, samesite="lax"
    )
    return response


@router.post("/settings/password")
async def set_password(
    request: Request, services: AnyServices, caller: AnyCaller, password: Text = "", current_password: Text = ""
) -> Response:
    """The first password needs none before it (a one-time link logged its owner in); a change needs the current one.
    Raises 422 with the field at fault."""
    if caller.kind != "session" or caller.user_id is None:
        raise Problem(403, UserError("auth.session_only"))
    user = await run_in_threadpool(_get_user, services, caller.user_id)
    if user.password_hash is not None:
        throttle: LoginThrottle = request.app.state.throttle
        address = request.client.host if request.client else ""
        throttle.count_try(user.name, address)
        if not await is_password(user.password_hash, current_password):
            raise UserError("auth.wrong_current", "current_password")
        throttle.forgive(user.name, address)
    password_hash = await hash_password(password)
    await run_in_threadpool(_store_password, services, caller.user_id, password_hash)
    await run_in_threadpool(sessions.close_other_sessions, services, caller)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/settings?saved=password", 303)


def _find_user(services: Services, name: str) -> User | None:
    with services.database.read() as session:
        return session.exec(select(User).where(User.name == name, User.disabled_at == None)).first()  # noqa: E711 - SQL


def _get_user(services: Services, user: str) -> User:
    with services.database.read() as session:
        return session.get_one(User, user)


def _store_password(services: Services, user: str, password_hash: str) -> None:
    with services.database.write() as session:
        session.get_one(User, user).password_hash = password_hash


async def _enter(request: Request, services: Services, user: str, next: str) -> Response:
    name = sessions.cookie_name(services.settings)
    cookie = await run_in_threadpool(sessions.open_session, services, user, request.cookies.get(name))
    response = _to(request, next)
    response.set_cookie(
        name,
        cookie,
        max_age=int(sessions.SESSION_S),
        path="/",
        secure=services.settings.is_https,
        httponly=True,
        samesite="lax",
    )
    return response


def _to(request: Request, next: str) -> RedirectResponse:
    """`next` leads to a page of ours, never to another site: `//evil` and `/\\evil` are another site to a browser."""
    is_ours = next.startswith("/") and not next.startswith("//") and "\\" not in next and next.isprintable()
    return RedirectResponse(next if is_ours else f"{request.scope.get('root_path', '')}/jobs", 303)
