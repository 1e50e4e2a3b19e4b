"""A data set's profile: wanted, ordered from one host, kept by what it depends on; and the plan that comes of it."""

import json
import random
import re
from array import array
from typing import Any

from httpx2 import Response

from app.profiles import FAILED_KEPT_S, PATIENCE_S, RESEND_S, read_sampled
from app.security import MAX_BODY_BYTES
from app.tables import Profile
from core.preflight import plan_job
from core.profile import Column, DataProfile, TokenPreview
from core.spec import parse_spec
from core.wire import Device, MeasuredProfile, ProfileProgress, ProfileResult
from tests.app.conftest import House
from tests.app.scene import MODEL, ROW, SPEC, FakeHost, connect_host, path_of, put_data, submit
from tests.app.test_pages import filled

NUM_ROWS = 64


def facts(num_rows: int = NUM_ROWS, **more: Any) -> DataProfile:
    fields: dict[str, Any] = {
        "num_rows": num_rows,
        "format": "messages",
        "multi_turn": "whole",
        "multi_turn_reason": "the template leaves history as it was",
        "num_refused": 0,
        "refused": (),
        "sample_row": list(range(num_rows)),
        "sample_length": [10 + row % 50 for row in range(num_rows)],
        "sample_trained": [5] * num_rows,
        "sample_turns": [1] * num_rows,
        "sample_hash": [f"{row:016x}" for row in range(num_rows)],
        "preview": (TokenPreview(line=1, pieces=("1", "+"), trained=(False, True)),),
    }
    return DataProfile.model_validate(fields | more)


def preflight(house: House, **spec: Any) -> Response:
    return house.api("bob").post("/api/v1/jobs/preflight", json={"spec": SPEC | spec})


def orders(host: FakeHost) -> list[str]:
    profiles: list[str] = host.beat().json()["profiles"]
    return profiles


def claim(host: FakeHost, profile: str) -> int:
    return host.client.post(f"/worker/v1/profiles/{profile}/claim").status_code


def measure(host: FakeHost, result: ProfileResult | None = None) -> str:
    """Claims the one order that there is and answers it."""
    (profile,) = orders(host)
    assert claim(host, profile) == 200
    assert host.post(f"/profiles/{profile}/result", result or ProfileResult(profile=facts())).status_code == 200
    return profile


