"""Hosts as the verdict knows them: what no host can do is refused before anything is measured, and the device that a
plan is for is the one that the dispatcher gives."""

import re
from typing import Any

import pytest

from app.dispatcher import dispatch_once
from core.wire import Device, HostReport, ProfileResult
from tests.app.conftest import House
from tests.app.scene import SPEC, VERSIONS, FakeHost, connect_host, job_of, put_data, submit
from tests.app.test_pages import filled
from tests.app.test_preflight_memory import gpu, model
from tests.app.test_profiles import facts, measure, preflight

BARE = {"torch": "2.13.0"}


def join(house: House, name: str, *devices: Device, versions: dict[str, str] = VERSIONS) -> FakeHost:
    host = connect_host(house, f"host_{name}")
    report = HostReport(
        host=host.id, name=name, devices=devices, models=(model(),),
        versions=versions, num_cpus=4, memory_bytes=2**36,
    )  # fmt: skip
    assert host.post("/hosts/register", report).status_code == 200
    host.beat()
    return host


def large(count: int) -> list[Device]:
    return [gpu(80).model_copy(update={"id": f"gpu{number}"}) for number in range(count)]


def small(count: int) -> list[Device]:
    return [each.model_copy(update={"name": "Small", "memory_bytes": 16 * 10**9}) for each in large(count)]


def errors_of(response: Any) -> dict[str, dict[str, Any]]:
    assert response.status_code == 422, response.text
    return {error["code"]: error for error in response.json()["errors"]}


@pytest.fixture
def two(house: House) -> dict[str, FakeHost]:
    """A large host with two GPUs and a small one with four, on which the data was measured."""
    hosts = {"large": join(house, "large", *large(2)), "small": join(house, "small", *small(4))}
    put_data(house)
    assert preflight(house).status_code == 202
    owner = next(host for host in hosts.values() if host.beat().json()["profiles"])
    measure(owner, ProfileResult(profile=facts()))
    return hosts


def test_what_no_host_can_do_is_refused_before_a_row_is_measured(house: House) -> None:
    join(house, "large", *large(2), versions=BARE)
    put_data(house)
    asked = {"parallel": {"devices": 4}, "method": {"type": "qlora"}, "compute": {"dtype": "fp16"}}
    spec = SPEC | asked | {"parallel": {"devices": 4, "zero_stage": 3}}
    for path in ("/api/v1/jobs/preflight", "/api/v1/jobs"):
        found = errors_of(house.api("bob").post(path, json={"spec": spec}))
        assert found.keys() == {"host.too_few_gpus", "host.no_bitsandbytes", "host.no_deepspeed", "zero.fp16"}
        error = found["host.too_few_gpus"]
        assert error["pointer"] == "/spec/parallel/devices" and error["fixes"] == [{"parallel.devices": 2}]
        assert "no host that has this model has more than 2 GPUs (large: 2); set at most 2" in error["detail"]


def test_the_form_says_the_same_beside_its_field_and_its_button_mends_it(house: House) -> None:
    join(house, "large", *large(2))
    put_data(house)
    browser = house.browser("bob")
    sent = filled(browser, **{"parallel.devices": "4", "method.type": "lora"})
    page = browser.post("/jobs/new", data=sent)
    assert page.status_code == 422 and "has more than 2 GPUs" in page.text
    panel = browser.post("/jobs/preflight", data=sent, headers={"HX-Request": "true"}).text
    assert "has more than 2 GPUs" in panel and "every 3s" in panel, "a host may come"
    assert "&#34;parallel.devices&#34;: &#34;2&#34;" in panel


def test_the_plan_is_for_the_device_that_the_dispatcher_gives(house: House, two: dict[str, FakeHost]) -> None:
    got = preflight(house).json()
    # Of two hosts with GPUs the one with fewer free ones is taken.
    assert got["planned_for"]["device"] == got["memory"]["device"] == "Large"
    assert got["planned_for"]["hosts"] == ["large"] and got["planned_for"]["choices"] == ["Large", "Small"]
    job = submit(house)
    (launch,) = dispatch_once(house.services)
    assert job_of(house.services, job).host == two["large"].id and launch.job == job
    # One of its two GPUs is taken: for two only the small host is free.
    pair = {"parallel": {"devices": 2}}
    got = preflight(house, **pair).json()
    assert got["planned_for"]["device"] == "Small"
    assert "start on small now" in got["planned_for"]["why"]
    second = submit(house, **pair)
    dispatch_once(house.services)
    assert job_of(house.services, second).host == two["small"].id


