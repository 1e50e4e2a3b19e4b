"""API tokens `pegbox_<id>_<secret>`: the id finds the row, the secret is 256 random bits of which only the SHA-256 is
stored. So many bits need no slow hash, and a copy of the database holds nothing that logs anyone in."""

import hashlib
import re
import secrets
from hmac import compare_digest
from time import time
from typing import get_args

from sqlmodel import select

from app.auth.caller import Caller, Role, weaker
from app.database import Database
from app.ids import new_id
from app.tables import ApiToken, User
from core.errors import UserError

TOKEN = re.compile(r"pegbox_(?P<id>[0-9a-z]{26})_(?P<secret>[0-9a-f]{64})")
USED_EVERY_S = 60.0  # `used_at` is that exact, so that a busy client doesn't write once a request


def sha256_hex(secret: str) -> str:
    return hashlib.sha256(secret.encode()).hexdigest()


def create_token(database: Database, name: str, role: str, user: str | None = None, now: float | None = None) -> str:
    """The token, shown once. Raises UserError on a role that doesn't exist or a name without a character."""
    if role not in get_args(Role):
        raise UserError("auth.role", "role", role=role, roles=", ".join(get_args(Role)))
    if not name.strip():
        raise UserError("auth.token_name", "name")
    id, secret = new_id("tok"), secrets.token_hex(32)
    with database.write() as session:
        row = ApiToken(
            id=id,
            name=name.strip(),
            role=role,
            user=user,
            secret_sha256=sha256_hex(secret),
            created_at=time() if now is None else now,
        )
        session.add(row)
    return f"pegbox_{id.removeprefix('tok_')}_{secret}"


def token_id(token: str) -> str:
    """The id of its row."""
    match = TOKEN.fullmatch(token)
    assert match is not None
    return f"tok_{match['id']}"


def revoke_token(database: Database, id: str, now: float) -> bool:
    """False where there is no such token; revoking twice is once."""
    with database.write() as session:
        row = session.get(ApiToken, id)
        if row is not None and row.revoked_at is None:
            row.revoked_at = now
        return row is not None


def find_token(database: Database, token: str, now: float) -> Caller | None:
    match = TOKEN.fullmatch(token)
    if match is None:
        return None
    with database.read() as session:
        found = session.exec(
            select(ApiToken, User).join(User, isouter=True).where(ApiToken.id == token_id(token))
        ).first()
    if found is None:
        return None
    row, user = found
    is_same = compare_digest(row.secret_sha256, sha256_hex(match["secret"]))
    if not is_same or row.revoked_at is not None or (user is not None and user.disabled_at is not None):
        return None
    if row.used_at is None or now - row.used_at > USED_EVERY_S:
        with database.write() as session:
            used = session.get_one(ApiToken, row.id)
            used.used_at = now
    role = row.role if user is None else weaker(row.role, user.role)
    return Caller(kind="token", id=row.id, user_id=row.user, name=row.name, role=role)
