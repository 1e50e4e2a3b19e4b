"""Passwords, sessions, one-time links and tokens."""

import threading
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlmodel import select

from app.auth import create_token, mint_login_link, passwords
from app.auth.sessions import SESSION_S
from app.auth.throttle import FREE_TRIES_AN_ACCOUNT
from app.main import create_app
from app.tables import LoginSession, User
from core.errors import UserError
from tests.app.conftest import ORIGIN, Clock, House, settings_in

PASSWORD = "seven violins, one bow"


def csrf_of(house: House, client: TestClient) -> str:
    with house.services.database.read() as session:
        return session.exec(select(LoginSession.csrf)).all()[-1]


def set_password(house: House, client: TestClient, password: str = PASSWORD, current: str = "") -> int:
    form = {"password": password, "current_password": current, "_csrf": csrf_of(house, client)}
    return client.post("/settings/password", data=form).status_code


def log_in(house: House, name: str, password: str, **form: str) -> TestClient:
    client = house.client(Origin=ORIGIN)
    client.last = client.post("/login", data={"name": name, "password": password, **form})  # type: ignore[attr-defined]
    return client


def test_the_first_start_prints_a_link_that_makes_an_administrator(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with TestClient(create_app(settings_in(tmp_path), clock=Clock(), is_leader=False), base_url=ORIGIN) as client:
        printed = capsys.readouterr().out
        link = printed.split()[-1]
        assert link.startswith(f"{ORIGIN}/login/") and len(link.removeprefix(f"{ORIGIN}/login/")) == 43
        response = client.post(link, headers={"Origin": ORIGIN}, follow_redirects=False)
        assert response.headers["location"] == "/jobs"
        me = client.get("/api/v1/users/me").json()
        assert (me["name"], me["role"]) == ("admin", "admin")
    with TestClient(create_app(settings_in(tmp_path), clock=Clock(), is_leader=False), base_url=ORIGIN):
        assert "/login/" not in capsys.readouterr().out


def test_a_start_prints_a_new_link_as_long_as_nobody_can_log_in(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    links = set()
    for _ in range(2):
        with TestClient(create_app(settings_in(tmp_path), clock=Clock(), is_leader=False), base_url=ORIGIN) as client:
            links.add(capsys.readouterr().out.split()[-1])
    assert len(links) == 2
    assert all(client.get(link).status_code == 200 for link in links)


def test_a_link_logs_in_once_and_a_preview_does_not_use_it_up(house: House) -> None:
    link = mint_login_link(house.services, "bob").removeprefix(ORIGIN)
    for _ in range(3):
        assert house.client().get(link).status_code == 200
    first, second = house.client(Origin=ORIGIN), house.client(Origin=ORIGIN)
    assert first.post(link).status_code == 303
    assert first.get("/api/v1/users/me").json()["name"] == "bob"
    assert second.post(link).status_code == 410
    assert second.get("/api/v1/users/me").status_code == 401
    assert house.client().get(link).status_code == 410


def test_of_two_who_use_a_link_at_once_one_gets_in(house: House) -> None:
    link = mint_login_link(house.services, "bob").removeprefix(ORIGIN)
    clients = [house.client(Origin=ORIGIN) for _ in range(4)]
    replies: list[int] = []
    threads = [threading.Thread(target=lambda c=c: replies.append(c.post(link).status_code)) for c in clients]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(replies) == [303, 410, 410, 410]


def test_a_link_expires_after_a_day(house: House) -> None:
    link = mint_login_link(house.services, "bob").removeprefix(ORIGIN)
    house.clock.now += 24 * 3600 + 1
    assert house.client(Origin=ORIGIN).post(link).status_code == 410


def test_a_password_set_after_the_link_logs_in(house: House) -> None:
    assert set_password(house, house.browser("bob")) == 303
    bob = log_in(house, "bob", PASSWORD, next="/jobs?x=1")
    assert bob.last.headers["location"] == "/jobs?x=1"  # type: ignore[attr-defined]
    assert bob.get("/api/v1/users/me").json()["name"] == "bob"


@pytest.mark.parametrize(
    ("password", "code"),
    [
        ("short", "auth.password_short"),
        ("password1234", "auth.password_common"),
        ("aaaaaaaaaaaaaaa", "auth.password_common"),
        ("x1" * 600, "auth.password_long"),
    ],
)
def test_a_password_that_would_be_guessed_is_refused(password: str, code: str) -> None:
    import anyio

    with pytest.raises(UserError) as refused:
        anyio.run(passwords.hash_password, password)
    assert refused.value.code == code


def test_changing_a_password_needs_the_current_one_and_ends_the_other_sessions(house: House) -> None:
    bob = house.browser("bob")
    assert set_password(house, bob) == 303
    elsewhere = log_in(house, "bob", PASSWORD)
    assert elsewhere.get("/api/v1/users/me").status_code == 200
    token = csrf_of(house, elsewhere)
    form = {"password": "another good one!", "_csrf": token}
    assert elsewhere.post("/settings/password", data={**form, "current_password": "wrong"}).status_code == 422
    assert elsewhere.post("/settings/password", data={**form, "current_password": PASSWORD}).status_code == 303
    assert elsewhere.get("/api/v1/users/me").status_code == 200
    assert bob.get("/api/v1/users/me").status_code == 401


def test_a_log_in_makes_a_new_session_and_ends_the_one_it_came_with(house: House) -> None:
    browser = house.browser("bob")
    planted = browser.cookies["pegbox_session"]
    assert set_password(house, browser) == 303
    browser.post("/login", data={"name": "bob", "password": PASSWORD})
    assert browser.cookies["pegbox_session"] != planted
    victim = house.client(Cookie=f"pegbox_session={planted}")
    assert victim.get("/api/v1/users/me").status_code == 401


def test_the_cookie_is_out_of_reach_of_scripts_and_other_sites(house: House) -> None:
    link = mint_login_link(house.services, "bob").removeprefix(ORIGIN)
    cookie = house.client(Origin=ORIGIN).post(link).headers["set-cookie"]
    assert cookie.startswith("pegbox_session=")
    assert "HttpOnly" in cookie and "SameSite=lax" in cookie and "Path=/" in cookie and "Secure" not in cookie


def test_over_https_the_cookie_belongs_to_this_host_alone(tmp_path: Path) -> None:
    from dataclasses import replace

    settings = replace(settings_in(tmp_path), url="https://pegbox.example")
    app = create_app(settings, clock=Clock())
    with TestClient(app, base_url="https://pegbox.example", follow_redirects=False) as client:
        link = mint_login_link(app.state.services)
        assert link.startswith("https://pegbox.example/login/")
        cookie = client.post(link, headers={"Origin": "https://pegbox.example"}).headers["set-cookie"]
        assert cookie.startswith("__Host-pegbox=") and "Secure" in cookie and "Domain" not in cookie


def test_logging_out_and_time_end_a_session(house: House) -> None:
    bob = house.browser("bob")
    cookie = bob.cookies["pegbox_session"]
    assert bob.post("/logout", data={"_csrf": csrf_of(house, bob)}).headers["location"] == "/login"
    assert house.client(Cookie=f"pegbox_session={cookie}").get("/api/v1/users/me").status_code == 401
    bob = house.browser("bob")
    house.clock.now += SESSION_S - 1
    assert bob.get("/api/v1/users/me").status_code == 200  # and being seen prolongs it
    house.clock.now += SESSION_S - 1
    assert bob.get("/api/v1/users/me").status_code == 200
    house.clock.now += SESSION_S + 1
    assert bob.get("/api/v1/users/me").status_code == 401


@pytest.mark.parametrize("next", ["//evil.example", "https://evil.example", "/\\evil.example", "jobs", "/a\nb", ""])
def test_after_the_log_in_nobody_is_sent_to_another_site(house: House, next: str) -> None:
    set_password(house, house.browser("bob"))
    assert log_in(house, "bob", PASSWORD, next=next).last.headers["location"] == "/jobs"  # type: ignore[attr-defined]


def test_a_wrong_password_and_an_unknown_name_look_the_same(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    set_password(house, house.browser("bob"))
    checked: list[str] = []
    matches = passwords._matches
    monkeypatch.setattr(passwords, "_matches", lambda hash, word: checked.append(hash) or matches(hash, word))
    replies = [log_in(house, name, "wrong").last for name in ("bob", "victor", "nobody")]  # type: ignore[attr-defined]
    assert {reply.status_code for reply in replies} == {403}
    assert (
        len({reply.text.replace(name, "") for reply, name in zip(replies, ("bob", "victor", "nobody"), strict=True)})
        == 1
    )
    # One hash of the same cost each, whether there is anything to compare with or not.
    assert len(checked) == 3 and all(hash.startswith("$argon2id$v=19$m=19456,t=2,p=1$") for hash in checked)


def test_a_thousand_guesses_cost_few_hashes_and_the_owner_still_gets_in_later(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_password(house, house.browser("bob"))
    checked: list[str] = []
    matches = passwords._matches
    monkeypatch.setattr(passwords, "_matches", lambda hash, word: checked.append(word) or matches(hash, word))
    client = house.client(Origin=ORIGIN)
    statuses = [client.post("/login", data={"name": "bob", "password": f"guess {n}"}).status_code for n in range(1000)]
    assert statuses[:FREE_TRIES_AN_ACCOUNT] == [403] * FREE_TRIES_AN_ACCOUNT
    assert set(statuses[FREE_TRIES_AN_ACCOUNT:]) == {429}
    assert len(checked) == FREE_TRIES_AN_ACCOUNT
    refused = client.post("/login", data={"name": "bob", "password": PASSWORD})
    assert refused.status_code == 429 and 1 <= int(refused.headers["retry-after"]) <= 900
    house.clock.now += int(refused.headers["retry-after"])
    assert client.post("/login", data={"name": "bob", "password": PASSWORD}).status_code == 303


# -- tokens --------------------------------------------------------------------------------------------------------
def test_a_token_is_shown_once_and_revoked_at_once(house: House) -> None:
    alice = house.api("alice")
    made = alice.post("/api/v1/tokens", json={"name": "ci", "role": "viewer"})
    assert made.status_code == 201
    program = house.client(Authorization=f"Bearer {made.json()['token']}")
    assert program.get("/api/v1/users/me").json() == {
        "id": house.users["alice"],
        "name": "ci",
        "role": "viewer",
        "kind": "token",
    }
    listed = {each["id"]: each for each in alice.get("/api/v1/tokens").json()["data"]}
    assert "token" not in listed[made.json()["id"]] and listed[made.json()["id"]]["used_at"]
    assert alice.delete(f"/api/v1/tokens/{made.json()['id']}").status_code == 204
    assert program.get("/api/v1/users/me").status_code == 401
    assert alice.delete("/api/v1/tokens/tok_none").status_code == 404


def test_a_role_that_is_none_is_named_with_those_there_are(house: House) -> None:
    response = house.api("alice").post("/api/v1/tokens", json={"name": "ci", "role": "root"})
    assert response.status_code == 422
    assert response.json()["errors"][0]["pointer"] == "/role"
    assert "viewer, member, admin, worker" in response.json()["detail"]


def test_a_copy_of_the_database_lets_nobody_in(house: House) -> None:
    browser = house.browser("bob")
    set_password(house, browser)
    link = mint_login_link(house.services, "bob")
    made = create_token(house.services.database, "ci", "admin")
    data_dir = house.services.settings.data_dir
    stored = b"".join(path.read_bytes() for path in data_dir.glob("pegbox.sqlite3*"))
    assert b"argon2id" in stored and made.split("_")[1].encode() in stored  # we do look at the right bytes
    secrets = [made.split("_")[2], link.rsplit("/", 1)[1], browser.cookies["pegbox_session"], PASSWORD]
    secrets += [token.split("_")[2] for token in house.tokens.values()]
    for secret in secrets:
        assert secret.encode() not in stored


def test_the_first_user_is_made_once(house: House) -> None:
    with house.services.database.read() as session:
        assert sorted(session.exec(select(User.name)).all()) == ["admin", "alice", "bob", "victor"]
