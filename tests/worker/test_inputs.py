import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker.inputs import device_environment, threads_per_rank


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)))


@pytest.mark.parametrize(
    ("num_host_devices", "devices", "num_ranks", "threads"),
    [
        (1, ("cpu0",), 1, 8),
        (2, ("cpu1",), 1, 4),
        (2, ("cpu1",), 3, 1),
        (1, ("cpu0",), 3, 2),
        (4, ("gpu0",), 1, 2),
        (4, ("gpu0", "gpu3"), 2, 2),
        (16, ("cpu0",), 4, 1),
    ],
)
def test_a_slots_threads_are_shared_by_its_ranks(
    num_host_devices: int, devices: tuple[str, ...], num_ranks: int, threads: int
) -> None:
    assert threads_per_rank(num_host_devices, devices, num_ranks) == threads


@given(num_slots=st.integers(1, 16), num_ranks=st.integers(1, 16))
def test_full_slots_ask_for_no_more_threads_than_there_are_cpus_unless_ranks_alone_do(
    num_slots: int, num_ranks: int
) -> None:
    threads = threads_per_rank(num_slots, ("cpu0",), num_ranks)
    assert threads >= 1
    assert num_slots * num_ranks * threads <= max(8, num_slots * num_ranks)


def test_gpus_are_named_by_their_bus() -> None:
    assert device_environment(("gpu2", "gpu0")) == {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": "2,0"}
    assert device_environment(("cpu0",))["CUDA_VISIBLE_DEVICES"] == ""
