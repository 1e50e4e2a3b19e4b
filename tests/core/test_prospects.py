"""Which hosts could run a job, which device is planned for, and what no host can ever do."""

from collections.abc import Sequence
from typing import Any

import pytest

from core.errors import UserError, UserErrors
from core.fix import applied, fixes_of
from core.needs import FEATURES, features_of, needs_of
from core.prospects import KnownHost, Prospects, prospects_of
from core.scheduling import HostOffer
from core.spec import JobSpec, parse_spec
from core.wire import Device, HostReport

MODEL = "demo/tiny-llama"
ALL = frozenset(FEATURES)
ON_CPU = ALL - {"gpu"}


def device(id: str, name: str, gigabytes: float, **more: Any) -> Device:
    kind = "gpu" if id.startswith("gpu") else "cpu"
    return Device(id=id, kind=kind, name=name, memory_bytes=round(gigabytes * 1e9), **more)  # type: ignore[arg-type]


def gpus(count: int, name: str = "H100", gigabytes: float = 80) -> tuple[Device, ...]:
    return tuple(device(f"gpu{number}", name, gigabytes, has_bf16=True) for number in range(count))


def host(
    name: str,
    devices: tuple[Device, ...],
    *,
    free: int | None = None,
    features: frozenset[str] = ALL,
    models: Sequence[str] = (MODEL,),
    accepts: bool = True,
    silent_s: float = 2.0,
    num_cpus: int = 4,
) -> KnownHost:
    ids = tuple(each.id for each in devices)
    is_gpu = any(each.kind == "gpu" for each in devices)
    offer = HostOffer(
        id=f"id-{name}",
        name=name,
        device_kind="gpu" if is_gpu else "cpu_slot",
        all_devices=ids,
        free_devices=ids[: len(ids) if free is None else free],
        models=frozenset(models),
        num_cpus=num_cpus,
        features=features if is_gpu else features - {"gpu"},
        accepts=accepts,
    )
    return KnownHost(offer, {each.id: each for each in devices}, silent_s, is_fresh=silent_s < 30)


CPU_HOST = host("cpu", (device("cpu0", "a CPU", 32),))


def spec_of(**parts: Any) -> JobSpec:
    return parse_spec({"data": {"train": [{"dataset": "d"}]}, **parts})


def of(hosts: Sequence[KnownHost], first: str | None = None, **parts: Any) -> Prospects:
    return prospects_of(spec_of(**parts), hosts, first)


def refused(hosts: Sequence[KnownHost], **parts: Any) -> dict[str, UserError]:
    with pytest.raises(UserErrors) as caught:
        of(hosts, **parts)
    return {error.code: error for error in caught.value.errors}


# -- needs -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("parts", "features"),
    [
        ({}, set()),
        ({"method": {"type": "qlora"}}, {"bitsandbytes"}),
        ({"optimizer": {"name": "adamw_8bit"}}, {"bitsandbytes"}),
        ({"parallel": {"zero_stage": 1}}, {"deepspeed"}),
        ({"parallel": {"zero_stage": 0, "devices": 4}}, set()),
        ({"parallel": {"devices": 4}}, set()),  # adapters that fit are not sharded
        ({"parallel": {"devices": 4}, "method": {"type": "full"}}, {"deepspeed"}),
        ({"parallel": {"devices": 4}, "method": {"type": "full"}, "compute": {"dtype": "fp16"}}, set()),
        ({"parallel": {"offload": "optimizer"}}, {"gpu", "deepspeed", "compiler"}),
        ({"compute": {"attention": "flex"}}, {"gpu"}),
        ({"compute": {"compile": True}}, {"gpu"}),
        ({"compute": {"dtype": "bf16", "attention": "flash"}}, set()),  # slower without, but it runs
    ],
)
def test_a_spec_needs_what_it_cannot_do_without(parts: dict[str, Any], features: set[str]) -> None:
    assert {need.feature for need in needs_of(spec_of(**parts))} == features


