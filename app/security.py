"""The border around the whole application: what holds for every reply, found route or not, answer or error.

It stands inside no route and asks no database. A request whose Host is not one of our names is turned away (DNS
rebinding makes a browser send its requests to us under a stranger's name). A body that isn't streamed to a file may
be 8 MiB. Each request has an id, which is in its reply and in the log. Each reply forbids the browser to run, load,
frame or guess anything that isn't ours, and to keep what only a logged-in person may see. A crash is logged whole and
answered with the id alone."""

import logging
import re
import secrets
from urllib.parse import urlsplit

from fastapi import Request
from starlette._utils import get_route_path
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app.problems import respond
from app.settings import Settings
from core.errors import UserError
from core.wire import WORKER_PREFIX

log = logging.getLogger(__name__)

HOST_HEADER = re.compile(r"(\[(?P<address>[0-9a-f:.]+)\]|(?P<name>[a-z0-9_.-]+))(:\d{1,5})?")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
# What is held in memory at once: forms, specs, batches of events. Files come by PUT, streamed, and have their own cap.
MAX_BODY_BYTES = 8 * 2**20
# A data set's measured facts: about 30 MB for a million samples of three trained turns each.
MAX_PROFILE_BYTES = 64 * 2**20
PROFILE_PATH = re.compile(rf"{WORKER_PREFIX}/(attempts/[^/]+/\d+/profile|profiles/[^/]+/(progress|result))")
STATIC_PREFIX = "/static/"

HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    # no-referrer would make browsers send `Origin: null` with our own forms.
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-store",
}


def allowed_hosts(settings: Settings) -> frozenset[str]:
    own = {settings.host.lower(), (urlsplit(settings.url).hostname or "").lower()}
    return frozenset({"localhost", "127.0.0.1", "::1"} | own - {""})


def max_body_bytes(scope: Scope) -> int | None:
    if scope["method"] == "PUT":
        return None
    return MAX_PROFILE_BYTES if PROFILE_PATH.fullmatch(get_route_path(scope)) else MAX_BODY_BYTES


def host_name(host_header: str) -> str:
    """`[::1]:8000` -> `::1`, `Pegbox.lan:80` -> `pegbox.lan`, nonsense -> ""."""
    match = HOST_HEADER.fullmatch(host_header.lower())
    return (match["address"] or match["name"]) if match else ""


class Border:
    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self._app = app
        self._hosts = allowed_hosts(settings)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        sent_id = headers.get("x-request-id", "")
        request_id = sent_id if REQUEST_ID.fullmatch(sent_id) else secrets.token_hex(8)
        scope["request_id"] = request_id
        is_static = get_route_path(scope).startswith(STATIC_PREFIX)  # now: a mount changes the scope
        has_started = False

        async def send_with_headers(message: Message) -> None:
            nonlocal has_started
            if message["type"] == "http.response.start":
                has_started = True
                reply = MutableHeaders(scope=message)
                if is_static:
                    # An address with a digest (?v=) names one content for ever; without, the browser has to ask.
                    is_pinned = message["status"] in (200, 304) and scope["query_string"].startswith(b"v=")
                    reply["Cache-Control"] = "public, max-age=31536000, immutable" if is_pinned else "no-cache"
                for name, value in HEADERS.items():
                    reply.setdefault(name, value)
                reply["X-Request-Id"] = request_id
            await send(message)

        num_received = 0
        limit = max_body_bytes(scope)

        async def receive_within_limit() -> Message:
            nonlocal num_received
            message = await receive()
            num_received += len(message.get("body", b""))
            if limit is not None and num_received > limit:
                raise HTTPException(413, UserError("upload.too_large", limit=limit).text())
            return message

        refusal = self._refusal(scope, headers)
        if refusal is not None:
            status, error = refusal
            await respond(Request(scope), status, [error])(scope, receive, send_with_headers)
            return
        try:
            await self._app(scope, receive_within_limit, send_with_headers)
        except ClientDisconnect:
            log.info("request %s %s: the client went away", request_id, scope["method"])
        except Exception as error:
            log.error("request %s %s %s failed", request_id, scope["method"], ascii(scope["path"]), exc_info=error)
            if has_started:
                raise
            fault = UserError("app.internal", "", request_id=request_id)
            await respond(Request(scope), 500, [fault])(scope, receive, send_with_headers)

    def _refusal(self, scope: Scope, headers: Headers) -> tuple[int, UserError] | None:
        hosts = headers.getlist("host")
        if len(hosts) != 1 or host_name(hosts[0]) not in self._hosts:
            return 400, UserError("request.host", "", host=ascii(", ".join(hosts))[:100])
        length = headers.get("content-length", "")
        limit = max_body_bytes(scope)
        if limit is not None and length.isascii() and length.isdigit() and int(length) > limit:
            return 413, UserError("upload.too_large", limit=limit)
        return None
