import random
from collections import Counter
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.scheduling import Assigned, HostOffer, QueuedJob, Waiting, assign, likeliest

MODELS = ["small", "large"]


def job(name, num_ranks=1, *, priority=0, at=0.0, model="small", **more):
    return QueuedJob(name, priority, at, num_ranks, model, **more)


def host(name, total, free=None, *, kind="gpu", models=("small",), **more):
    devices = tuple(f"{name}:{index}" for index in range(total))
    return HostOffer(
        f"id-{name}", name, kind, devices, devices[: total if free is None else free], frozenset(models), **more
    )


def placed(decisions):
    return {decision.job_id: decision.host_id for decision in decisions if isinstance(decision, Assigned)}


def reason(decisions, name):
    (waiting,) = (decision for decision in decisions if isinstance(decision, Waiting) and decision.job_id == name)
    return waiting.reason.text()


@st.composite
def queues(draw):
    num_jobs, num_hosts = draw(st.integers(0, 12)), draw(st.integers(0, 4))
    names = [f"id-h{index}" for index in range(num_hosts)]
    jobs = [
        job(
            f"j{index}",
            draw(st.integers(1, 5)),
            priority=draw(st.integers(-1, 1)),
            at=float(draw(st.integers(0, 5))),
            model=draw(st.sampled_from(MODELS)),
            may_fetch=draw(st.booleans()),
            host_pinned=draw(st.sampled_from([None, None, None, "id-gone", *names])),
            needs=draw(st.sampled_from([frozenset(), frozenset({"bf16"})])),
            excluded_hosts=draw(st.frozensets(st.sampled_from([*names, "id-gone"]), max_size=1)),
        )
        for index in range(num_jobs)
    ]
    hosts = []
    for index in range(num_hosts):
        total = draw(st.integers(0, 6))
        hosts.append(
            host(
                f"h{index}",
                total,
                draw(st.integers(0, total)),
                kind=draw(st.sampled_from(["gpu", "cpu_slot"])),
                models=draw(st.sets(st.sampled_from(MODELS))),
                num_cpus=draw(st.integers(1, 4)),
                features=draw(st.sampled_from([frozenset(), frozenset({"bf16"})])),
                reaches_hub=draw(st.booleans()),
                accepts=draw(st.sampled_from([True, True, False])),
            )
        )
    return jobs, hosts


@given(queues())
def test_no_device_is_given_twice_and_none_that_is_not_free(queue):
    jobs, hosts = queue
    offers = {offer.id: offer for offer in hosts}
    wanted = {queued.id: queued.num_ranks for queued in jobs}
    given_out = Counter()
    for decision in assign(jobs, hosts):
        if isinstance(decision, Assigned):
            offer = offers[decision.host_id]
            is_gpu = offer.device_kind == "gpu"
            assert len(decision.devices) == (wanted[decision.job_id] if is_gpu else 1), "ranks share a CPU slot"
            assert is_gpu or wanted[decision.job_id] <= offer.num_cpus
            assert set(decision.devices) <= set(offer.free_devices)
            given_out.update(decision.devices)
    assert not given_out or max(given_out.values()) == 1


@given(queues(), st.randoms(use_true_random=False))
def test_every_job_gets_one_decision_which_the_order_of_the_input_does_not_change(queue, shuffler: random.Random):
    jobs, hosts = queue
    decisions = assign(jobs, hosts)
    assert sorted(decision.job_id for decision in decisions) == sorted(queued.id for queued in jobs)
    positions = [decision.position for decision in decisions if isinstance(decision, Waiting)]
    assert positions == list(range(1, len(positions) + 1))
    shuffled_jobs, shuffled_hosts = list(jobs), list(hosts)
    shuffler.shuffle(shuffled_jobs)
    shuffler.shuffle(shuffled_hosts)
    assert assign(shuffled_jobs, shuffled_hosts) == decisions


@given(queues())
def test_a_job_goes_only_where_it_may_and_a_waiting_one_has_a_sentence(queue):
    jobs, hosts = queue
    offers, by_id = {offer.id: offer for offer in hosts}, {queued.id: queued for queued in jobs}
    for decision in assign(jobs, hosts):
        if isinstance(decision, Waiting):
            assert "{" not in decision.text()
            continue
        queued, offer = by_id[decision.job_id], offers[decision.host_id]
        assert offer.accepts and queued.needs <= offer.features and offer.offers_model(queued)
        assert queued.host_pinned in (None, offer.id)
        assert queued.host_pinned == offer.id or offer.id not in queued.excluded_hosts


