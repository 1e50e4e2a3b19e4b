"""Every error leaves as RFC 9457 `application/problem+json`, or as a page where a person is looking at one.

The body also carries OpenAI's `error` member, so that their clients show our sentence. What the service did wrong is
logged whole under the request's id; the reply names the id and nothing else: no trace, no path, no SQL."""

import http
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, RedirectResponse, Response
from fastapi.templating import Jinja2Templates
from starlette._utils import get_route_path
from starlette.exceptions import HTTPException

from core.errors import UserError, UserErrors
from core.fix import fixes_of

PROBLEM_JSON = "application/problem+json"
# These paths are called by programs; everything else is a page.
API_PREFIXES = ("/api/", "/v1/", "/worker/", "/metrics", "/healthz", "/readyz")


class Problem(Exception):
    """A refusal with a status of its own (404, 409, ...); its sentence is a UserError's."""

    def __init__(
        self,
        status: int,
        error: UserError | UserErrors,
        headers: Mapping[str, str] | None = None,
        **members: str | int,  # more members of the problem's JSON, for programs
    ) -> None:
        super().__init__(status, error)
        self.status = status
        self.error = error
        self.headers = dict(headers or {})
        self.members = members


class LogInFirst(Exception):
    """A page was asked for without a session; the answer is the way to the log-in page."""

    def __init__(self, location: str) -> None:
        super().__init__(location)
        self.location = location


def not_found(thing: str, name: str) -> Problem:
    return Problem(404, UserError("app.not_found", "", thing=thing, name=name))


def is_api(request: Request) -> bool:
    return get_route_path(request.scope).startswith(API_PREFIXES)


def faults_lie_in_spec(request: Request) -> None:
    """A dependency of routes whose body is {"spec": ...}: a fault's field counts from the spec, its pointer from the
    body."""
    request.state.pointer_prefix = "/spec"


def problem_body(
    status: int, detail: str, errors: Sequence[UserError], request_id: str, prefix: str = ""
) -> dict[str, Any]:
    code = errors[0].code if errors else f"http.{status}"
    body: dict[str, Any] = {
        "type": "about:blank",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "request_id": request_id,
        "errors": [
            {"pointer": prefix + _pointer(error.field), "code": error.code, "detail": error.text()} | _fix(error)
            for error in errors
        ],
        "error": {
            "message": detail,
            "type": "server_error" if status >= 500 else "invalid_request_error",
            "param": errors[0].field or None if errors else None,
            "code": code,
        },
    }
    return body


def _pointer(field: str) -> str:
    """`data.train.0.dataset` -> `/data/train/0/dataset` (RFC 6901); "" is the whole."""
    return "".join(f"/{part.replace('~', '~0').replace('/', '~1')}" for part in field.split(".")) if field else ""


def _fix(error: UserError) -> dict[str, Any]:
    """`fix`: the key that was meant; `fixes`: fields of the spec with values, any one of which mends it."""
    suggestion, fixes = error.parameters.get("suggestion"), fixes_of(error)
    meant = {"fix": str(suggestion)} if suggestion is not None else {}
    return {**meant, "fixes": [dict(fix) for fix in fixes]} if fixes else meant


def respond(
    request: Request,
    status: int,
    errors: Sequence[UserError],
    *,
    headers: Mapping[str, str] | None = None,
    detail: str = "",
    members: Mapping[str, str | int] | None = None,
) -> Response:
    request_id = str(request.scope.get("request_id", ""))
    detail = detail or "; ".join(_sentence(error) for error in errors)
    if is_api(request):
        prefix = getattr(request.state, "pointer_prefix", "")
        body = problem_body(status, detail, errors, request_id, prefix) | dict(members or {})
        return JSONResponse(body, status_code=status, headers=dict(headers or {}), media_type=PROBLEM_JSON)
    context = {
        "status": status,
        "title": http.HTTPStatus(status).phrase,
        "detail": detail,
        "errors": errors,
        "request_id": request_id,
    }
    templates: Jinja2Templates = request.app.state.services.templates
    return templates.TemplateResponse(request, "error.html", context, status_code=status, headers=dict(headers or {}))


def _sentence(error: UserError) -> str:
    return f"{error.field}: {error.text()}" if error.field else error.text()


def _validation_faults(error: RequestValidationError) -> Iterator[UserError]:
    for detail in error.errors():
        where = [str(part) for part in detail["loc"] if part != "body"]
        if detail["type"] == "json_invalid":
            yield UserError("request.not_json", "", problem=str(detail.get("ctx", {}).get("error", detail["msg"])))
        elif detail["type"] == "extra_forbidden":
            yield UserError("request.unknown_key", ".".join(where), key=where[-1])
        else:
            yield UserError("request.invalid", ".".join(where), problem=str(detail["msg"]))


def install_problems(app: FastAPI) -> None:
    async def on_problem(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, Problem)
        return respond(request, problem.status, problem.error.errors, headers=problem.headers, members=problem.members)

    async def on_user_fault(request: Request, fault: Exception) -> Response:
        assert isinstance(fault, UserError | UserErrors)
        return respond(request, 422, fault.errors)

    async def on_validation(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        faults = list(_validation_faults(error))
        request.state.pointer_prefix = ""  # these count from the body
        return respond(request, 400 if faults[0].code == "request.not_json" else 422, faults)

    async def on_http(request: Request, error: Exception) -> Response:
        """What the framework refuses by itself: no such route, a method that a route doesn't have."""
        assert isinstance(error, HTTPException)
        codes = {404: "request.no_route", 405: "request.method"}
        faults = (
            [UserError(codes[error.status_code], "", method=request.method, path=request.url.path)]
            if error.status_code in codes
            else []
        )
        detail = "" if faults else str(error.detail)
        return respond(request, error.status_code, faults, headers=error.headers, detail=detail)

    async def on_log_in_first(request: Request, way: Exception) -> Response:
        assert isinstance(way, LogInFirst)
        return RedirectResponse(way.location, 303)

    app.add_exception_handler(Problem, on_problem)
    app.add_exception_handler(UserError, on_user_fault)
    app.add_exception_handler(UserErrors, on_user_fault)
    app.add_exception_handler(RequestValidationError, on_validation)
    app.add_exception_handler(HTTPException, on_http)
    app.add_exception_handler(LogInFirst, on_log_in_first)
