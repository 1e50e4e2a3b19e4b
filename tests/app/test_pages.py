"""Pages rendered by the real application: what they show, and that what a person wrote stays text."""

import csv
import html
import io
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from fastapi.testclient import TestClient
from sqlmodel import select

from app.tables import Job
from core.states import ACTIONS, JobState
from tests.app.conftest import House
from tests.app.scene import connect_host, job_of, log, put_data, step, submit, wire

HOSTILE = """<img src=x onerror=alert(1)>"'{{7*7}}<script>alert(2)</script>"""


def hidden_inputs(page: str) -> dict[str, str]:
    found = re.findall(r'<input type="hidden" name="([^"]+)" value="([^"]*)">', page)
    return {name: html.unescape(value) for name, value in found}


def filled(browser: TestClient, **changed: str) -> dict[str, str]:
    """The form of a new job as a browser would send it."""
    return hidden_inputs(browser.get("/jobs/new").text) | {"data.train.dataset": "sums", "name": "mine"} | changed


def test_the_first_visit_leads_to_the_first_job(house: House) -> None:
    connect_host(house)
    put_data(house, "demo-dialogues")
    browser = house.browser("bob")
    page = browser.get("/jobs").text
    assert "Launch the tiny demo" in page

    sent = browser.post("/jobs/new", data=hidden_inputs(page))

    assert sent.status_code == 303
    shown = browser.get(sent.headers["location"]).text
    assert "tiny demo" in shown and "lora" in shown
    assert "Launch the tiny demo" not in browser.get("/jobs").text


def test_every_page_asks_who_looks(house: House) -> None:
    stranger = house.client()
    for path in ("/jobs", "/jobs/new", "/jobs/job_x", "/datasets", "/datasets/x", "/hosts", "/settings"):
        reply = stranger.get(path)
        assert reply.status_code == 303 and reply.headers["location"].startswith("/login"), path


def test_what_was_typed_stays_and_its_error_stands_beside_it(house: House) -> None:
    connect_host(house)
    put_data(house)
    browser = house.browser("bob")
    wrong = {"schedule.learning_rate": "fast", "batch": "rows_per_step", "batch.rows_per_step": "0", "tags": "a, b"}

    reply = browser.post("/jobs/new", data=filled(browser, **wrong))

    assert reply.status_code == 422
    for key, text in (("schedule.learning_rate", "fast"), ("batch.rows_per_step", "0"), ("tags", "a, b")):
        assert re.search(rf'<input id="{re.escape(key)}" name="{re.escape(key)}" value="{text}"', reply.text), key
    assert '<a href="#schedule.learning_rate">Learning rate</a>' in reply.text
    assert 'id="schedule.learning_rate-error"' in reply.text and 'id="batch.rows_per_step-error"' in reply.text
    assert re.search(r'value="rows_per_step" checked', reply.text)
    assert "2 things to correct" in reply.text
    with house.services.database.read() as session:
        assert session.exec(select(Job.id)).all() == []


def test_a_form_sent_many_times_at_once_is_one_job(house: House) -> None:
    connect_host(house)
    put_data(house)
    browser = house.browser("bob")
    form = filled(browser)

    with ThreadPoolExecutor(6) as pool:
        replies = list(pool.map(lambda _: browser.post("/jobs/new", data=form), range(12)))

    assert {reply.status_code for reply in replies} == {303}
    assert len({reply.headers["location"] for reply in replies}) == 1
    with house.services.database.read() as session:
        assert len(session.exec(select(Job.id)).all()) == 1
    # The next form is the next job.
    assert browser.post("/jobs/new", data=filled(browser)).headers["location"] != replies[0].headers["location"]


def test_a_viewer_sees_the_form_and_launches_nothing(house: House) -> None:
    connect_host(house)
    put_data(house)
    browser = house.browser("victor")
    assert browser.get("/jobs/new").status_code == 200
    assert browser.post("/jobs/new", data=filled(browser)).status_code == 403