@given(queues())
def test_the_first_in_order_that_fits_anywhere_is_never_left_waiting(queue):
    jobs, hosts = queue
    decisions = assign(jobs, hosts)
    if decisions and isinstance(decisions[0], Waiting):
        first = next(queued for queued in jobs if queued.id == decisions[0].job_id)
        alone = assign([first], hosts)
        assert isinstance(alone[0], Waiting), "it waits for nobody before it, so it waits even alone"


def test_priority_goes_before_age_and_age_before_the_name():
    jobs = [job("a", at=3.0), job("b", at=1.0), job("c", at=2.0, priority=1), job("d", at=1.0)]
    assert placed(assign(jobs, [host("h", 3)])) == dict.fromkeys(["c", "b", "d"], "id-h")


def test_the_host_with_the_smallest_gap_is_taken_so_that_a_large_job_finds_room():
    decisions = assign([job("one"), job("four", 4, at=1.0)], [host("big", 4), host("tiny", 1)])
    assert placed(decisions) == {"one": "id-tiny", "four": "id-big"}


def test_a_host_that_has_the_model_is_taken_before_a_tighter_one_that_must_fetch_it():
    hosts = [host("has", 4), host("fetches", 1, models=(), reaches_hub=True)]
    assert placed(assign([job("j", may_fetch=True)], hosts)) == {"j": "id-has"}
    assert placed(assign([job("j", may_fetch=True)], hosts[1:])) == {"j": "id-fetches"}


def test_a_job_that_can_never_fit_does_not_hold_up_those_behind_it():
    decisions = assign([job("giant", 9), job("small", at=1.0)], [host("h", 2)])
    assert reason(decisions, "giant") == "asks for 9 devices, the largest host that could run it has 2"
    assert placed(decisions) == {"small": "id-h"}


def test_a_big_job_that_waits_keeps_one_host_from_those_behind_it_and_leaves_the_others():
    jobs = [job("big", 4, at=0.0), job("small", 1, at=1.0)]
    decisions = assign(jobs, [host("a", 4, free=3), host("b", 4, free=2)])
    assert placed(decisions) == {"small": "id-b"}, "a is where it lacks the fewest"
    decisions = assign(jobs, [host("a", 4, free=3)])
    assert reason(decisions, "small") == "free devices of a are kept for job big, which stands before it"


def test_a_stream_of_small_jobs_does_not_starve_a_big_one():
    """Each tick a small job ends and two more come; the big one still gets its four devices after four ticks."""
    running, waiting = [f"old{index}" for index in range(4)], [job("big", 4, at=0.0)]
    offer = host("h", 4, free=0)
    for tick in range(1, 5):
        running.pop()
        waiting += [job(f"new{tick}{twin}", at=float(tick)) for twin in "ab"]
        offer = replace(offer, free_devices=offer.all_devices[: 4 - len(running)])
        decisions = assign(waiting, [offer])
        if tick < 4:
            assert placed(decisions) == {}
    assert placed(decisions) == {"big": "id-h"}


def test_a_higher_priority_takes_even_what_is_kept():
    jobs = [job("big", 4, at=0.0), job("urgent", 1, at=9.0, priority=5)]
    assert placed(assign(jobs, [host("a", 4, free=3)])) == {"urgent": "id-a"}


def test_ranks_on_a_cpu_share_one_slot():
    decisions = assign([job("pair", 2), job("next", at=1.0)], [host("h", 2, kind="cpu_slot", num_cpus=4)])
    assert [decision.devices for decision in decisions] == [("h:0",), ("h:1",)]


def test_more_ranks_than_a_host_has_cpus_do_not_run_there():
    decisions = assign([job("four", 4)], [host("a", 2, kind="cpu_slot", num_cpus=2), host("b", 3)])
    assert reason(decisions, "four") == "asks for 4 devices, the largest host that could run it has 3"


def test_a_free_gpu_is_taken_before_a_cpu_slot_however_tight():
    hosts = [host("cpu", 1, kind="cpu_slot", num_cpus=8), host("gpu", 8)]
    assert placed(assign([job("j", 4)], hosts)) == {"j": "id-gpu"}
    assert placed(assign([job("j", 4)], hosts[:1])) == {"j": "id-cpu"}


def test_the_host_that_lacks_the_fewest_counts_slots_and_gpus_by_what_the_job_needs_there():
    """Four ranks lack three GPUs on one host, and one slot on the other, although fewer devices are free there."""
    jobs = [job("four", 4), job("small", at=1.0)]
    decisions = assign(jobs, [host("gpus", 4, free=1), host("slots", 1, free=0, kind="cpu_slot", num_cpus=8)])
    assert placed(decisions) == {"small": "id-gpus"}
    assert reason(decisions, "four") == "waits for 4 free devices on one host: 4 of 5 on 2 hosts are busy"


