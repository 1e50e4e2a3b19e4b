"""A real host measures data for a real web service: what it finds, and what a hostile template can't do to either."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.e2e.house import House, running_house, wait_until
from tests.e2e.test_rest_journey import arithmetic
from worker.engine.demo_model import ensure_demo_model

pytestmark = pytest.mark.timeout(400)

HOSTILE = {"memory": "{{ 'a' * 10**9 }}", "time": "{{ (10 ** (10 ** 8)) % 7 }}"}


@pytest.fixture(scope="module")
def house_with_hostile_models(tmp_path_factory: pytest.TempPathFactory) -> Iterator[House]:
    folder: Path = tmp_path_factory.mktemp("hostile")
    demo = ensure_demo_model(folder / "models")
    for name, template in HOSTILE.items():
        copy = shutil.copytree(demo, folder / "models" / "hostile" / name)
        settings = json.loads((copy / "tokenizer_config.json").read_text())
        (copy / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        (copy / "chat_template.jinja").write_text(template)
    with running_house(folder / "data", folder / "models") as house:
        yield house


def measured(house: House, spec: dict[str, Any]) -> httpx.Response:
    """The preflight once it isn't 202 any more; the web service answers all the while."""

    def is_done() -> httpx.Response | None:
        assert httpx.get(f"{house.url}/readyz", timeout=10).status_code == 200
        reply = house.post("/jobs/preflight", {"spec": spec})
        return reply if reply.status_code != 202 else None

    reply: httpx.Response = wait_until(is_done, "the data is measured", timeout_s=180, every_s=0.3)
    return reply


@pytest.mark.parametrize(
    ("model", "sentence"), [("memory", "more than 512 MB of memory"), ("time", "takes too long")], ids=[*HOSTILE]
)
def test_a_hostile_template_ends_with_a_sentence_and_harms_nobody(
    house_with_hostile_models: House, model: str, sentence: str
) -> None:
    house = house_with_hostile_models
    house.put_dataset("sums", arithmetic(40))
    refused = measured(house, {"model": {"base": f"hostile/{model}"}, "data": {"train": [{"dataset": "sums"}]}})
    assert refused.status_code == 422 and sentence in refused.json()["detail"]
    honest = measured(house, {"data": {"train": [{"dataset": "sums"}]}})
    assert honest.status_code == 200 and honest.json()["samples"] == 40


def test_what_is_validated_on_and_trained_too_is_told(house_with_hostile_models: House) -> None:
    house = house_with_hostile_models
    rows = arithmetic(600).splitlines()
    fresh = [
        json.dumps({"messages": [{"role": "user", "content": f"{n}?"}, {"role": "assistant", "content": f"<{n}>"}]})
        for n in range(1000, 1050)
    ]
    house.put_dataset("trained", b"\n".join(rows))
    house.put_dataset("held", "\n".join([*fresh, *map(bytes.decode, rows[:5]), fresh[0]]).encode())
    data = {"train": [{"dataset": "trained"}], "validation": {"dataset": "held"}}
    report = measured(house, {"data": data}).json()
    said = {remark["code"]: remark["text"] for remark in report["verdict"]}
    assert "5 of 56 validation rows equal a training row" in said["verdict.validation_equal"]
    profile = house.get("/datasets/held/profile", model="demo/tiny-llama")
    assert (profile["duplicates"]["num_equal"], profile["duplicates"]["num_groups"]) == (1, 1)
    assert [row["line"] for row in profile["duplicates"]["groups"][0]["rows"]] == [1, 56]
