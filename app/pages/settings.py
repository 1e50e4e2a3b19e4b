"""One's own password, and for administrators the API tokens."""

from typing import Annotated, Any

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from sqlmodel import Session, col, select

from app.auth import Admin, AnyCaller, create_token, revoke_token
from app.problems import not_found
from app.services import AnyServices
from app.tables import ApiToken, Host, User

router = APIRouter(include_in_schema=False)


@router.get("/settings")
def settings_page(request: Request, services: AnyServices, caller: AnyCaller, saved: str = "") -> Response:
    with services.database.read() as session:
        context = _context(session, caller.user_id) | {"saved": saved}
    return services.templates.TemplateResponse(request, "settings.html", context)


@router.post("/settings/tokens")
def make_token(
    request: Request,
    services: AnyServices,
    caller: Admin,
    name: Annotated[str, Form(max_length=100)],
    role: Annotated[str, Form()],
) -> Response:
    """Rendered in the reply to the POST itself, since the token is stored nowhere."""
    token = create_token(services.database, name, role, None if role == "worker" else caller.user_id)
    with services.database.read() as session:
        context = _context(session, caller.user_id) | {"new_token": token, "new_token_name": name}
    return services.templates.TemplateResponse(request, "settings.html", context)


@router.post("/settings/tokens/{token_id}/revoke")
def end_token(request: Request, services: AnyServices, caller: Admin, token_id: str) -> Response:
    if not revoke_token(services.database, token_id, services.clock()):
        raise not_found("token", token_id)
    return RedirectResponse(f"{request.scope.get('root_path', '')}/settings", 303)


def _context(session: Session, user_id: str | None) -> dict[str, Any]:
    user = session.get(User, user_id) if user_id else None
    hosts = dict(session.exec(select(Host.id, Host.name)).all())
    tokens = session.exec(select(ApiToken).order_by(col(ApiToken.created_at).desc())).all()
    return {
        "saved": "",
        "new_token": "",
        "new_token_name": "",
        "has_password": user is not None and user.password_hash is not None,
        "tokens": [
            token.model_dump(exclude={"host", "secret_sha256"}) | {"host": hosts.get(token.host or "")}
            for token in tokens
        ],
    }
