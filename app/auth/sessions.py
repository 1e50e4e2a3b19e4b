"""Server-side sessions of browsers, and the one-time links that open one.

The cookie is 256 random bits; the database holds its SHA-256 alone. Each log-in makes a new id and ends the session
that the browser came with, so an id planted before the log-in is worth nothing after it. Each request reads session
and user again: a log-out, a new role or a disabled user counts from the next request on."""

import secrets
from typing import cast

from sqlalchemy import delete
from sqlmodel import Session, col, select

from app.auth.caller import Caller, Role
from app.auth.tokens import sha256_hex
from app.ids import new_id
from app.services import Services
from app.settings import Settings
from app.tables import LoginLink, LoginSession, User

SESSION_S = 14 * 24 * 3600.0
SEEN_EVERY_S = 60.0
LINK_S = 24 * 3600.0


def cookie_name(settings: Settings) -> str:
    """`__Host-` makes the browser insist on Secure, path / and this very host; it needs https."""
    return "__Host-pegbox" if settings.is_https else "pegbox_session"


def open_session(services: Services, user: str, replaces: str | None) -> str:
    """A new session's cookie value."""
    cookie, now = secrets.token_urlsafe(32), services.clock()
    with services.database.write() as session:
        if replaces:
            session.execute(delete(LoginSession).where(col(LoginSession.id_sha256) == sha256_hex(replaces)))
        session.execute(delete(LoginSession).where(col(LoginSession.expires_at) < now))
        session.add(
            LoginSession(
                id_sha256=sha256_hex(cookie),
                user=user,
                csrf=secrets.token_urlsafe(32),
                created_at=now,
                seen_at=now,
                expires_at=now + SESSION_S,
            )
        )
    return cookie


def find_session(services: Services, cookie: str) -> Caller | None:
    now = services.clock()
    with services.database.read() as session:
        found = session.exec(
            select(LoginSession, User).join(User).where(LoginSession.id_sha256 == sha256_hex(cookie))
        ).first()
    if found is None or found[0].expires_at < now or found[1].disabled_at is not None:
        return None
    row, user = found
    if now - row.seen_at > SEEN_EVERY_S:
        with services.database.write() as session:
            seen = session.get(LoginSession, row.id_sha256)
            if seen is not None:
                seen.seen_at, seen.expires_at = now, now + SESSION_S
    return Caller(
        kind="session", id=row.id_sha256, user_id=user.id, name=user.name, role=cast(Role, user.role), csrf=row.csrf
    )


def close_session(services: Services, id_sha256: str) -> None:
    with services.database.write() as session:
        session.execute(delete(LoginSession).where(col(LoginSession.id_sha256) == id_sha256))


def close_other_sessions(services: Services, caller: Caller) -> None:
    """After a new password: whoever knew the old one is out."""
    with services.database.write() as session:
        session.execute(
            delete(LoginSession).where(
                col(LoginSession.user) == caller.user_id, col(LoginSession.id_sha256) != caller.id
            )
        )


# -- one-time links ------------------------------------------------------------------------------------------------


def mint_login_link(services: Services, user_name: str = "admin") -> str:
    """The address of a page with one button that logs this user in, once, within a day."""
    token, now = secrets.token_urlsafe(32), services.clock()
    with services.database.write() as session:
        user = session.exec(select(User).where(User.name == user_name)).one()
        session.execute(delete(LoginLink).where(col(LoginLink.expires_at) < now))
        session.add(LoginLink(token_sha256=sha256_hex(token), user=user.id, created_at=now, expires_at=now + LINK_S))
    return f"{services.settings.public_url}/login/{token}"


def is_link_valid(services: Services, token: str) -> bool:
    with services.database.read() as session:
        link = session.get(LoginLink, sha256_hex(token))
    return link is not None and link.used_at is None and link.expires_at >= services.clock()


def use_link(services: Services, token: str) -> str | None:
    """The user's id, to the one who comes first; none to everybody after."""
    now = services.clock()
    with services.database.write() as session:
        link = session.get(LoginLink, sha256_hex(token))
        if link is None or link.used_at is not None or link.expires_at < now:
            return None
        link.used_at = now
        return link.user


def link_if_nobody_can_log_in(services: Services) -> str | None:
    """An empty database gets the user `admin`, without a password: nobody ever gets a default one. As long as there
    is no password and no session, each start has a link to print; the first one may have been lost."""
    with services.database.write() as session:
        _first_user(session, services.clock())
        has_password = session.exec(select(User.id).where(col(User.password_hash).is_not(None)).limit(1)).first()
        live = select(LoginSession.user).where(col(LoginSession.expires_at) >= services.clock())
        has_session = session.exec(live.limit(1)).first()
    return None if has_password or has_session else mint_login_link(services)


def owner_of_this_machine(services: Services) -> str:
    """In whose name a token works that was made on the server itself: whoever may read its files is its administrator.
    The id of the first user, who is made where there is none yet."""
    with services.database.write() as session:
        return _first_user(session, services.clock())


def _first_user(session: Session, now: float) -> str:
    user = session.exec(select(User).order_by(col(User.created_at), col(User.id)).limit(1)).first()
    if user is None:
        user = User(id=new_id("user"), name="admin", role="admin", created_at=now)
        session.add(user)
        session.flush()
    return user.id