def test_another_device_is_only_looked_at(house: House, two: dict[str, FakeHost]) -> None:
    def ask(device: str) -> Any:
        return house.api("bob").post("/api/v1/jobs/preflight", json={"spec": SPEC, "device": device})

    likeliest = ask("").json()
    assert likeliest["planned_for"]["device"] == "Large"
    for asked in ("Small", "small"):
        got = ask(asked).json()
        assert got["planned_for"]["device"] == got["memory"]["device"] == "Small"
        assert got["memory"]["device_bytes"] == 16 * 10**9
        assert "to look at only: by itself the job would go to large (Large)" in got["planned_for"]["why"]
        assert got["total_steps"] == likeliest["total_steps"]
    found = errors_of(ask("H200"))["host.unknown_device"]
    assert "known are: Large, Small" in found["detail"]


def test_the_panel_lets_one_look_at_each_device_with_and_without_javascript(
    house: House, two: dict[str, FakeHost]
) -> None:
    browser = house.browser("bob")
    sent = filled(browser, **{"method.type": "lora"})

    def panel(**more: str) -> str:
        text = browser.post("/jobs/preflight", data=sent | more, headers={"HX-Request": "true"}).text
        return re.sub(r"\s+", " ", text)

    plain, other = panel(), panel(_device="Small")
    assert '<option value="" selected>Large' in plain and '<option value="Small">Small' in plain
    assert "It would start on large now." in plain and "Large, 74.5 GiB" in plain
    assert '<option value="Small" selected>' in other and "The line is the device: Small" in other
    page = browser.post("/jobs/preflight", data=sent | {"_device": "Small"}).text
    assert "<!doctype html>" in page.lower() and '<option value="Small" selected>' in page
    assert "The line is the device: Small" in re.sub(r"\s+", " ", page)
    # What can no longer be had is not insisted on, and a spec with an error keeps the choice for when it is mended.
    assert '<option value="" selected>' in panel(_device="gone")
    broken = browser.post(
        "/jobs/preflight", data=sent | {"_device": "Small", "parallel.devices": "99"}, headers={"HX-Request": "true"}
    ).text
    assert '<input type="hidden" name="_device" value="Small">' in broken
    launched = browser.post("/jobs/new", data=sent | {"_device": "Small"})
    assert launched.status_code == 303, "a spec has no host"


def test_auto_follows_the_device_that_is_looked_at(house: House) -> None:
    old = gpu(16).model_copy(update={"name": "Old", "has_bf16": False})
    hosts = [join(house, "large", *large(1)), join(house, "old", old, old.model_copy(update={"id": "gpu1"}))]
    put_data(house)
    preflight(house)
    measure(next(host for host in hosts if host.beat().json()["profiles"]), ProfileResult(profile=facts()))

    def dtype(device: str) -> str:
        got = house.api("bob").post("/api/v1/jobs/preflight", json={"spec": SPEC, "device": device}).json()
        return next(str(choice["value"]) for choice in got["choices"] if choice["field"] == "compute.dtype")

    assert (dtype("Large"), dtype("Old")) == ("bf16", "fp32")


def test_a_job_waits_for_the_host_that_has_what_it_needs(house: House) -> None:
    poor = join(house, "poor", *large(1), versions=BARE)
    rich = join(house, "rich", *small(3))
    put_data(house)
    job = submit(house, method={"type": "qlora"})
    (launch,) = dispatch_once(house.services)
    assert launch.job == job and job_of(house.services, job).host == rich.id, "the other one would be tighter"
    plain = submit(house)
    dispatch_once(house.services)
    assert job_of(house.services, plain).host == poor.id


def test_a_host_that_went_silent_is_warned_of_and_refuses_nothing(house: House, two: dict[str, FakeHost]) -> None:
    house.clock.now += 300
    two["small"].beat()
    assert not [each for each in preflight(house).json()["verdict"] if each["code"].startswith("verdict.host")]
    wide = {"method": {"type": "full"}, "parallel": {"devices": 2, "zero_stage": 2}}
    assert preflight(house, **wide).status_code == 200
    house.clock.now += 300
    (warning,) = [each for each in preflight(house).json()["verdict"] if each["code"].startswith("verdict.host")]
    assert warning["code"] == "verdict.hosts_absent" and "(large, small)" in warning["text"]
    assert house.api("bob").post("/api/v1/jobs", json={"spec": SPEC}).status_code == 201
