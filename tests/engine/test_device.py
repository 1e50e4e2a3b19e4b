import pytest
import torch

from core.errors import UserError
from core.placement import standing_for_all
from core.wire import Device
from worker.engine.device import find_device
from worker.engine.ending import outcome_of
from worker.engine.inventory import cpu_devices


@pytest.mark.parametrize("num_slots", [1, 4])
def test_a_cpu_slot_is_its_share_of_the_cpu_as_the_host_reports_it(num_slots: int) -> None:
    device, facts = find_device("cpu0", cpu_slots=num_slots)
    assert device == torch.device("cpu") and facts.kind == "cpu" and not facts.has_bf16
    assert facts == cpu_devices(num_slots)[0]
    assert facts.memory_bytes == cpu_devices(1)[0].memory_bytes // num_slots


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU to use")
def test_a_gpu_that_torch_cannot_use_never_becomes_a_cpu() -> None:
    with pytest.raises(UserError) as error:
        find_device("gpu0")
    assert error.value.code == "engine.no_device" and "gpu0" in str(error.value)
    assert outcome_of(error.value, "start", 0, None).code == 70, "no spec can mend it"


def test_of_unlike_devices_a_plan_counts_on_what_each_of_them_has() -> None:
    large = Device(id="gpu0", kind="gpu", name="large", memory_bytes=80, has_bf16=False)
    small = Device(id="gpu1", kind="gpu", name="small", memory_bytes=24, has_bf16=True)
    assert standing_for_all([large, small]) == large.model_copy(update={"memory_bytes": 24})
    assert standing_for_all([small, large]) == small.model_copy(update={"has_bf16": False})