def test_yaml_fills_the_form(house: House) -> None:
    put_data(house)
    browser = house.browser("bob")
    text = "spec:\n  data: {train: [{dataset: sums, weight: 2}]}\n  method: {type: full}\n  batch: {tokens_per_step: 65536}\n"
    page = browser.post("/jobs/new/yaml", data=filled(browser, _yaml=text)).text
    assert re.search(r'<option value="full" selected>', page)
    assert re.search(r'value="tokens_per_step" checked', page)
    assert 'name="batch.tokens_per_step" value="65536"' in page
    assert 'name="data.train.weight" value="2"' in page


def test_yaml_that_is_no_spec_is_refused_with_its_text_kept(house: House) -> None:
    browser = house.browser("bob")
    for text, said in (
        ("a: [1", "not valid YAML"),
        ("- 1\n- 2", "mapping of keys to values"),
        ("data: {train: [{dataset: sums}]}\nrank: 8", "did you mean method.rank"),
        ("!!python/object/apply:os.system ['true']", "not valid YAML"),
        ("[" * 3000, "not valid YAML"),
    ):
        reply = browser.post("/jobs/new/yaml", data=filled(browser, _yaml=text))
        page = html.unescape(reply.text)
        assert reply.status_code == 422 and said in page and f"{text}</textarea>" in page


def test_a_clone_opens_the_form_with_the_spec(house: House) -> None:
    connect_host(house)
    put_data(house)
    job = submit(house, name="first", schedule={"learning_rate": 3e-4, "max_steps": 50}, method={"rank": 8})
    page = house.browser("bob").get(f"/jobs/new?from={job}").text
    assert 'name="method.rank" value="8"' in page and 'name="schedule.learning_rate" value="3e-4"' in page
    assert re.search(r'value="max_steps" checked', page) and 'name="schedule.max_steps" value="50"' in page
    assert f'href="/jobs/{job}">first</a>' in page


def test_the_panel_says_what_is_measured_and_what_is_wrong(house: House) -> None:
    connect_host(house)
    put_data(house)
    browser = house.browser("bob")
    script = {"HX-Request": "true"}

    measuring = browser.post("/jobs/preflight", data=filled(browser), headers=script).text
    wrong = browser.post(
        "/jobs/preflight",
        data=filled(browser, **{"schedule.warmup_steps": "-1", "schedule.warmup": "warmup_steps"}),
        headers=script,
    ).text

    assert "Measuring the data" in measuring and "dataset: sums" in measuring and "curl" in measuring
    assert "<html" not in measuring
    assert '<a href="#schedule.warmup_steps">Warm-up steps</a>' in wrong
    # Without JavaScript the same button gives the whole page.
    assert "<html" in browser.post("/jobs/preflight", data=filled(browser)).text


def test_a_job_shows_exactly_the_actions_that_are_legal(house: House) -> None:
    connect_host(house)
    put_data(house)
    job = submit(house)
    member, viewer = house.browser("bob"), house.browser("victor")
    for state in JobState:
        with house.services.database.write() as session:
            session.get_one(Job, job).state = state.value

        page = member.get(f"/jobs/{job}").text

        shown = set(re.findall(rf'action="/jobs/{job}/([a-z]+)"', page))
        shown |= {"clone"} if f'href="/jobs/new?from={job}"' in page else set()
        assert shown == set(ACTIONS[state]), state
        assert f'action="/jobs/{job}/' not in viewer.get(f"/jobs/{job}").text


