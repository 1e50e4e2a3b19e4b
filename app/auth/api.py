"""/api/v1/tokens, for administrators, and /api/v1/users/me."""

from typing import Annotated, Literal

from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field
from sqlmodel import col, select

from app.auth.admission import Admin, AnyCaller
from app.auth.caller import Role
from app.auth.tokens import create_token, revoke_token, token_id
from app.problems import not_found
from app.services import AnyServices
from app.tables import ApiToken, User
from app.times import Time

router = APIRouter(prefix="/api/v1", tags=["users"])


class Me(BaseModel):
    id: str | None  # none: a token made on the server's command line
    name: str
    role: Role
    kind: Literal["session", "token"]


class NewToken(BaseModel):
    model_config = ConfigDict(extra="forbid")

    name: Annotated[str, Field(max_length=200)]
    role: str = "member"


class TokenView(BaseModel):
    id: str
    name: str
    role: str
    user: str | None
    host: str | None  # a worker's token is bound to one host
    created_at: Time
    used_at: Time | None  # to the minute
    revoked_at: Time | None


class ShownToken(TokenView):
    token: str  # here and never again


class TokenList(BaseModel):
    data: list[TokenView]
    next_cursor: None = None
    has_more: Literal[False] = False


@router.get("/users/me")
def me(caller: AnyCaller) -> Me:
    return Me(id=caller.user_id, name=caller.name, role=caller.role, kind=caller.kind)


@router.get("/tokens")
def list_tokens(_: Admin, services: AnyServices) -> TokenList:
    with services.database.read() as session:
        rows = session.exec(select(ApiToken, User).join(User, isouter=True).order_by(col(ApiToken.id))).all()
    return TokenList(data=[_view(row, user) for row, user in rows])


@router.post("/tokens", status_code=201)
def post_token(body: NewToken, caller: Admin, services: AnyServices) -> ShownToken:
    """A worker's token belongs to no person, so it outlives the one who made it."""
    user = None if body.role == "worker" else caller.user_id
    token = create_token(services.database, body.name, body.role, user, services.clock())
    with services.database.read() as session:
        row = session.get_one(ApiToken, token_id(token))
        return ShownToken(
            **_view(row, session.get(User, user) if user else None).model_dump(mode="python"), token=token
        )


@router.delete("/tokens/{id}", status_code=204)
def delete_token(id: str, _: Admin, services: AnyServices) -> None:
    """Revokes it; the row stays, so that what it did can still be told."""
    if not revoke_token(services.database, id, services.clock()):
        raise not_found("token", id)


def _view(row: ApiToken, user: User | None) -> TokenView:
    return TokenView(
        id=row.id,
        name=row.name,
        role=row.role,
        user=user.name if user else None,
        host=row.host,
        created_at=row.created_at,
        used_at=row.used_at,
        revoked_at=row.revoked_at,
    )
