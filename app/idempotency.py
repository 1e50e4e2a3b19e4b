"""A POST that is sent again because its reply got lost does its work once.

The request's `Idempotency-Key` is kept for 24 hours with the hash of its body and the reply. Work, key and reply are
one transaction, so there is no moment at which the work is done and the key isn't known, whatever dies when; of two
requests at once the second waits for the first's commit and gets its reply. A fault keeps nothing: what was refused
may be mended and sent again under the same key."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Request, Response
from pydantic import BaseModel
from sqlmodel import Session

from app.auth import AnyCaller
from app.problems import Problem
from app.services import AnyServices, Services
from app.tables import IdempotentReply
from core.errors import UserError

KEPT_S = 24 * 3600.0
MAX_KEY_LENGTH = 255


@dataclass(frozen=True)
class Once:
    services: Services
    key: str | None
    owner: str
    route: str
    body_sha256: str

    def reply(self, status: int, act: Callable[[Session], BaseModel]) -> Response:
        """What `act` answers, having done its work in the session that it is given; or what it answered before.
        Raises Problem 422 when the key belongs to another body."""
        with self.services.database.write() as session:
            before = self._find(session)
            if before is not None:
                if before.body_sha256 != self.body_sha256:
                    raise Problem(422, UserError("request.other_body", "", key=before.key))
                return _json(before.body, before.status, {"Idempotent-Replayed": "true"})
            body = act(session).model_dump_json().encode()
            if self.key is not None:
                session.add(
                    IdempotentReply(
                        key=self.key,
                        owner=self.owner,
                        route=self.route,
                        body_sha256=self.body_sha256,
                        status=status,
                        body=body,
                        created_at=self.services.clock(),
                    )
                )
        return _json(body, status, {})

    def _find(self, session: Session) -> IdempotentReply | None:
        if self.key is None:
            return None
        row = session.get(IdempotentReply, (self.key, self.owner, self.route))
        if row is not None and row.created_at < self.services.clock() - KEPT_S:
            session.delete(row)
            session.flush()
            return None
        return row


def _json(body: bytes, status: int, headers: dict[str, str]) -> Response:
    return Response(body, status, headers, media_type="application/json")


async def once(request: Request, services: AnyServices, caller: AnyCaller) -> Once:
    key = request.headers.get("idempotency-key")
    if key is not None and not (0 < len(key) <= MAX_KEY_LENGTH and key.isascii() and key.isprintable()):
        raise Problem(400, UserError("request.bad_key", "", limit=MAX_KEY_LENGTH))
    return Once(
        services=services,
        key=key,
        owner=caller.owner,
        route=f"{request.method} {request.url.path}",
        body_sha256=hashlib.sha256(await request.body()).hexdigest(),
    )


OnlyOnce = Annotated[Once, Depends(once)]