def test_a_button_changes_the_job_and_an_illegal_one_says_why(house: House) -> None:
    connect_host(house)
    put_data(house)
    job = submit(house)
    browser = house.browser("bob")
    csrf = {"_csrf": hidden_inputs(browser.get(f"/jobs/{job}").text)["_csrf"]}

    assert browser.post(f"/jobs/{job}/cancel", data=csrf).status_code == 303
    assert job_of(house.services, job).state == "cancelled"

    refused = browser.post(f"/jobs/{job}/resume", data=csrf)
    assert refused.status_code == 409
    assert "resume" in refused.text and "retry" in refused.text
    assert browser.post(f"/jobs/{job}/cancel", data={}).status_code == 403


def test_a_running_job_is_whole_in_one_page(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    job = submit(house, name="whole")
    launch = host.running()
    host.send(
        launch, [step(seq, seq) for seq in range(2, 40)] + [log(40, "line forty"), log(41, "line of another", rank=1)]
    )

    page = house.browser("bob").get(f"/jobs/{job}").text

    assert "39" in page and "line forty" in page and "name of host_a" in page
    assert "[rank 1] line of another" in page and "[rank 0]" not in page
    after = re.search(rf'hx-sse:connect="/jobs/{job}/live\?after=(\d+)', page)
    assert after and int(after[1]) > 40
    assert f"/api/v1/jobs/{job}/metrics?names=loss" in page


def test_a_failed_job_begins_with_the_cause(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    job = submit(house)
    launch = host.running()
    host.send(launch, [log(2, "the last words")])
    told = {"reason": "oom", "text": "it needed 50 GiB", "remedy": "set data.max_length to 512", "exit_code": 71}
    assert host.finish(launch, "failed", final_seq=2, **told).status_code == 200
    assert job_of(house.services, job).state == "failed"

    page = house.browser("bob").get(f"/jobs/{job}").text

    places = [
        page.index(text)
        for text in ("Out of memory", "it needed 50 GiB", "set data.max_length to 512", "the last words")
    ]
    assert places == sorted(places) and places[-1] < page.index('class="tiles"')
    assert "hx-sse:connect" not in page, "nothing more will come"


def test_rows_of_the_list_are_found_by_name_tag_owner_and_state(house: House) -> None:
    connect_host(house)
    put_data(house)
    first = submit(house, name="Alpha run", tags=["prod", "模型"])
    second = submit(house, name="beta 100%", tags=["x"])
    browser = house.browser("alice")

    def found(query: str) -> set[str]:
        return set(re.findall(r'<tr id="(job_\w+)"', browser.get(f"/jobs?{query}").text))

    assert found("") == {first, second}
    assert found("q=alpha") == found("q=prod") == found("q=模型") == {first}
    assert found("q=100%25") == found(f"q={second}") == {second}
    assert found("q=bob") == found("state=queued") == found("q=tiny-llama+bob") == {first, second}
    assert found("q=alpha+beta") == found("state=failed") == found("q=nothing") == set()
    assert found("q=alpha+OR+beta") == found("q=state:queued+created<1d") == {first, second}
    assert found("q=tag:prod+NOT+beta") == found("q=(name~alpha)+owner:bob") == {first}


def test_a_filter_that_cannot_be_read_is_told_at_its_place(house: House) -> None:
    connect_host(house)
    put_data(house)
    submit(house)
    browser = house.browser("alice")
    page = browser.get("/jobs", params={"q": "owner:bob state:runing tag:x"}).text
    assert "owner:bob state:<mark>runing</mark> tag:x" in page and "Character 17" in page
    assert 'value="owner:bob state:runing tag:x"' in page and "<tr id=" not in page
    assert browser.get("/jobs.csv", params={"q": "("}).status_code == 422


def test_jobs_are_sorted_by_their_column_and_back(house: House) -> None:
    connect_host(house)
    put_data(house)
    jobs = {name: submit(house, name=name) for name in ("b", "C", "a")}
    browser = house.browser("alice")

    def shown(path: str) -> list[str]:
        return re.findall(r'<tr id="(job_\w+)"', browser.get(path).text)

    page = browser.get("/jobs?q=state:queued").text
    assert 'aria-sort="descending"><a href="/jobs?q=state%3Aqueued&amp;sort=created">Created' in page
    by_name = html.unescape(re.findall(r'href="([^"]*sort=name)"', page)[0])
    assert shown(by_name) == [jobs["a"], jobs["b"], jobs["C"]]
    assert shown(by_name.replace("sort=name", "sort=-name")) == [jobs["C"], jobs["b"], jobs["a"]]
    assert shown("/jobs?sort=nonsense") == shown("/jobs")


def test_a_long_list_comes_in_pages(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.pages.jobs.ROWS_A_PAGE", 2)
    connect_host(house)
    put_data(house)
    jobs = [submit(house, name=f"run {number}") for number in range(5)]
    browser = house.browser("alice")
    seen, path = [], "/jobs?q=run&sort=name"
    while path:
        page = browser.get(path).text
        seen += re.findall(r'<tr id="(job_\w+)"', page)
        following = re.search(r'href="([^"]+)" rel="next"', page)
        path = html.unescape(following[1]) if following else ""
    assert seen == jobs
    assert "5 to 5 of 5 jobs" in page and 'rel="prev"' in page
    assert "none of them on this page" in browser.get("/jobs?page=9").text
    assert browser.get("/jobs?page=0").status_code == 422


def test_all_that_a_filter_finds_can_be_had_as_csv(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.pages.jobs.CSV_PAGE", 2)
    connect_host(house)
    put_data(house)
    names = ["=1+1", 'with "quotes", and commas', "星期三", "plain", "left out"]
    for name in names:
        submit(house, name=name, tags=["x", "y"])
    reply = house.browser("victor").get("/jobs.csv", params={"q": 'NOT name:"left out"', "sort": "name"})
    assert reply.headers["content-disposition"] == 'attachment; filename="jobs.csv"'
    rows = list(csv.DictReader(io.StringIO(reply.content.decode())))
    assert [row["name"] for row in rows] == ["'=1+1", "plain", 'with "quotes", and commas', "星期三"]
    assert all(
        row["tags"] == "x y" and row["state"] == "queued" and row["created_at"].endswith("+00:00") for row in rows
    )


def test_hostile_texts_stay_texts_on_every_page(house: House) -> None:
    host = connect_host(house)
    row = b'{"messages": [{"role": "user", "content": "<script>alert(3)</script>"}, {"role": "assistant", "content": "2"}]}\n'
    put_data(house, "sums", row * 3 + b'{"<b>": 1}\n')
    job = submit(house, name=HOSTILE, tags=[HOSTILE[:60]], notes=HOSTILE, model={"base": "demo/tiny-llama"})
    launch = host.running()
    host.send(launch, [log(2, HOSTILE), wire(3, "phase", name=HOSTILE, done=1, total=2)])
    browser = house.browser("bob")

    pages = [
        f"/jobs/{job}", f"/jobs/{job}?tab=config", f"/jobs/{job}?tab=files", f"/jobs/{job}?tab=timeline", "/jobs",
        f"/jobs/new?from={job}", "/hosts", "/datasets", "/datasets/sums", "/settings", f"/jobs/{HOSTILE}", "/jobs?q=" + HOSTILE,
    ]  # fmt: skip
    seen = ""
    for path in pages:
        text = browser.get(path).text
        assert "<img" not in text and "alert(2)</script>" not in text and "<script>" not in text, path
        seen += html.unescape(text)
    assert seen.count(HOSTILE) > 8, "the texts are shown"
    assert "49" not in re.findall(r">([^<]*7\*7[^<]*)<", seen)


def test_a_data_set_shows_every_refused_row_with_its_line(house: House) -> None:
    rows = b'{"instruction": "add", "output": "2"}\n' * 5 + b"{broken\n" + b'{"instruction": "add"}\n'
    put_data(house, "pairs", rows)
    browser = house.browser("bob")
    page = browser.get("/datasets/pairs").text
    assert "<td>6</td>" in page and "<td>7</td>" in page
    assert "alpaca" in page and 'href="/jobs/new?dataset=pairs"' in page
    assert "pairs" in browser.get("/datasets").text
    connect_host(house)
    put_data(house)
    put_data(house, "sums2")
    job, other = (submit(house, data={"train": [{"dataset": name}]}) for name in ("sums", "sums2"))
    used = browser.get("/datasets/sums").text
    assert f'href="/jobs/{job}"' in used and f'href="/jobs/{other}"' not in used
    assert browser.get("/datasets/none").status_code == 404


def test_tokens_are_made_once_and_revoked(house: House) -> None:
    browser = house.browser("alice")
    csrf = hidden_inputs(browser.get("/settings").text)["_csrf"]
    page = browser.post("/settings/tokens", data={"_csrf": csrf, "name": "ci", "role": "member"}).text
    token = re.search(r"pegbox_[0-9a-z]+_[0-9a-f]+", page)
    assert token
    program = house.client(Authorization=f"Bearer {token[0]}")
    assert program.get("/api/v1/jobs").status_code == 200
    assert token[0] not in browser.get("/settings").text

    revoke = re.search(r'action="(/settings/tokens/tok_\w+/revoke)">(?:(?!</form>).)*Revoke ci', page, re.DOTALL)
    assert revoke
    assert browser.post(revoke[1], data={"_csrf": csrf}).status_code == 303
    assert program.get("/api/v1/jobs").status_code == 401
    assert house.browser("bob").post("/settings/tokens", data={"name": "x", "role": "member"}).status_code == 403


def test_below_a_proxys_path_every_link_stays_below_it(house: House) -> None:
    connect_host(house)
    put_data(house)
    job = submit(house)
    browser = house.browser("bob")
    browser.headers["X-Test"] = "1"
    app = house.app
    app.root_path = "/pegbox"
    try:
        for path in ("/jobs", f"/jobs/{job}", "/jobs/new", "/datasets", "/hosts", "/settings"):
            text = browser.get(path).text
            links = re.findall(r'(?:href|src|action|hx-get|hx-post|hx-sse:connect|data-metrics)="(/[^"]*)"', text)
            assert links and all(link.startswith("/pegbox/") for link in links), path
    finally:
        app.root_path = ""


def test_without_the_browser_files_every_page_works_and_says_so(
    house: House, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    connect_host(house)
    put_data(house)
    job = submit(house)
    browser = house.browser("bob")
    monkeypatch.setattr("app.pages.environment.VENDOR", tmp_path)
    for path in ("/jobs", "/jobs/new", f"/jobs/{job}", "/datasets", "/hosts", "/settings"):
        page = browser.get(path)
        assert page.status_code == 200 and "python -m app.vendor" in page.text, path
        assert "/static/vendor/" not in page.text and "hx-sse:connect" not in page.text, path


def test_the_launch_button_says_why_it_is_disabled(house: House) -> None:
    connect_host(house)
    put_data(house)
    browser = house.browser("bob")
    asked = {"HX-Request": "true"}
    wrong = filled(browser, **{"schedule.learning_rate": "-1", "data.max_length": "0"})
    panel = browser.post("/jobs/preflight", data=wrong, headers=asked).text
    row = panel.partition('<hx-partial hx-target="#launch-row"')[2].partition("</hx-partial>")[0]
    assert 'aria-disabled="true" aria-describedby="launch-why"' in row and "2 things have to be corrected" in row
    right = browser.post("/jobs/preflight", data=filled(browser), headers=asked).text
    assert "hx-partial" in right and "aria-disabled" not in right
    # Without JavaScript the page says the same, once.
    page = browser.post("/jobs/preflight", data=wrong).text
    assert page.count('id="launch"') == 1 and "hx-partial" not in page
    assert "2 things have to be corrected" in page
