"""Hosts and models as the API tells them."""

from tests.app.conftest import House
from tests.app.scene import connect_host, put_data, submit


def test_a_host_tells_its_devices_and_who_holds_them(house: House) -> None:
    host = connect_host(house)
    put_data(house)
    job = submit(house)
    host.running()
    (shown,) = house.api("victor").get("/api/v1/hosts").json()["data"]
    assert (shown["id"], shown["is_connected"], shown["models"]) == ("host_a", True, ["demo/tiny-llama"])
    assert [device["job"] for device in shown["devices"]] == [job, None]
    assert house.api("victor").get("/api/v1/hosts/host_a").json() == shown
    house.clock.now += 31
    assert house.api("victor").get("/api/v1/hosts/host_a").json()["is_connected"] is False
    assert house.api("victor").get("/api/v1/hosts/nowhere").status_code == 404


def test_models_are_those_of_the_hosts_with_the_hosts_that_have_them(house: House) -> None:
    assert house.api("victor").get("/api/v1/models").json()["data"] == []
    connect_host(house)
    house.clock.now += 1
    connect_host(house, "host_b")
    (model,) = house.api("victor").get("/api/v1/models").json()["data"]
    assert (model["name"], model["context_length"]) == ("demo/tiny-llama", 4096)
    assert model["hosts"] == ["host_b", "host_a"]


def test_presets_are_parts_of_a_spec(house: House) -> None:
    from core.presets import PRESETS
    from core.spec import parse_spec

    presets = house.api("victor").get("/api/v1/presets").json()["data"]
    assert [preset["key"] for preset in presets] == [preset.key for preset in PRESETS]
    for preset in presets:
        parse_spec({"data": {"train": [{"dataset": "any"}]}, **preset["spec"]})
