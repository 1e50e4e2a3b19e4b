"""Nobody gets in by default: every route there is, asked by everyone of the cast."""

import re

import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import Mount

from app.auth.admission import SAFE_METHODS, VIEWER_MAY_POST
from app.security import HEADERS
from tests.app.conftest import ORIGIN, House

PUBLIC = {
    ("GET", "/login"),
    ("POST", "/login"),
    ("GET", "/login/{token}"),
    ("POST", "/login/{token}"),
    ("GET", "/healthz"),
    ("GET", "/readyz"),
}
ADMINS_ONLY = {("GET", "/api/v1/tokens"), ("POST", "/api/v1/tokens"), ("DELETE", "/api/v1/tokens/{id}")}


def routes(house: House) -> list[tuple[str, str]]:
    found = []
    for route in iter_route_contexts(house.app.routes):
        original = getattr(route, "original_route", route)
        if isinstance(original, Mount):
            assert original.path == "/static"  # public files; any other mount would go round the dependency
            continue
        assert isinstance(original, APIRoute), f"{original} has no dependencies, so nobody is turned away there"
        assert route.path is not None and route.methods
        found += [(method, route.path) for method in route.methods]
    assert len(found) > 30
    return found


def example(path: str) -> str:
    return re.sub(r"\{[^}]*\}", "x1", path)


def is_api(path: str) -> bool:
    return path.startswith(("/api/", "/worker/"))


def test_every_route_turns_a_stranger_away_unless_it_is_listed(house: House) -> None:
    stranger = house.client()
    for method, path in routes(house):
        response = stranger.request(method, example(path))
        if (method, path) in PUBLIC:
            assert response.status_code in (200, 403, 410), (method, path)
        elif is_api(path):
            assert response.status_code == 401, (method, path)
            assert response.headers["www-authenticate"] == "Bearer"
        elif path.endswith("/live"):
            assert response.status_code in (303, 401), (method, path)
        else:
            assert response.status_code == 303, (method, path)
            assert response.headers["location"].startswith("/login"), (method, path)


def test_a_worker_reaches_its_own_routes_and_no_other(house: House) -> None:
    wanda = house.api("wanda")
    num_its_own = 0
    for method, path in routes(house):
        if (method, path) in PUBLIC:
            continue
        is_forbidden = wanda.request(method, example(path)).status_code == 403
        assert is_forbidden != path.startswith("/worker/v1"), (method, path)
        num_its_own += path.startswith("/worker/v1")
    assert num_its_own > 5


@pytest.mark.parametrize("who", ["alice", "bob", "victor"])
def test_nobody_else_reaches_the_workers_routes(house: House, who: str) -> None:
    for method, path in routes(house):
        if path.startswith("/worker/v1"):
            assert house.api(who).request(method, example(path)).status_code == 403, (method, path)


def test_a_viewer_changes_nothing(house: House) -> None:
    victor = house.api("victor")
    num_refused = 0
    for method, path in routes(house):
        if method in SAFE_METHODS or (method, path) in PUBLIC or VIEWER_MAY_POST.fullmatch(path):
            continue
        response = victor.request(method, example(path))
        assert response.status_code == 403, (method, path)
        num_refused += 1
    assert num_refused > 10


def test_only_an_administrator_handles_tokens(house: House) -> None:
    for method, path in ADMINS_ONLY:
        assert house.api("bob").request(method, example(path)).status_code == 403
        assert house.api("alice").request(method, example(path)).status_code in (200, 404, 422)


def test_an_unknown_or_revoked_token_is_nobodys(house: House) -> None:
    forged = house.tokens["bob"][:-1] + ("0" if house.tokens["bob"][-1] != "0" else "1")
    for token in (forged, "pegbox_x_y", "", "Basic", house.tokens["bob"].upper()):
        response = house.client(Authorization=f"Bearer {token}").get("/api/v1/users/me")
        assert response.status_code == 401, token
    assert house.client(Authorization="Basic Ym9iOg==").get("/api/v1/users/me").status_code == 401


def test_every_reply_carries_the_headers_that_keep_a_browser_safe(house: House) -> None:
    replies = [house.client().request(method, example(path)) for method, path in routes(house)]
    replies += [
        house.api("alice").request(method, example(path))
        for method, path in routes(house)
        if method == "GET" and not path.endswith("/live")
    ]
    replies += [
        house.client().get("/nowhere"),
        house.client(Host="evil.example").get("/"),
        house.client().post("/login", content=b"x" * (9 * 2**20)),
    ]
    assert {reply.status_code for reply in replies} >= {200, 303, 400, 401, 404, 413}
    for reply in replies:
        for name, value in HEADERS.items():
            if name != "Content-Security-Policy" or "sandbox" not in reply.headers[name]:
                assert reply.headers[name] == value, (reply.url, name)
        assert re.fullmatch("[0-9a-f]{16}", reply.headers["x-request-id"])


def test_the_content_security_policy_is_the_published_one() -> None:
    assert HEADERS["Content-Security-Policy"] == (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
        "form-action 'self'; frame-ancestors 'none'; base-uri 'none'"
    )


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1.evil.example", "localhost@evil.example", "evil@localhost", "", "[::1", "a b"]
)
def test_a_strangers_host_name_is_refused_on_every_route(house: House, host: str) -> None:
    for method, path in routes(house):
        response = house.client(Host=host).request(method, example(path))
        assert response.status_code == 400 and "set PEGBOX_URL" in response.text, path


def test_a_body_without_a_length_is_cut_at_the_limit(house: House) -> None:
    pieces = (b"x" * 2**20 for _ in range(9))
    response = house.api("bob").post("/api/v1/jobs", content=pieces, headers={"Content-Type": "application/json"})
    assert response.status_code == 413
    assert "larger than 8,388,608 bytes" in response.json()["detail"]