def test_a_preflight_is_202_until_a_host_has_measured_the_data_and_then_the_plan(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    waiting = preflight(house)
    assert waiting.status_code == 202 and waiting.headers["retry-after"] == "1"
    assert waiting.json() == {"state": "profiling", "profiles": {"sums": "wanted"}, "progress": {}}
    (profile,) = orders(host)
    order = host.client.post(f"/worker/v1/profiles/{profile}/claim").json()
    assert (order["model"], order["train_on"], order["data"]["dataset"]) == ("demo/tiny-llama", "assistant", "sums")
    assert preflight(house).json()["profiles"] == {"sums": "running"}
    assert orders(host) == []
    host.post(f"/profiles/{profile}/result", ProfileResult(profile=facts()))
    ready = preflight(house)
    assert ready.status_code == 200
    device = Device(id="cpu0", kind="cpu", name="", memory_bytes=2**30)
    plan = plan_job(parse_spec(SPEC), {"sums": facts()}, MODEL, device)
    expected = plan.plan_event()
    got = ready.json()
    for key in ("total_steps", "steps_per_epoch", "warmup_steps", "padding_efficiency", "padded_efficiency", "fill"):
        assert got[key] == expected[key], key
    assert got["rows"] == expected["num_rows"]
    assert got["learning_rate"] == plan.learning_rates() and got["learning_rate_stride"] == 1
    assert len(got["learning_rate"]) == got["total_steps"] + 1 == 7
    assert {choice["field"] for choice in got["choices"]} >= {"data.max_length", "schedule.learning_rate"}


def test_what_was_measured_once_is_not_ordered_again(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host)
    put_data(house, name="copy")  # the same bytes under another name
    assert preflight(house, data={"train": [{"dataset": "copy"}]}).status_code == 200
    assert preflight(house, schedule={"epochs": 1}).status_code == 200
    assert orders(host) == []


def test_another_mask_policy_template_or_file_is_another_profile(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host)
    for other in (
        {"data": SPEC["data"] | {"train_on": "all"}},
        {"data": SPEC["data"] | {"multi_turn": "split"}},
        {"model": {"chat_template": "chatml"}},
    ):
        assert preflight(house, **other).status_code == 202, other
        measure(host)
    house.clock.now += 1
    put_data(house, content=b'{"text": "other bytes"}\n')
    assert preflight(house).status_code == 202


def test_only_the_host_that_claimed_an_order_may_answer_it(house: House) -> None:
    host, other = connect_host(house), connect_host(house, "host_b")
    put_data(house)
    preflight(house)
    ordered = {id: orders(each) for id, each in (("host_a", host), ("host_b", other))}
    assert sorted(len(profiles) for profiles in ordered.values()) == [0, 1]  # one host is asked
    owner, stranger = (host, other) if ordered["host_a"] else (other, host)
    (profile,) = orders(owner)
    assert claim(stranger, profile) == 409
    assert [claim(owner, profile) for _ in range(2)] == [200, 200]
    result = ProfileResult(profile=facts())
    assert stranger.post(f"/profiles/{profile}/result", result).status_code == 404
    assert owner.post(f"/profiles/{profile}/result", result).status_code == 200
    assert owner.post(f"/profiles/{profile}/result", ProfileResult(error="late")).status_code == 200
    assert preflight(house).status_code == 200


def test_an_order_that_is_not_taken_goes_to_any_host_that_has_the_model(house: House) -> None:
    host, other = connect_host(house), connect_host(house, "host_b")
    put_data(house)
    preflight(house)
    asked, idle = (host, other) if orders(host) else (other, host)
    assert orders(idle) == []
    house.clock.now += RESEND_S
    (profile,) = orders(idle)
    assert claim(idle, profile) == 200
    assert claim(asked, profile) == 409
    house.clock.now += PATIENCE_S  # and what a host took and never answered likewise
    assert orders(asked) == [profile]
    assert claim(asked, profile) == 200


def tell(host: FakeHost, profile: str, fraction: float, sampled: DataProfile | None = None) -> int:
    message = ProfileProgress(fraction=fraction, sampled=sampled)
    return host.post(f"/profiles/{profile}/progress", message).status_code


def test_a_host_tells_how_far_it_is_and_keeps_its_claim_while_it_does(house: House) -> None:
    host, other = connect_host(house), connect_host(house, "host_b")
    put_data(house)
    preflight(house)
    owner, stranger = (host, other) if orders(host) else (other, host)
    (profile,) = orders(owner)
    assert tell(owner, profile, 0.1) == 409, "it was not claimed"
    assert claim(owner, profile) == 200
    assert preflight(house).json()["progress"] == {"sums": 0.0}
    for fraction in (0.25, 0.5, 0.5, 0.4):  # repeated, and late
        house.clock.now += PATIENCE_S - 1
        assert tell(owner, profile, fraction) == 200
        assert orders(stranger) == []
    assert preflight(house).json()["progress"] == {"sums": 0.5}
    assert tell(stranger, profile, 0.9) == 409
    assert stranger.client.post("/worker/v1/profiles/nothing/progress", json={"fraction": 0.5}).status_code == 404
    assert owner.client.post(f"/worker/v1/profiles/{profile}/progress", json={"fraction": 1.5}).status_code == 422
    house.clock.now += PATIENCE_S
    assert claim(stranger, profile) == 200, "silent for so long, it has lost the claim"
    assert tell(owner, profile, 0.9) == 409
    assert preflight(house).json()["progress"] == {"sums": 0.0}


def test_a_sample_is_no_answer_and_goes_when_the_exact_one_comes(house: House) -> None:
    host = connect_host(house)
    put_data(house, content=ROW * 9000)
    preflight(house)
    (profile,) = orders(host)
    order = host.client.post(f"/worker/v1/profiles/{profile}/claim").json()
    assert order["num_rows"] == 9000
    assert tell(host, profile, 0.0, facts(100)) == 200
    assert tell(host, profile, 0.3) == 200
    waiting = preflight(house)
    assert waiting.status_code == 202
    assert waiting.json() == {"state": "profiling", "profiles": {"sums": "running"}, "progress": {"sums": 0.3}}
    view = house.api("bob").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama")
    assert view.status_code == 202 and view.json()["progress"] == {"sums": 0.3}
    # 1,000 steps of warm-up don't fit what is known by the sample; it may refuse nothing.
    accepted = house.api("bob").post("/api/v1/jobs", json={"spec": SPEC | {"schedule": {"warmup_steps": 100_000}}})
    assert accepted.status_code == 201
    with house.services.database.read() as session:
        row = session.get_one(Profile, profile)
        sampled = read_sampled(session, row)
    assert sampled is not None and sampled.num_rows == 9000
    assert sampled.facts == facts(100) and sampled.stretched.num_rows == 9000
    host.post(f"/profiles/{profile}/result", ProfileResult(profile=facts(9000)))
    assert tell(host, profile, 0.9) == 409
    with house.services.database.read() as session:
        row = session.get_one(Profile, profile)
    assert (row.state, row.sampled, row.progress) == ("ready", None, None)
    assert preflight(house).json()["samples"] > 8000


def test_the_panel_shows_a_samples_numbers_as_estimates_and_then_the_exact_ones(house: House) -> None:
    host = connect_host(house)
    put_data(house, content=ROW * 9000)
    browser = house.browser("bob")

    def panel(**changed: str) -> str:
        sent = filled(browser, **{key.replace("__", "."): value for key, value in changed.items()})
        return browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text

    assert "Measuring the data" in panel()
    (profile,) = orders(host)
    assert claim(host, profile) == 200
    assert tell(host, profile, 0.4, facts(100)) == 200
    about = panel()
    assert "from 100 of 9,000 rows" in about and "exact numbers follow" in about
    assert 'hx-trigger="every 1s"' in about, "it asks again"
    assert re.search(r'<progress [^>]*value="0\.4"', about)
    assert "Ready to launch" not in about
    steps = re.search(r"<dt>Steps</dt><dd>(?:about )?([\d,]+)", about)
    assert steps is not None and int(steps[1].replace(",", "")) > 100, "of 9,000 rows, not of 100"
    # What doesn't fit a sample is no error yet.
    assert "Measuring the data" in panel(schedule__warmup="warmup_steps", schedule__warmup_steps="100000")
    host.post(f"/profiles/{profile}/result", ProfileResult(profile=facts(9000)))
    exact = panel()
    assert "exact numbers follow" not in exact and "every 1s" not in exact
    assert "<dt>Steps</dt>" in exact


def test_a_profile_of_an_earlier_release_still_loads() -> None:
    old = json.loads(facts().model_dump_json())
    for name in ("duplicates", "sample_group", "sample_sketches", "num_new_tokens"):
        old.pop(name)
    for name in ("ids", "special", "num_trained", "num_turns"):
        old["preview"][0].pop(name)
    assert DataProfile.model_validate(old) == facts()


def test_data_that_cannot_be_measured_is_told_and_tried_again_later(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(error="the model has no chat template"))
    failed = preflight(house)
    assert failed.status_code == 422
    assert failed.json()["detail"] == "data.train: sums could not be measured: the model has no chat template"
    house.clock.now += FAILED_KEPT_S
    assert preflight(house).status_code == 202


def test_what_a_trainer_measured_on_its_way_serves_the_next_preflight(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    job = submit(house)
    launch = host.running()
    assert launch.job == job
    (reference,) = (
        part["dataset"] for part in house.api("bob").get(f"/api/v1/jobs/{job}").json()["spec"]["data"]["train"]
    )
    message = MeasuredProfile(dataset=reference, profile=facts())
    assert host.post(f"{path_of(launch)}/profile", message).status_code in (200, 204)
    assert preflight(house).status_code == 200


def test_a_spec_that_does_not_fit_its_data_is_refused_with_the_number(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host)
    warmup = preflight(house, schedule={"warmup_steps": 100})
    assert warmup.status_code == 422
    assert warmup.json()["errors"][0]["code"] == "spec.warmup_longer_than_run"
    assert "the warm-up of 100 steps does not end within the run of 6 steps" in warmup.json()["detail"]
    length = preflight(house, data=SPEC["data"] | {"max_length": 8192})
    assert length.status_code == 422 and "4096" in length.json()["detail"]
    submitted = house.api("bob").post("/api/v1/jobs", json={"spec": SPEC | {"schedule": {"warmup_steps": 100}}})
    assert submitted.status_code == 422 and submitted.json()["errors"] == warmup.json()["errors"]


def test_every_fault_of_a_spec_is_told_at_once_with_its_key(house: House) -> None:
    connect_host(house)
    response = preflight(house, schedule={"learning_rate": -1}, learning_rte=1, data={"train": [{"dataset": "sums"}]})
    pointers = {error["pointer"]: error for error in response.json()["errors"]}
    assert response.status_code == 422
    assert pointers.keys() == {"/spec/schedule/learning_rate", "/spec/learning_rte"}
    assert pointers["/spec/learning_rte"]["fix"] == "schedule.learning_rate"


def test_an_unknown_model_and_data_set_are_named_with_those_there_are(house: House) -> None:
    put_data(house)
    nobody = preflight(house)
    assert nobody.status_code == 422 and "start a worker first" in nobody.json()["detail"]
    connect_host(house)
    wrong = preflight(house, model={"base": "demo/tiny-lama"})
    assert wrong.json()["errors"][0]["pointer"] == "/spec/model/base"
    assert "no host has the model demo/tiny-lama; known are: demo/tiny-llama" in wrong.json()["detail"]
    data = preflight(house, data={"train": [{"dataset": "sum"}]})
    assert data.json()["errors"][0]["pointer"] == "/spec/data/train/0/dataset" and "sums" in data.json()["detail"]


def test_a_very_long_run_sends_a_curve_that_can_be_drawn(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host)
    got = preflight(house, schedule={"max_steps": 250_000}).json()
    assert got["total_steps"] == 250_000
    assert got["learning_rate_stride"] == 3 and len(got["learning_rate"]) == 83_334


def test_a_data_sets_profile_shows_lengths_and_tokens(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    address = "/api/v1/datasets/sums/profile?model=demo/tiny-llama&max_length=40"
    assert house.api("victor").get(address).status_code == 202
    measure(host)
    profile = house.api("victor").get(address).json()
    lengths = facts().sample_length
    assert (profile["samples"], profile["tokens"], profile["longest"]) == (NUM_ROWS, sum(lengths), max(lengths))
    assert profile["samples_beyond"] == sum(length > 40 for length in lengths)
    assert sum(each["samples"] for each in profile["histogram"]) == NUM_ROWS
    assert profile["histogram"][-1]["below"] > max(lengths) and profile["preview"][0]["trained"] == [False, True]
    assert house.api("victor").get("/api/v1/datasets/sums/profile").status_code == 422
    assert house.api("victor").get(f"{address}&train_on=nobody").status_code == 422


def test_a_deleted_data_set_takes_its_profiles_along(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host)
    assert house.api("bob").delete("/api/v1/datasets/sums").status_code == 204
    put_data(house)
    assert preflight(house).status_code == 202


def test_facts_are_taken_where_no_other_body_of_their_size_is(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    house.api("victor").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama")
    count = 400_000
    draw = random.Random(1)
    wide = {name: Column(array("Q", draw.randbytes(8 * count))) for name in ("sample_hash", "sample_turns")}
    result = ProfileResult(
        profile=facts().model_copy(
            update=wide
            | {
                "num_rows": count,
                "sample_row": Column(range(count)),
                "sample_length": Column([100] * count),
                "sample_trained": Column([40] * count),
            }
        )
    )
    assert len(result.model_dump_json()) > MAX_BODY_BYTES
    measure(host, result)
    shown = house.api("victor").get("/api/v1/datasets/sums/profile?model=demo/tiny-llama").json()
    assert (shown["samples"], shown["tokens"]) == (count, 100 * count)
    beat = host.client.post(f"/worker/v1/hosts/{host.id}/beat", content=b" " * (MAX_BODY_BYTES + 1))
    assert beat.status_code == 413


def facts_with_turns(num_rows: int = NUM_ROWS) -> DataProfile:
    """Two turns each, of which the second ends at the end; a sample a turn would compute the first one's again."""
    lengths = [40 + row % 100 for row in range(num_rows)]
    return facts(
        num_rows,
        sample_length=lengths,
        sample_trained=[20] * num_rows,
        sample_turns=[2] * num_rows,
        sample_runs=[2] * num_rows,
        run_bounds=[bound for length in lengths for bound in (10, 20, length - 10, length)],
        num_tokens_if_split=sum(lengths) + 20 * num_rows,
    )


def test_a_preflight_tells_every_way_to_lay_samples_out_and_what_is_cut(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(profile=facts_with_turns()))
    data = {"train": [{"dataset": "sums"}], "max_length": 100}
    got = preflight(house, data={**data, "overlong": "truncate"}, batch={"rows_per_step": 3}).json()
    mine, *others = got["ways"]
    assert (mine["mode"], mine["algorithm"]) == ("packed", "best_fit")
    assert {(way["mode"], way["algorithm"]) for way in others} == {
        ("packed", "sequential"),
        ("packed", "wrapped"),
        ("padding_free", "best_fit"),
        ("grouped", "best_fit"),
        ("padded", "best_fit"),
    }
    for name in ("rows", "padding_efficiency", "padded_efficiency", "fill", "steps_per_epoch"):
        assert mine[name] == got[name]
    assert {way["algorithm"]: way["cuts"] > 0 for way in got["ways"]} == {
        "best_fit": False,
        "sequential": False,
        "wrapped": True,
    }
    said = {remark["code"]: remark["text"] for remark in got["verdict"]}
    num_long = sum(length > 100 for length in facts_with_turns().sample_length)
    assert said["verdict.samples_truncated"].startswith(f"{num_long} of 64 samples are longer")
    assert said["verdict.targets_lost"].startswith(f"{10 * num_long:,} of 1,280 trained tokens are lost")
    assert "a sample for each turn would be" in said["verdict.whole_saves"]
    counts = got["counts"]
    assert counts["tokens_if_split"] - counts["tokens_if_whole"] == 20 * NUM_ROWS
    refused = preflight(house, data=data).json()["detail"]
    assert "truncate keeps the turns that fit" in refused and "plan" not in refused


def test_the_panel_names_the_way_and_warns_of_what_is_cut(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    preflight(house)
    measure(host, ProfileResult(profile=facts_with_turns()))
    browser = house.browser("bob")

    def panel(**changed: str) -> str:
        sent = filled(browser, **{key.replace("__", "."): value for key, value in changed.items()})
        return browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text

    form = browser.get("/jobs/new").text
    for value in ("padding_free", "grouped", "wrapped", "sequential", "truncate", "split"):
        assert re.search(rf'<option value="{value}"(?! disabled)', form), value
    by_samples = panel(packing__mode="padding_free")
    assert "padding-free" in by_samples and "Every way makes the same" in by_samples
    assert "a sample for each turn would be" in by_samples
    assert "padded, grouped by length" in panel(packing__mode="grouped", batch__micro_batch_size="4")
    wrapped = panel(packing__algorithm="wrapped", batch="rows_per_step", batch__rows_per_step="3")
    assert "packed, samples cut at row ends" in wrapped and "Every way makes the same" not in wrapped
    assert "trained tokens are lost an epoch where wrapped rows cut samples" in wrapped
    cut = panel(data__max_length="100", data__overlong="truncate")
    assert "samples are longer than max_length and are truncated" in cut