def test_a_host_has_what_it_reports_and_an_older_worker_may_have_a_compiler() -> None:
    def report(**more: Any) -> HostReport:
        told = {"host": "h", "name": "n", "devices": (), "models": (), "versions": {}, "num_cpus": 1, "memory_bytes": 1}
        return HostReport.model_validate(told | more)

    assert features_of(report()) == {"compiler"}
    assert features_of(report(has_compiler=False, devices=gpus(1))) == {"gpu"}
    assert features_of(report(versions={"bitsandbytes": "0.50.2", "deepspeed": "0.19.8"})) == ON_CPU


# -- what no host can do ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "hosts", "parts", "field", "words"),
    [
        ("host.too_few_gpus", [host("alpha", gpus(2)), host("beta", gpus(1))], {"parallel": {"devices": 4}},
         "parallel.devices", ["parallel.devices 4", "more than 2 GPUs", "alpha: 2, beta: 1", "at most 2"]),
        ("host.too_few_cpus", [CPU_HOST], {"parallel": {"devices": 16}}, "parallel.devices",
         ["parallel.devices 16", "more than 4 CPUs", "cpu: 4", "at most 4"]),
        ("host.no_bitsandbytes", [host("alpha", gpus(2), features=ALL - {"bitsandbytes"})],
         {"method": {"type": "qlora"}}, "method.type", ["method.type qlora needs bitsandbytes", "(alpha)"]),
        ("host.no_bitsandbytes", [host("alpha", gpus(2), features=ALL - {"bitsandbytes"})],
         {"optimizer": {"name": "paged_adamw_8bit"}}, "optimizer.name", ["optimizer.name paged_adamw_8bit"]),
        ("host.no_deepspeed", [host("alpha", gpus(2), features=ALL - {"deepspeed"})],
         {"parallel": {"zero_stage": 2, "devices": 2}}, "parallel.zero_stage", ["zero_stage 2", "to 0"]),
        ("host.no_compiler", [host("alpha", gpus(2), features=ALL - {"compiler"})],
         {"parallel": {"offload": "optimizer"}}, "parallel.offload", ["g++ and ninja"]),
        ("plan.flex_on_cpu", [CPU_HOST], {"compute": {"attention": "flex"}}, "compute.attention", ["CPU"]),
        ("plan.compile_on_cpu", [CPU_HOST], {"compute": {"compile": True}}, "compute.compile", ["CPU"]),
        ("plan.offload_on_cpu", [CPU_HOST], {"parallel": {"offload": "optimizer"}}, "parallel.offload", ["CPU"]),
    ],
)  # fmt: skip
def test_what_no_host_can_ever_do_is_refused_with_its_number_and_each_fix_finds_a_host(
    code: str, hosts: list[KnownHost], parts: dict[str, Any], field: str, words: list[str]
) -> None:
    found = refused(hosts, **parts)
    assert list(found) == [code] and found[code].field == field
    assert all(word in found[code].text() for word in words), found[code].text()
    for fix in fixes_of(found[code]):
        mended = parse_spec(applied(spec_of(**parts), fix))
        assert prospects_of(mended, hosts, None).choices
    assert fixes_of(found[code])


def test_what_hosts_have_only_between_them_is_refused_and_what_they_have_is_said() -> None:
    hosts = [host("alpha", gpus(4), features=ALL - {"bitsandbytes"}), host("beta", gpus(1))]
    (error,) = refused(hosts, method={"type": "qlora"}, parallel={"devices": 4}).values()
    assert error.code == "host.together"
    assert "alpha (compiler, deepspeed, 4 GPU), beta (bitsandbytes, compiler, deepspeed, 1 GPU)" in error.text()


def test_all_that_is_missing_is_told_at_once() -> None:
    bare = host("alpha", gpus(1), features=frozenset({"gpu"}))
    parts = {"method": {"type": "qlora"}, "optimizer": {"name": "adamw_8bit"}, "parallel": zero(2, 4)}
    assert refused([bare], **parts).keys() == {"host.no_bitsandbytes", "host.no_deepspeed", "host.too_few_gpus"}


def zero(stage: int, devices: int) -> dict[str, int]:
    return {"zero_stage": stage, "devices": devices}


def test_a_host_without_a_device_counts_for_nothing() -> None:
    assert refused([host("alpha", ())]).keys() == {"profile.no_device"}


# -- which device ----------------------------------------------------------------------------------------------------

BIG, SMALL = host("big", gpus(2)), host("small", gpus(2, "L4", 24))