def test_the_api_is_described_for_its_users_alone(house: House) -> None:
    schema = house.api("victor").get("/api/v1/openapi.json").json()
    assert schema["openapi"].startswith("3.1")
    assert schema["paths"].keys() >= {"/api/v1/jobs", "/api/v1/datasets/{name}", "/api/v1/jobs/preflight"}
    assert not any(path.startswith("/settings") for path in schema["paths"])
    for path in ("/openapi.json", "/docs", "/redoc"):
        assert house.api("alice").get(path).status_code == 404


@pytest.mark.parametrize("host", ["localhost", "localhost:9", "127.0.0.1:8000", "[::1]:8000", "LOCALHOST"])
def test_our_own_names_are_answered(house: House, host: str) -> None:
    assert house.client(Host=host).get("/healthz").status_code == 200


def test_only_what_is_public_and_named_by_its_content_may_be_kept_by_a_browser(house: House) -> None:
    stranger = house.client()
    assert stranger.get("/static/app.css?v=0123").headers["cache-control"] == "public, max-age=31536000, immutable"
    assert stranger.get("/static/app.css").headers["cache-control"] == "no-cache"
    assert stranger.get("/static/none.css?v=0123").headers["cache-control"] == "no-cache"
    assert house.api("bob").get("/api/v1/users/me").headers["cache-control"] == "no-store"
    for path in ("/static/../app/main.py", "/static/%2e%2e/app/main.py", "/static//etc/passwd", "/static/..%5capp"):
        assert stranger.get(path).status_code in (303, 404), path


def test_a_request_id_is_taken_over_if_it_is_one(house: House) -> None:
    assert house.client(**{"X-Request-Id": "abc-1"}).get("/healthz").headers["x-request-id"] == "abc-1"
    assert house.client(**{"X-Request-Id": "a b<script>"}).get("/healthz").headers["x-request-id"] != "a b<script>"


# -- browsers ------------------------------------------------------------------------------------------------------
def csrf_of(house: House) -> str:
    from sqlmodel import col, select

    from app.tables import LoginSession

    with house.services.database.read() as session:
        return session.exec(select(LoginSession.csrf).order_by(col(LoginSession.created_at).desc())).first() or ""


def test_a_browser_must_send_its_sessions_token_to_change_anything(house: House) -> None:
    bob = house.browser("bob")
    csrf = csrf_of(house)
    refused = bob.delete("/api/v1/datasets/none")
    assert refused.status_code == 403 and refused.json()["errors"][0]["code"] == "auth.csrf"
    assert bob.delete("/api/v1/datasets/none", headers={"X-CSRF-Token": csrf[:-1] + "_"}).status_code == 403
    assert bob.delete("/api/v1/datasets/none", headers={"X-CSRF-Token": csrf}).status_code == 404
    assert bob.post("/logout").status_code == 403
    assert bob.post("/logout", data={"_csrf": csrf}).status_code == 303


def test_another_sites_page_can_change_nothing_even_with_the_token(house: House) -> None:
    bob = house.browser("bob")
    csrf = csrf_of(house)
    for foreign in (
        {"Origin": "https://evil.example"},
        {"Origin": "null"},
        {"Origin": "http://127.0.0.1:9999"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ):
        response = bob.delete("/api/v1/datasets/none", headers={"X-CSRF-Token": csrf, **foreign})
        assert response.status_code == 403, foreign
        assert response.json()["errors"][0]["code"] == "auth.foreign_origin"
    own = {"Origin": ORIGIN, "Sec-Fetch-Site": "same-origin", "X-CSRF-Token": csrf}
    assert bob.delete("/api/v1/datasets/none", headers=own).status_code == 404


def test_another_sites_page_cannot_log_its_visitor_in(house: House) -> None:
    response = house.client(Origin="https://evil.example").post("/login", data={"name": "alice", "password": "x"})
    assert response.status_code == 403


def test_a_token_needs_neither_origin_nor_csrf(house: House) -> None:
    response = house.api("bob").delete("/api/v1/datasets/none", headers={"Origin": "https://elsewhere.example"})
    assert response.status_code == 404


def test_a_page_without_a_session_leads_to_the_log_in_and_back(house: House) -> None:
    response = house.client().get("/jobs?filter=state:running&q=a%20b")
    assert response.status_code == 303
    assert response.headers["location"] == "/login?next=/jobs%3Ffilter%3Dstate%3Arunning%26q%3Da%2520b"


def test_a_fragment_without_a_session_takes_the_whole_page_to_the_log_in(house: House) -> None:
    headers = {"HX-Request": "true", "HX-Current-URL": f"{ORIGIN}/jobs?x=1"}
    response = house.client(**headers).get("/jobs")
    assert response.status_code == 401
    assert response.headers["hx-redirect"] == "/login?next=/jobs%3Fx%3D1"


def test_a_changed_role_and_a_disabled_user_count_at_the_next_request(house: House) -> None:
    from app.tables import User

    bob, program = house.browser("bob"), house.api("bob")
    assert bob.get("/api/v1/users/me").json()["role"] == "member"
    with house.services.database.write() as session:
        session.get_one(User, house.users["bob"]).role = "viewer"
    assert bob.get("/api/v1/users/me").json()["role"] == "viewer"
    assert program.delete("/api/v1/datasets/none").status_code == 403  # no token may more than its owner
    with house.services.database.write() as session:
        session.get_one(User, house.users["bob"]).disabled_at = 1.0
    assert bob.get("/api/v1/users/me").status_code == 401
    assert program.get("/api/v1/users/me").status_code == 401