def test_two_big_jobs_keep_a_host_each():
    jobs = [job("first", 2), job("second", 2, at=1.0), job("small", at=2.0)]
    decisions = assign(jobs, [host("a", 2, free=1), host("b", 2, free=1)])
    assert placed(decisions) == {}
    assert reason(decisions, "small").startswith("free devices of a are kept for job first")


@pytest.mark.parametrize(
    ("queued", "hosts", "expected"),
    [
        (job("j"), [], "no host is connected"),
        (job("j", model="X"), [host("h", 1)], "no host has the model X"),
        (job("j", model="X"), [host("h", 1, reaches_hub=True)], "no host has the model X"),
        (job("j"), [host("h", 1, accepts=False)], "each host that could run it is silent or draining: h"),
        (job("j", needs=frozenset({"bf16"})), [host("h", 1)], "no host that has the model offers bf16"),
        (
            job("j"),
            [host("host-a", 2, free=0, kind="cpu_slot")],
            "waits for a free device: 2 of 2 CPU slots on host-a are busy",
        ),
        (
            job("j", 2),
            [host("host-a", 2, free=0, kind="cpu_slot", num_cpus=2)],
            "waits for a free device: 2 of 2 CPU slots on host-a are busy",
        ),
        (job("j"), [host("h", 8, free=0)], "waits for a free device: 8 of 8 GPUs on h are busy"),
        (job("j", 3), [host("h", 8, free=2)], "waits for 3 free devices: 6 of 8 GPUs on h are busy"),
        (
            job("j", 2),
            [host("a", 2, free=1), host("b", 3, free=1)],
            "waits for 2 free devices on one host: 3 of 5 on 2 hosts are busy",
        ),
        (
            job("j", excluded_hosts=frozenset({"id-h"})),
            [host("h", 1)],
            "it failed to start on, or was kept from, each host that could run it: h",
        ),
        (
            job("j", host_pinned="id-b"),
            [host("a", 2), host("b", 2, free=0)],
            "waits for host b, where its checkpoint is: 2 of 2 devices there are busy",
        ),
        (
            job("j", host_pinned="gpu-2"),
            [host("a", 2)],
            "waits for host gpu-2, where its checkpoint is; that host is silent or draining",
        ),
        (
            job("j", 3, host_pinned="id-a"),
            [host("a", 2), host("b", 4)],
            "waits for host a, where its checkpoint is, but that host no longer has the model small, "
            "3 devices or a feature that it needs; mend the host, or start over elsewhere",
        ),
        (
            job("j", 4),
            [host("a", 2), host("b", 8, models=())],
            "asks for 4 devices, the largest host that could run it has 2",
        ),
    ],
)
def test_a_waiting_job_says_what_it_waits_for(queued, hosts, expected):
    (decision,) = assign([queued], hosts)
    assert isinstance(decision, Waiting)
    assert decision.reason.text() == expected
    assert decision.text() == f"position 1 in the queue: {expected}"


def test_of_two_slots_and_three_jobs_the_third_waits_with_its_place():
    jobs = [job(name, at=float(at)) for at, name in enumerate("abc")]
    decisions = assign(jobs, [host("here", 2, kind="cpu_slot")])
    assert placed(decisions) == {"a": "id-here", "b": "id-here"}
    assert decisions[-1].text() == (
        "position 1 in the queue: waits for a free device: 2 of 2 CPU slots on here are busy"
    )


@given(queues())
def test_the_likeliest_host_is_the_one_that_a_job_alone_is_given(queue):
    jobs, hosts = queue
    for queued in jobs:
        alone = replace(queued, host_pinned=None, excluded_hosts=frozenset())
        ranked = likeliest(alone, hosts)
        (decision,) = assign([alone], hosts)
        if isinstance(decision, Assigned):
            assert ranked[0].id == decision.host_id
        else:
            assert not any(offer.accepts and len(offer.free_devices) >= offer.devices_for(alone) for offer in ranked), (
                "what waits has no host that is free"
            )
        names = {offer.id for offer in ranked}
        assert all(
            (offer.id in names)
            == (offer.offers_model(alone) and alone.needs <= offer.features and alone.num_ranks <= offer.most_ranks)
            for offer in hosts
        ), "whatever is silent or busy may come free"


def test_of_hosts_that_are_full_the_likeliest_lacks_fewest_and_a_silent_one_comes_last():
    hosts = [host("silent", 4, accepts=False), host("far", 4, 0), host("near", 4, 1), host("few", 1)]
    assert [offer.name for offer in likeliest(job("j", 2), hosts)] == ["near", "far", "silent"]