def test_the_device_is_that_of_the_host_which_the_dispatcher_would_give() -> None:
    prospects = of([BIG, SMALL], first="id-small")
    assert prospects.device.name == "L4" and prospects.why.text() == "it would start on small now"
    assert [(choice.key, choice.hosts) for choice in prospects.choices] == [("L4", ("small",)), ("H100", ("big",))]


def test_another_device_is_looked_at_by_its_name_or_its_hosts() -> None:
    prospects = of([BIG, SMALL], first="id-small")
    for asked in ("H100", "big"):
        other = prospects.looking_at(asked)
        assert other.device.name == "H100" and other.choices == prospects.choices
        assert "by itself the job would go to small (L4)" in other.why.text()
    assert prospects.looking_at("small") is prospects
    with pytest.raises(UserError, match="A100 is no device of a host that could run this job; known are: L4, H100"):
        prospects.looking_at("A100")


def test_devices_of_one_name_and_unlike_memory_are_asked_for_by_host() -> None:
    hosts = [host("one", (device("cpu0", "a CPU", 32),)), host("two", (device("cpu0", "a CPU", 64),))]
    prospects = of(hosts)
    assert [choice.key for choice in prospects.choices] == ["one", "two"]
    assert prospects.looking_at("two").device.memory_bytes == 64 * 10**9


def test_like_devices_of_two_hosts_are_one_choice() -> None:
    prospects = of([BIG, host("other", gpus(4))])
    (choice,) = prospects.choices
    assert set(choice.hosts) == {"big", "other"} and prospects.why.code == "host.all_alike"


def test_of_unlike_gpus_in_one_host_the_least_that_the_job_would_get_counts() -> None:
    mixed = host("mixed", (*gpus(1), device("gpu1", "L4", 24)))
    assert of([mixed]).device.memory_bytes == 80 * 10**9
    assert of([mixed], parallel={"devices": 2}).device.memory_bytes == 24 * 10**9
    busy = host("busy", (*gpus(1), device("gpu1", "L4", 24)), free=1)
    assert of([busy]).device.memory_bytes == 80 * 10**9


def test_a_need_rules_hosts_out_before_one_is_planned_for() -> None:
    assert of([CPU_HOST, SMALL], compute={"attention": "flex"}).device.kind == "gpu"
    assert [choice.key for choice in of([CPU_HOST, SMALL]).choices] == ["L4", "a CPU"]


# -- what should be known --------------------------------------------------------------------------------------------


def remarks_of(hosts: Sequence[KnownHost], **parts: Any) -> list[str]:
    return [remark.said.text() for remark in of(hosts, **parts).remarks]


def test_a_silent_or_draining_host_is_waited_for_and_that_is_said() -> None:
    (silent,) = remarks_of([host("alpha", gpus(1), accepts=False, silent_s=310)])
    assert "alpha, was last heard of 5 min ago" in silent
    (draining,) = remarks_of([host("alpha", gpus(1), accepts=False)])
    assert "alpha, is being drained" in draining
    (both,) = remarks_of([host("a", gpus(1), accepts=False), host("b", gpus(1), accepts=False, silent_s=100)])
    assert "(a, b)" in both
    assert remarks_of([host("a", gpus(1)), host("b", gpus(1), accepts=False)]) == []


def test_a_free_host_that_lacks_something_is_warned_of_while_the_able_one_is_busy() -> None:
    poor = host("poor", gpus(2), features=ALL - {"bitsandbytes"})
    busy, free = host("rich", gpus(2), free=0), host("rich", gpus(2))
    qlora = {"method": {"type": "qlora"}}
    (remark,) = of([poor, busy], **qlora).remarks
    assert remark.field == "method.type" and remark.level == "warning"
    assert (
        "poor has free devices" in remark.said.text() and "(bitsandbytes), so it waits for rich" in remark.said.text()
    )
    assert remark.fixes == ({"method.type": "lora"},)
    assert of([poor, free], **qlora).remarks == () == of([poor, busy]).remarks
    (few,) = of([host("few", gpus(1)), host("many", gpus(4), free=1)], parallel={"devices": 2}).remarks
    assert few.fixes == ({"parallel.devices": 1},) and "few has free devices" in few.said.text()
